"""The standard streams of a command in the guest, as binary files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .process import Process


class Output(io.RawIOBase):
    """stdout or stderr of a command."""

    def __init__(self, process: Process, stream: int) -> None:
        self._process, self._stream = process, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._process.read_into(self._stream, memoryview(buffer).cast("B"))


class Input(io.RawIOBase):
    """stdin of a command; closing it is its end."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._process.write_input(memoryview(data).cast("B"))

    def close(self) -> None:
        if not self.closed:
            self._process.end_input()
        super().close()
