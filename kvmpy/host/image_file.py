"""The file behind a qcow2 image, or behind another image: a raw one of any length, which grows as it is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ..core.buffers import fill_zeroes
from .disk import Raw, open_file


class ImageFile(Raw):
    """A regular file or block device, opened and locked once; what lies behind its end reads as zeros.

    Raises as disk.open_file when it cannot be opened. Methods raise OSError.
    """

    def __init__(self, path: Path, *, read_only: bool, unsafe: bool = False) -> None:
        super().__init__(open_file(path, read_only), read_only=read_only, cache="unsafe" if unsafe else "writeback")
        self.path = path
        self.size = self.measure()  # bytes, when it was opened

    @property
    def identity(self) -> tuple[int, int]:
        """What tells this file from all others of the host, by whatever path it was opened."""
        info = os.fstat(self._fd)
        return info.st_dev, info.st_ino

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; OSError EIO when the file ends before that."""
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"{self.path} ends before {offset + length}")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`."""
        self.writev(offset, [memoryview(data)])

    def at_end(self, buffers: Sequence[memoryview]) -> None:
        fill_zeroes(buffers)
