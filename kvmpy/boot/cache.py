"""Keeps decompressed kernels in the user's cache folder, by the hash of what they were decompressed from.

Cached files are checked when they are read, so a damaged one is made anew; a folder that cannot be written to costs
time, nothing else. A file is a 64-byte record (magic, length, SHA-256 of the content), then the content.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

KEEP = 8  # files; a kernel takes some 60 MB
RECORD = struct.Struct("<16sQ32s8x")
MAGIC = b"kvmpy payload 1\n"


def folder() -> Path:
    """Where the cached files are (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"  # relative ones are to be ignored
    return root / "kvmpy" / "payloads"


def recall(source: memoryview, make: Callable[[], bytes]) -> bytes:
    """What `make()` made of `source` the last time, or makes now."""
    try:
        path = folder() / _sha256(source).hex()
    except RuntimeError:  # no home directory
        return make()
    content = _read(path)
    if content is None:
        content = make()
        _write(path, content)
    return content


def _read(path: Path) -> bytes | None:
    """The content of a cached file that is whole."""
    try:
        with open(path, "rb") as file:
            record = file.read(RECORD.size)
            if len(record) < RECORD.size:
                return None
            magic, length, digest = RECORD.unpack(record)
            if magic != MAGIC or os.fstat(file.fileno()).st_size != RECORD.size + length:
                return None
            content = file.read()
    except OSError:
        return None
    return content if _sha256(content) == digest else None


def _write(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, all of it or not at all; does nothing where that is not possible."""
    import tempfile  # with all that it imports 6 ms, and rarely needed

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(RECORD.pack(MAGIC, len(content), _sha256(content)))
            file.write(content)
        temporary.replace(path)
        _prune(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _prune(where: Path) -> None:
    """Remove all but the newest files: those of other kernels, and what a killed process left."""
    newest = sorted(where.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest[KEEP:]:
        path.unlink(missing_ok=True)


def _sha256(data: bytes | memoryview) -> bytes:
    import hashlib  # loads OpenSSL, which a kernel that is not compressed does without

    return hashlib.sha256(data).digest()
