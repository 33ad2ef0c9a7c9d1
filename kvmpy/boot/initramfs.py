"""The built-in initramfs: kvmpy's init, busybox where the host has it, files and kernel modules as asked.

What init does with it is said in guests/init.c.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import shlex
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..core import progress
from ..core.errors import ConfigError, HostError, NotFoundError
from . import cpio, payload, programs
from . import modules as kernel_modules
from .cpio import Entry

INIT = Path(__file__).with_name("init")  # built from guests/init.c
AGENT = Path(__file__).parents[1] / "guest/agent"  # built from guests/agent
BUSYBOX_NAMES = ("busybox", "busybox.static", "busybox-static")
BUSYBOX_FOLDERS = ("/usr/local/bin", "/bin", "/sbin", "/usr/lib/initcpio")
BUSYBOX_REMEDY = "give --busybox a static one (package busybox-static), or 'none'"
MAX_STRING = 128 << 10  # Linux, MAX_ARG_STRLEN: one word of a command line, its NUL included
LZ4_LEGACY = b"\x02\x21\x4c\x18"  # lz4's doc/lz4_Frame_format.md, "Legacy frame": the only one that Linux knows

FOLDERS = (
    *("dev", "dev/pts", "etc", "etc/kvmpy", "mnt", "proc", "root", "run", "sys", "tmp"),
    *("usr", "usr/bin", "usr/lib", "usr/lib64", "usr/local", "usr/local/bin", "var", "var/log", "var/tmp"),
)
STICKY = ("tmp", "var/tmp")
# One folder of programs and one of libraries, under the names of the merged /usr that distributions have.
FOLDER_LINKS = {
    "bin": "usr/bin",
    "sbin": "usr/bin",
    "usr/sbin": "usr/bin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "var/run": "run",
}
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost kvmpy\n::1 localhost\n",
}
# Linux, Documentation/admin-guide/devices.txt. devtmpfs hides these; they are for kernels without it.
DEVICES = {
    "dev/mem": (0o600, 1, 1),
    "dev/null": (0o666, 1, 3),
    "dev/zero": (0o666, 1, 5),
    "dev/full": (0o666, 1, 7),
    "dev/random": (0o666, 1, 8),
    "dev/urandom": (0o666, 1, 9),
    "dev/kmsg": (0o644, 1, 11),
    "dev/ttyS0": (0o600, 4, 64),
    "dev/tty": (0o666, 5, 0),
    "dev/console": (0o600, 5, 1),
    "dev/ptmx": (0o666, 5, 2),
    "dev/hvc0": (0o600, 229, 0),
}


def build(
    *,
    exec: str | None = None,
    files: Sequence[tuple[Path, str]] = (),
    busybox: Path | Literal["auto"] | None = "auto",
    modules: Sequence[str] = (),
    modules_dir: str | Path | None = None,
    agent: bool = False,
    volumes: Sequence[tuple[str, str, bool]] = (),
) -> bytes:
    """The initramfs as an uncompressed newc archive; the same input gives the same bytes.

    exec     shell command, or a script that starts with "#!", to run instead of a shell on the console
    files    (path on the host, absolute path in the guest): a program with its shared libraries, any other file,
             or a folder just as it is
    busybox  "auto" takes a static one of the host if there is one, None none
    modules  names of kernel modules to load first, from `modules_dir`, with all that they need
    agent    whether to put in the agent, which init starts if the command line has kvmpy.agent=1 (guests/PROTOCOL.md)
    volumes  (tag of a file system device, absolute path in the guest, read-only): mounted before anything runs
    Raises ConfigError, NotFoundError, ImageError and HostError.
    """
    with progress.working("making the initramfs"):
        return _build(exec, files, busybox, modules, modules_dir, agent, volumes)


def _build(
    exec: str | None,
    files: Sequence[tuple[Path, str]],
    busybox: Path | Literal["auto"] | None,
    modules: Sequence[str],
    modules_dir: str | Path | None,
    agent: bool,
    volumes: Sequence[tuple[str, str, bool]],
) -> bytes:
    tree = _Tree()
    tree.add_base()
    if agent:
        tree.add_agent()
    if busybox == "auto":
        busybox = find_busybox()
    if busybox is not None:
        tree.add_busybox(busybox)
    for host, guest in files:
        tree.add_file(host, guest)
    if modules:
        if modules_dir is None:
            raise ConfigError("kernel modules need a modules folder", "give one with --modules-dir")
        tree.add_modules(kernel_modules.find_folder(Path(modules_dir)), modules)
    if exec is not None:
        tree.add_command(exec)
    if volumes:
        tree.add_volumes(volumes)
    out = io.BytesIO()
    try:
        cpio.write(out, tree.entries())
    except OSError as error:
        raise HostError(f"cannot read the files for the initramfs: {error}") from None
    return out.getvalue()


def parse_file(text: str) -> tuple[Path, str]:
    """The (host, guest) paths of `HOST[:GUEST]`; without GUEST, a file keeps the path that it has on the host.

    Raises ConfigError.
    """
    host, colon, guest = text.rpartition(":/")
    if not host and (colon or not text):
        raise ConfigError(f"--file {text!r} names no file", "use --file HOST[:GUEST]")
    if colon:
        return Path(host), "/" + guest
    return Path(text), os.path.normpath(Path(text).absolute())


def compress(data: bytes, how: str) -> bytes:
    """`data` in a form that Linux unpacks by itself: `how` is "none", "gzip", "zstd" or "lz4"."""
    if how == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if how == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=9).compress(data)
    if how == "lz4":
        import lz4.block

        blocks = [
            lz4.block.compress(data[at : at + payload.LZ4_BLOCK], mode="high_compression", store_size=False)
            for at in range(0, len(data), payload.LZ4_BLOCK)
        ]
        return LZ4_LEGACY + b"".join(struct.pack("<I", len(block)) + block for block in blocks)
    return data


def read_command(text: str) -> str:
    """The command itself, or the script in the text file of that name; raises HostError when that cannot be read."""
    try:
        return Path(text).read_text() if Path(text).is_file() else text
    except (UnicodeDecodeError, ValueError):  # a program, or no file name at all
        return text
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return text
        raise HostError(f'cannot read the script "{text}": {error.strerror}', "make it readable") from None


def find_busybox() -> Path | None:
    """The first static x86-64 busybox of the host."""
    folders = [*BUSYBOX_FOLDERS, *os.environ.get("PATH", "").split(":")]
    candidates = (Path(folder, name) for folder in folders if folder for name in BUSYBOX_NAMES)
    return next((path for path in candidates if os.access(path, os.X_OK) and programs.loader_of(path) == ""), None)


class _Tree:
    """The files of the image by their path without the leading slash; what is added later replaces what is there."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def entries(self) -> Iterator[Entry]:
        """All entries, every folder before what is in it."""
        written: set[str] = set()
        for name, entry in self._entries.items():
            for parent in [name[:at] for at, char in enumerate(name) if char == "/"]:
                if parent not in written:
                    written.add(parent)
                    yield self._entries.get(parent) or Entry(parent, stat.S_IFDIR | 0o755)
            if name not in written:
                written.add(name)
                yield entry

    def add_base(self) -> None:
        if not INIT.is_file():
            raise HostError(f"kvmpy's guest init is not built ({INIT})", "run `make -C guests init` or `pip install .`")
        for name in FOLDERS:
            self._add(name, stat.S_IFDIR | (0o1777 if name in STICKY else 0o755))
        for name, target in FOLDER_LINKS.items():
            self._link(name, "../" * name.count("/") + target)
        self._link("etc/mtab", "../proc/self/mounts")
        for name, text in TEXTS.items():
            self._add(name, stat.S_IFREG | 0o644, text.encode())
        for name, (mode, major, minor) in DEVICES.items():
            self._add(name, stat.S_IFCHR | mode, rdev=(major, minor))
        self._add("init", stat.S_IFREG | 0o755, INIT)

    def add_agent(self) -> None:
        if not AGENT.is_file():
            raise HostError(f"kvmpy's agent is not built ({AGENT})", "run `make -C guests agent` or `pip install .`")
        self._add("usr/lib/kvmpy/agent", stat.S_IFREG | 0o755, AGENT)

    def add_busybox(self, path: Path) -> None:
        if not path.is_file():
            raise NotFoundError(f"no busybox {path}", BUSYBOX_REMEDY)
        if (loader := programs.loader_of(path)) != "":
            why = "not an x86-64 program" if loader is None else "dynamically linked"
            raise ConfigError(f"busybox {path} is {why}", BUSYBOX_REMEDY)
        self._add("usr/bin/busybox", stat.S_IFREG | 0o755, path)
        for applet in programs.ask(str(path.absolute()), "--list"):
            if applet != "busybox" and "/" not in applet:
                self._link(f"usr/bin/{applet}", "busybox")

    def add_file(self, host: Path, guest: str) -> None:
        """Add a program with its libraries, any other file, or a folder just as it is, links included."""
        if not host.exists():
            raise NotFoundError(f"--file {host}: no such file")
        if host.is_dir():
            self._add_folder(host, guest)
            return
        name = self._place(guest)
        if self._is_folder(name) or guest.endswith("/"):
            raise ConfigError(f"--file {host}:{guest}: is a folder", f"give {guest.rstrip('/')}/{host.name}")
        self._copy(host.resolve(), name)
        for library, source in programs.libraries(host).items():
            self._add(self._place(library), stat.S_IFREG | 0o755, source)

    def add_modules(self, folder: Path, names: Sequence[str]) -> None:
        paths = []
        for file in kernel_modules.closure(folder, names):
            guest = f"/lib/modules/{folder.name}/{kernel_modules.SUFFIX.sub('.ko', str(file))}"
            self._add(self._place(guest), stat.S_IFREG | 0o644, kernel_modules.load(folder / file))
            paths.append(f"{guest}\n")
        self._add("etc/kvmpy/modules", stat.S_IFREG | 0o644, "".join(paths).encode())

    def add_command(self, command: str) -> None:
        """Have init run `command`: by the interpreter it names, by the image's shell, or word by word."""
        if "\0" in command:
            raise ConfigError("--exec: the command has a NUL in it")
        if not command.strip():
            raise ConfigError("--exec: the command is empty", "leave --exec out for a shell on the console")
        if command.startswith("#!"):
            self._add("etc/kvmpy/script", stat.S_IFREG | 0o755, os.fsencode(command))
            words = ["/etc/kvmpy/script"]
        elif len(os.fsencode(command)) >= MAX_STRING:
            raise ConfigError("--exec: the command is longer than 128 KiB", "make it a script that starts with #!")
        elif "usr/bin/sh" in self._entries:
            words = ["sh", "-c", command]
        else:
            words = _split(command)
        self._add("etc/kvmpy/exec", stat.S_IFREG | 0o644, os.fsencode("".join(f"{word}\0" for word in words)))

    def add_volumes(self, volumes: Sequence[tuple[str, str, bool]]) -> None:
        words = [word for tag, guest, ro in volumes for word in (tag, guest, "ro" if ro else "rw")]
        self._add("etc/kvmpy/volumes", stat.S_IFREG | 0o644, os.fsencode("".join(f"{word}\0" for word in words)))

    def _add(self, name: str, mode: int, data: bytes | Path = b"", rdev: tuple[int, int] = (0, 0)) -> None:
        self._entries[name] = Entry(name, mode, data, rdev)

    def _link(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def _add_folder(self, host: Path, guest: str) -> None:
        """Folders that are there already stay what they are, so that a whole root file system can be laid over."""
        for folder, folders, files in os.walk(host, onerror=_refuse):
            inside = f"{guest}/{Path(folder).relative_to(host)}"
            if not self._is_folder(name := self._place(inside)):
                self._add(name, stat.S_IFDIR | 0o755)
            folders.sort()
            links = [entry for entry in folders if Path(folder, entry).is_symlink()]
            for entry in sorted(files + links):
                if not self._is_folder(name := self._place(f"{inside}/{entry}")):
                    self._copy(Path(folder, entry), name)

    def _copy(self, host: Path, name: str) -> None:
        mode = host.lstat().st_mode
        if stat.S_ISLNK(mode):
            self._link(name, os.fspath(host.readlink()))
        elif stat.S_ISREG(mode):
            self._add(name, stat.S_IFREG | mode & 0o777, host)
        else:
            raise ConfigError(f"--file {host}: neither file, folder nor link", "leave it out")

    def _place(self, guest: str) -> str:
        """The name of the absolute path `guest` without links in it; raises ConfigError when there can be none."""
        parts = [part for part in guest.split("/") if part not in ("", ".")]
        if not guest.startswith("/") or ".." in parts:
            raise ConfigError(f"bad path in the guest: {guest!r}", "give an absolute one without '..'")
        name = "/".join(parts)
        for link, folder in FOLDER_LINKS.items():
            if name.startswith(link + "/"):
                name = folder + name[len(link) :]
        for at in [at for at, char in enumerate(name) if char == "/"]:
            parent = self._entries.get(name[:at])
            if parent is not None and not stat.S_ISDIR(parent.mode):
                raise ConfigError(f"bad path in the guest: {guest!r}", f"/{parent.name} is no folder")
        return name

    def _is_folder(self, name: str) -> bool:
        return not name or name in FOLDER_LINKS or (name in self._entries and stat.S_ISDIR(self._entries[name].mode))


def _split(command: str) -> list[str]:
    """The words of a command for an image without a shell; raises ConfigError when only a shell could run it."""
    bare = re.sub(r"""'[^']*'|"[^"$`\\]*"|\\.""", "", command.strip())
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--exec: {error}") from None
    if set(";&|<>()$`*?[\n") & set(bare):
        raise ConfigError("--exec: this command needs a shell", "install busybox-static, or give --busybox PATH")
    return words


def _refuse(error: OSError) -> None:
    """For os.walk, which otherwise leaves out what it cannot read."""
    raise NotFoundError(f"--file {error.filename}: {error.strerror}", "give folders that can be read") from None
