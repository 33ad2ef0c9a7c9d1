"""Kernel modules of a modules folder, in the order in which they can be loaded.

The folder is what depmod leaves in /lib/modules/VERSION (modules.dep(5), depmod.d(5)).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from ..core.errors import ConfigError, HostError, ImageError, NotFoundError
from . import files, payload

VIRTIO = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio-rng", "virtio_console")  # drivers for kvmpy's devices
SUFFIX = re.compile(r"\.ko(\.gz|\.xz|\.zst)?$")
MAX_MODULE = 256 << 20  # bytes once decompressed: the largest real ones have some 20 MiB
REINSTALL = "install the kernel's modules again"


def find_folder(folder: Path) -> Path:
    """The folder with modules.dep: `folder` itself, or its only lib/modules/VERSION or VERSION.

    Raises NotFoundError, ConfigError (several versions) or HostError (depmod has not been run).
    """
    if not folder.is_dir():
        raise NotFoundError(f"no modules folder {folder}", "give --modules-dir a folder such as /lib/modules/VERSION")
    if (folder / "modules.dep").is_file():
        return folder
    if (folder / "modules.order").is_file() or (folder / "kernel").is_dir():
        depmod = f"depmod {folder.name}"
        if folder.parts[-3:-1] == ("lib", "modules") and folder.parents[2] != Path("/"):
            depmod = f"depmod -b {folder.parents[2]} {folder.name}"
        raise HostError(f"{folder} has no modules.dep", f"make one with `{depmod}` (package kmod)")
    tree = folder / "lib" / "modules"
    versions = sorted(path for path in (tree if tree.is_dir() else folder).iterdir() if (path / "kernel").is_dir())
    if len(versions) == 1:
        return find_folder(versions[0])
    if versions:
        names = ", ".join(path.name for path in versions)
        raise ConfigError(f"{folder} has modules of several kernels ({names})", "give --modules-dir one of them")
    raise NotFoundError(f"{folder} has no kernel modules", "give --modules-dir a folder such as /lib/modules/VERSION")


def closure(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of `names` and of everything they need, in the order to load them, relative to `folder`.

    Names are those of modprobe: `-` and `_` are the same, aliases without wildcards count. What is built into the
    kernel is left out. `folder` has modules.dep. Raises ConfigError for a module that this kernel does not have.
    """
    index = _Index(folder)
    order: dict[str, Path] = {}
    for name in names:
        found = index.resolve(name)
        if not found:
            close = difflib.get_close_matches(_canonical(name), index.files, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"{folder.name} has {len(index.files)} others"
            raise ConfigError(f"no kernel module {name!r} in {folder}", hint)
        for module in found:
            _visit(index, module, order)
    return list(order.values())


def load(path: Path) -> bytes:
    """The module's ELF image, decompressed; raises NotFoundError, HostError, or ImageError (damaged, huge)."""
    data = files.read(path, "kernel module", MAX_MODULE)
    if path.suffix != ".ko":
        name = payload.identify(data)
        try:
            content, _ = payload.DECODERS[name](data, MAX_MODULE)
        except (KeyError, ValueError) as error:
            why = f"its {name} data {error}" if name else "in no known compression format"
            raise ImageError(f"kernel module {path}: {why}", REINSTALL) from None
        except ImportError as error:
            raise HostError(f"kernel module {path}: {name} data: {error.msg}", f"pip install {error.name}") from None
        data = memoryview(content)
    if len(data) > MAX_MODULE or data[:4] != b"\x7fELF":
        raise ImageError(f"kernel module {path}: not a kernel module", REINSTALL)
    return bytes(data)


def not_built_in(kernel: bytes | memoryview, names: Iterable[str]) -> list[str]:
    """The virtio drivers of `names` that are nowhere in an uncompressed kernel, which has their names as strings."""
    strings = re.finditer(rb"(virtio[-_]\w{1,32})\0", kernel)
    there = {_canonical(match[1].decode()) for match in strings if kernel[match.start() - 1] == 0}
    wanted = dict.fromkeys(map(_canonical, names))
    return [name for name in wanted if name.startswith("virtio") and name not in there]


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _lines(path: Path) -> Iterable[str]:
    """The lines of a file that may be missing."""
    if path.is_file():
        yield from path.read_text(errors="replace").splitlines()


class _Index:
    """What the modules.* files of one folder say. Modules are known by their canonical name.

    Of thousands of lines a few are wanted: the rest is looked at no closer than it must be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._aliases: dict[str, list[str]] | None = None
        self.files: dict[str, str] = {}
        self._needs: dict[str, str] = {}
        for line in _lines(folder / "modules.dep"):
            file, _, needs = line.partition(":")
            name = self._name(file)
            self.files[name] = file
            self._needs[name] = needs
        self.before: dict[str, list[str]] = {}
        self.after: dict[str, list[str]] = {}
        for line in _lines(folder / "modules.softdep"):
            self._add_soft(line.split())

    @staticmethod
    def _name(file: str) -> str:
        name = file.rpartition("/")[2]
        return _canonical(name[:-3] if name.endswith(".ko") else SUFFIX.sub("", name))

    @cached_property
    def builtin(self) -> set[str]:
        return {self._name(line) for line in _lines(self._folder / "modules.builtin")}

    def needs(self, name: str) -> list[str]:
        """The modules that `name` needs; in modules.dep, the last one is to be loaded first."""
        return [self._name(need) for need in reversed(self._needs[name].split())]

    def _add_soft(self, words: list[str]) -> None:
        """`softdep NAME pre: A B post: C`; names before the first of the two are ignored, as modprobe does."""
        target: list[str] = []
        for word in words[2:] if words[:1] == ["softdep"] else []:
            if word in ("pre:", "post:"):
                target = (self.before if word == "pre:" else self.after).setdefault(_canonical(words[1]), [])
            else:
                target.append(word)

    def resolve(self, name: str) -> list[str]:
        """The modules that `name` stands for; empty when there are none, a built-in one stands for itself."""
        name = _canonical(name)
        if name in self.files or name in self.builtin:
            return [name]
        if self._aliases is None:
            self._aliases = {}
            for line in _lines(self._folder / "modules.alias"):
                words = line.split()
                if len(words) == 3 and words[0] == "alias" and not set("*?[") & set(words[1]):
                    self._aliases.setdefault(_canonical(words[1]), []).append(_canonical(words[2]))
        return [module for module in self._aliases.get(name, []) if module in self.files or module in self.builtin]


def _visit(index: _Index, module: str, order: dict[str, Path]) -> None:
    """Append `module` to `order` after all that it needs and before what wants to follow it."""
    stack = [(module, False)]
    entered: set[str] = set()  # soft dependencies may form a cycle
    while stack:
        name, ready = stack.pop()
        if name in order or name not in index.files:
            continue
        if ready:
            order[name] = Path(index.files[name])
            continue
        if name in entered:
            continue
        entered.add(name)
        soft = {
            when: [found for want in wanted.get(name, []) for found in index.resolve(want)]
            for when, wanted in (("before", index.before), ("after", index.after))
        }
        stack += [(other, False) for other in reversed(soft["after"])]
        stack.append((name, True))
        stack += [(other, False) for other in reversed(soft["before"] + index.needs(name))]
