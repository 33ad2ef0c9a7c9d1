"""Parts of scattered buffers, without copying."""

from __future__ import annotations

from collections.abc import Sequence

ZEROES = memoryview(bytes(1 << 20))  # a source of zeros, used in pieces


def pieces(buffers: Sequence[memoryview], at: int, size: int) -> list[memoryview]:
    """The parts of `buffers` that hold [at, at+size) of their concatenation, as far as there are so many bytes."""
    found = []
    for buffer in buffers:
        if size <= 0:
            break
        if at < len(buffer):
            piece = buffer[at : at + size]
            found.append(piece)
            size -= len(piece)
        at = max(0, at - len(buffer))
    return found


def behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What `buffers` have behind their first `count` bytes; empty buffers at the front go with these."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


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


def fill_zeroes(buffers: Sequence[memoryview]) -> None:
    """Overwrite all of `buffers` with zeros."""
    for buffer in buffers:
        for at in range(0, len(buffer), len(ZEROES)):
            piece = buffer[at : at + len(ZEROES)]
            piece[:] = ZEROES[: len(piece)]
