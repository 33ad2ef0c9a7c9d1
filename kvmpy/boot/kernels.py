"""Finds a kernel on this host, with its modules, for users who name none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..core.errors import NotFoundError
from . import cache as user_cache
from .params import HDRS, HEADER_MAX, SetupHeader

HOST_PATTERNS = ("boot/vmlinuz*", "lib/modules/*/vmlinuz", "usr/lib/modules/*/vmlinuz")  # the last: Fedora, Arch
CACHE_PATTERN = "*/boot/vmlinuz-*"  # in the cache's folder "kernels", which scripts/fetch-kernel fills
FETCH = "run `scripts/fetch-kernel cloud`"
VERSION_MAX = 256
HEAD = 0x200 + 0xFFFF + VERSION_MAX  # wherever kernel_version points, the string is within this many bytes


def find_kernel(root: Path = Path("/")) -> Path:
    """The newest bzImage of the host that this user can read, else the newest cached one, cloud kernels first.

    Raises NotFoundError, whose remedy tells how to get one.
    """
    found: list[tuple[str, Path]] = []
    refused: list[Path] = []
    for pattern in HOST_PATTERNS:
        for path in _matching(root, pattern):
            if version := kernel_version(path):
                found.append((version, path))
            elif os.access(path, os.F_OK) and not os.access(path, os.R_OK):
                refused.append(path)
    if found:
        return max(found, key=lambda item: _sort_key(item[0]))[1]
    cached = [(version, path) for path in _matching(_cache(), CACHE_PATTERN) if (version := kernel_version(path))]
    if cached:
        return max(cached, key=lambda item: ("cloud" in item[0], _sort_key(item[0])))[1]
    if refused:
        raise NotFoundError(
            f"no kernel that you may read: {refused[-1]} is for root only",
            f"{FETCH}, or `sudo install -m 644 {refused[-1]} ~/vmlinuz` and give --kernel ~/vmlinuz",
        )
    raise NotFoundError("no kernel on this host", f"{FETCH}, or give one with --kernel")


def modules_dir_for(kernel: str | Path, root: Path = Path("/")) -> Path | None:
    """The first of `modules_dirs` that is there; None without one."""
    return next((path for path in modules_dirs(kernel, root) if path.is_dir()), None)


def modules_dirs(kernel: str | Path, root: Path = Path("/")) -> list[Path]:
    """Where the modules folder of `kernel` may be: beside it, in the tree it was unpacked in, or the host's."""
    kernel = Path(kernel)
    version = kernel_version(kernel)
    if not version:
        return []
    kernel = kernel.resolve()
    candidates = [kernel.parent.parent / "lib" / "modules" / version, root / "lib" / "modules" / version]
    if kernel.parent.name == version:
        candidates.insert(0, kernel.parent)
    return list(dict.fromkeys(candidates))


def kernel_version(path: Path) -> str | None:
    """The release (`uname -r`) of a bzImage, from its header; None for anything else or what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if len(head) < HEADER_MAX or (header := SetupHeader(head)).header != HDRS or not header.kernel_version:
        return None
    text = head[0x200 + header.kernel_version :][:VERSION_MAX].partition(b"\0")[0]
    match = re.match(rb"[0-9][\w.+~-]*", text)
    return match[0].decode("ascii") if match else None


def _matching(folder: Path, pattern: str) -> list[Path]:
    """What matches `pattern` in `folder`; nothing where this user may not search."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _cache() -> Path:
    try:
        return user_cache.folder().with_name("kernels")
    except RuntimeError:  # no home directory
        return Path("/nonexistent")


def _sort_key(version: str) -> tuple[list[int], bool, list[int]]:
    """6.1.9 < 6.1.10-rc1 < 6.1.10 < 6.1.10-2."""
    numbers, _, rest = version.partition("-")
    return _numbers(numbers), not rest.startswith("rc"), _numbers(rest)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text, re.ASCII)]
