"""What is on a disk when the power fails: all that was flushed, and of the writes since then any.

The disk may have written the others in any order and each in part, down to its blocks, which are whole or not there.
A block that was written several times since the last flush may have any of these contents.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence

from ..core.buffers import ZEROES, pieces, total
from ..core.errors import ConfigError
from ..core.record import Record
from ..host.disk import SECTOR, Image
from .disk import FLUSH, WRITE, DiskFault, Layer
from .plan import Plan

BLOCK = 4096  # bytes that a disk writes wholly or not at all: the physical block that virtio-blk announces
CACHE = 64 << 20  # bytes that a disk keeps unwritten at the most, until it writes them without being asked
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of the writes that have come to the disk: the power may fail early or late


class Write(Record, frozen=True):
    """A change at the byte `offset`: `data`, or `length` zeros where that is None."""

    offset: int
    length: int
    data: bytes | None

    def buffers(self, start: int, stop: int) -> list[memoryview]:
        """The bytes [start, stop) of the disk, which are of this write."""
        if self.data is not None:
            return [memoryview(self.data)[start - self.offset : stop - self.offset]]
        whole, rest = divmod(stop - start, len(ZEROES))
        return [ZEROES] * whole + [ZEROES[:rest]]


class PowerCut(DiskFault, frozen=True):
    """The power fails behind this operation: by default, a write. From then on all requests fail, the machine is
    asked to stop, and the image has what was flushed and a part of what was not, in blocks of so many bytes."""

    on: str = WRITE
    block: int = BLOCK


class WriteLog:
    """All that was written to one disk, and when it was flushed.

    Give it to `inject` with the disk. `len(log)` is how much has happened so far: compare it with the `at` of a cut to
    know whether what the guest was told by then must be there. Memory is used for all that is written.
    """

    def __init__(self) -> None:
        self.entries: list[Write | None] = []  # None: a flush that succeeded
        self.taken = False  # by a disk

    def __len__(self) -> int:
        return len(self.entries)

    def over(self, image: Image) -> Image:
        """`image`, and what happens to it is written here; raises ConfigError for a second one."""
        if self.taken:
            raise ConfigError("a WriteLog of two disks", "give each its own")
        self.taken = True
        return LoggedImage(image, self)

    def cuts(self, base: bytes, count: int, seed: int = 0, block: int = BLOCK) -> Iterator[tuple[int, bytearray]]:
        """`count` images as they may be when the power fails, of a disk that began as `base`: each with the number of
        entries that came before, in rising order. An image is the caller's."""
        numbers = random.Random(f"{seed} cuts")
        flushed = bytearray(base)
        done = 0
        pending: list[Write] = []
        for at in sorted(numbers.randint(0, len(self.entries)) for _ in range(count)):
            for entry in self.entries[done:at]:
                if entry is not None:
                    pending.append(entry)
                    continue
                for write in pending:
                    _apply(flushed, write.offset, write.buffers(write.offset, write.offset + write.length))
                pending = []
            done = at
            image = bytearray(flushed)
            for offset, buffers in survivors(pending, numbers, block):
                _apply(image, offset, buffers)
            yield at, image


def survivors(
    writes: Sequence[Write], numbers: random.Random, block: int = BLOCK
) -> Iterator[tuple[int, list[memoryview]]]:
    """What of these writes has reached the disk, as (offset, data), to be done in this order."""
    share = numbers.choice(SHARES)
    if numbers.random() < 0.5:  # each as a whole
        for write in writes:
            if numbers.random() < share:
                yield write.offset, write.buffers(write.offset, write.offset + write.length)
        return
    parts: dict[int, list[tuple[int, list[memoryview]]]] = {}
    for write in writes:
        start, end = write.offset, write.offset + write.length
        while start < end:
            stop = min(end, (start // block + 1) * block)
            parts.setdefault(start // block, []).append((start, write.buffers(start, stop)))
            start = stop
    for versions in parts.values():
        yield from versions if numbers.random() < share else versions[: numbers.randrange(len(versions))]


def _apply(image: bytearray, offset: int, buffers: Sequence[memoryview]) -> None:
    for buffer in buffers:
        image[offset : offset + len(buffer)] = buffer
        offset += len(buffer)


class LoggedImage(Layer):
    """`image`, with a log of what changes it."""

    def __init__(self, image: Image, log: WriteLog) -> None:
        super().__init__(image)
        self._log = log.entries

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._image.readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        copy = b"".join(buffers)  # what the guest changes meanwhile must not be in one place only
        self._log.append(Write(offset, len(copy), copy))
        self._image.writev(offset, [memoryview(copy)])

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._log.append(Write(offset, length, None))
        self._image.write_zeroes(offset, length, unmap)

    def discard(self, offset: int, length: int) -> None:
        self._log.append(Write(offset, length, None))
        self._image.discard(offset, length)

    def flush(self) -> None:
        self._image.flush()
        self._log.append(None)

    def close(self) -> None:
        self._image.close()


class VolatileImage(Layer):
    """`image` behind a cache that loses what was not flushed when one of the faults of `plan`, PowerCuts, happens;
    `off` is called then."""

    def __init__(self, image: Image, plan: Plan, off: Callable[[], None]) -> None:
        super().__init__(image)
        self._plan = plan
        self._off = off
        self._dead = False
        self._writes: list[Write] = []  # since the last flush
        self._held = 0  # bytes in them

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._check()
        self._image.readv(offset, buffers)
        end = offset + total(buffers)
        for write in self._writes:
            start, stop = max(offset, write.offset), min(end, write.offset + write.length)
            if start < stop:
                _copy(pieces(buffers, start - offset, stop - start), write.buffers(start, stop))

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        data = b"".join(buffers)
        self._write(Write(offset, len(data), data))

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._write(Write(offset, length, None))

    def discard(self, offset: int, length: int) -> None:
        self._write(Write(offset, length, None))

    def flush(self) -> None:
        self._check()
        self._write_out()
        self._image.flush()
        self._cut(FLUSH, 0, 0)

    def close(self) -> None:
        if not self._dead:
            self._write_out()
        self._dead = True
        self._image.close()

    def _write(self, write: Write) -> None:
        self._check()
        self._writes.append(write)
        self._held += write.length if write.data is not None else 0
        self._cut(WRITE, write.offset // SECTOR, write.length // SECTOR)
        if self._held > CACHE:
            self._write_out()

    def _write_out(self) -> None:
        writes, self._writes, self._held = self._writes, [], 0
        for write in writes:
            self._image.writev(write.offset, write.buffers(write.offset, write.offset + write.length))

    def _cut(self, on: str, at: int, size: int) -> None:
        for fault, numbers in self._plan.hits(on, at, size):
            assert isinstance(fault, PowerCut)
            writes, self._writes = self._writes, []
            for offset, buffers in survivors(writes, numbers, fault.block):
                self._image.writev(offset, buffers)
            self._dead = True
            self._off()
            self._check()

    def _check(self) -> None:
        if self._dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO) + ": the power is off")


def _copy(into: Sequence[memoryview], data: Sequence[memoryview]) -> None:
    source = memoryview(b"".join(data)) if len(data) != 1 else data[0]
    for buffer in into:
        buffer[:] = source[: len(buffer)]
        source = source[len(buffer) :]
