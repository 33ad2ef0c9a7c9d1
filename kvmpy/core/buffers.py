"""Parts of scattered buffers, without copying."""

from __future__ import annotations

from collections.abc import Sequence


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
