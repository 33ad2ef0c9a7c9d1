"""The file behind a disk image: buffers read and written whole, and a sync that stays failed once it has failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ..core.buffers import behind
from .disk import IOV_MAX, open_file

ZEROS = memoryview(bytes(1 << 20))  # a source of zeros, used in pieces


class ImageFile:
    """A regular file or block device, opened and locked once; as it is, a raw image that backs another one.

    Raises as disk.open_file when it cannot be opened. Methods raise OSError.
    """

    def __init__(self, path: Path, *, read_only: bool, unsafe: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._unsafe = unsafe  # sync does nothing
        self._sync_failed = False
        self.fd = open_file(path, read_only)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)  # bytes, when it was opened

    @property
    def identity(self) -> tuple[int, int]:
        """What tells this file from all others of the host, by whatever path it was opened."""
        info = os.fstat(self.fd)
        return info.st_dev, info.st_ino

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` from `offset` on; what lies behind the end of the file reads as zeros."""
        while buffers:
            count = os.preadv(self.fd, buffers[:IOV_MAX], offset)
            if not count:  # the end, or only empty buffers
                fill_zeros(buffers)
                return
            offset += count
            buffers = behind(buffers, count)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; OSError EIO when the file ends before that."""
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"{self.path} ends before {offset + length}")
        return data

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` from `offset` on."""
        while buffers:
            count = os.pwritev(self.fd, buffers[:IOV_MAX], offset)
            offset += count
            buffers = behind(buffers, count)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`."""
        self.writev(offset, [memoryview(data)])

    def sync(self) -> None:
        """Make durable what was written. Once that has failed, the kernel has forgotten what it was: never again."""
        if self._sync_failed:
            raise OSError(errno.EIO, f"{self.path}: an earlier flush has failed")
        if self._unsafe:
            return
        try:
            os.fdatasync(self.fd)
        except OSError:
            self._sync_failed = True
            raise

    def close(self) -> None:
        """Close the descriptor; safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Cursor:
    """Takes the bytes of a list of buffers from its front, as many at a time as wanted."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = buffers
        self._index = 0
        self._at = 0  # in the buffer at _index

    def take(self, length: int) -> list[memoryview]:
        """The next `length` bytes; raises IndexError when there are fewer."""
        taken = []
        while length:
            buffer = self._buffers[self._index]
            piece = buffer[self._at : self._at + length]
            taken.append(piece)
            length -= len(piece)
            self._at += len(piece)
            if self._at == len(buffer):
                self._index += 1
                self._at = 0
        return taken


def total(buffers: Sequence[memoryview]) -> int:
    """How many bytes `buffers` have together."""
    return sum(map(len, buffers))


def fill_zeros(buffers: Sequence[memoryview]) -> None:
    """Overwrite all of `buffers` with zeros."""
    for buffer in buffers:
        for at in range(0, len(buffer), len(ZEROS)):
            piece = buffer[at : at + len(ZEROS)]
            piece[:] = ZEROS[: len(piece)]
