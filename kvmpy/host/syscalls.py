"""System calls of Linux that Python's os module does not have; each raises OSError.

ctypes takes milliseconds to load, so the functions are looked up by `load`, or when the first of them is used.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from typing import Any

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
DIRENT64 = struct.Struct("<QqHB")  # d_ino, d_off, d_reclen, d_type; then the name and a NUL
DIRECTORY_BUFFER = 1 << 15  # bytes that getdents asks for


@functools.cache
def load() -> Any:
    """The C library."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.getdents64.restype = ctypes.c_ssize_t
    libc.syncfs.argtypes = [ctypes.c_int]
    return libc


def _call(name: str, *arguments: Any) -> int:
    import ctypes

    call = getattr(load(), name)
    while True:
        result: int = call(*arguments)
        if result >= 0:
            return result
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    _call("renameat2", old_dir, old, new_dir, new, flags)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """os has only posix_fallocate, which makes no holes."""
    _call("fallocate64", fd, mode, offset, length)


def syncfs(fd: int) -> None:
    _call("syncfs", fd)


def getdents(fd: int) -> list[tuple[int, int, int, bytes]]:
    """The next entries of a folder (getdents64(2)), the last one first; none at its end.

    Each is inode number, offset behind it, type as in d_type, and name."""
    import ctypes

    buffer = ctypes.create_string_buffer(DIRECTORY_BUFFER)
    length = _call("getdents64", fd, buffer, DIRECTORY_BUFFER)
    data = buffer.raw[:length]
    found = []
    at = 0
    while at < length:
        ino, offset, size, kind = DIRENT64.unpack_from(data, at)
        name = data[at + DIRENT64.size : at + size]
        found.append((ino, offset, kind, name[: name.index(0)]))
        at += size
    found.reverse()
    return found
