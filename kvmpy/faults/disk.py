"""A disk image on which operations fail, are torn, take their time, or are not done at all."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from random import Random

from ..core.buffers import pieces, total
from ..host.disk import SECTOR, Image
from .plan import Fault, Plan

READ, WRITE, FLUSH, DISCARD, ZERO = "read", "write", "flush", "discard", "zero"
OPERATIONS = (READ, WRITE, FLUSH, DISCARD, ZERO)


class DiskFault(Fault, frozen=True):
    """A fault of a disk: of operations that touch one of `sectors` (of 512 bytes), or of any. A flush touches none."""

    sectors: range | None = None

    def covers(self, on: str, at: int, size: int) -> bool:
        here = self.sectors is None or (size > 0 and at < self.sectors.stop and self.sectors.start < at + size)
        return here and super().covers(on, at, size)


class Fail(DiskFault, frozen=True):
    """Nothing happens, but an error. A flush that has failed once fails ever after, as those of images do."""

    error: int = errno.EIO


class Short(DiskFault, frozen=True):
    """A read or write ends early: the first sectors are done, at least none and not all. `error` 0: nobody is told."""

    error: int = errno.EIO


class Torn(DiskFault, frozen=True):
    """Of a read or write, sectors here and there are done, and not all. `error` 0: nobody is told."""

    error: int = errno.EIO


class Ignore(DiskFault, frozen=True):
    """Nothing is done, and success reported: disks that lie about a flush are such, and those that lose writes."""


class Delay(DiskFault, frozen=True):
    """The operation takes so much longer, and with it all that the disk has yet to do."""

    seconds: float = 0.1


class Layer:
    """An image in front of `image`. Its bytes are not to be had without it, so no twin in C goes round it."""

    fd = -1

    def __init__(self, image: Image) -> None:
        self._image = image

    @property
    def size(self) -> int:
        return self._image.size

    @property
    def read_only(self) -> bool:
        return self._image.read_only


class FaultyImage(Layer):
    """`image` with the faults of `plan`."""

    def __init__(self, image: Image, plan: Plan) -> None:
        super().__init__(image)
        self._plan = plan
        self._flush_failed = 0

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for at, length in self._parts(READ, offset, total(buffers)):
            self._image.readv(at, pieces(buffers, at - offset, length))
        self._raise()

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for at, length in self._parts(WRITE, offset, total(buffers)):
            self._image.writev(at, pieces(buffers, at - offset, length))
        self._raise()

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for at, size in self._parts(ZERO, offset, length):
            self._image.write_zeroes(at, size, unmap)
        self._raise()

    def discard(self, offset: int, length: int) -> None:
        for at, size in self._parts(DISCARD, offset, length):
            self._image.discard(at, size)
        self._raise()

    def flush(self) -> None:
        if self._flush_failed:
            raise OSError(self._flush_failed, os.strerror(self._flush_failed))
        try:
            for _ in self._parts(FLUSH, 0, 0):
                self._image.flush()
            self._raise()
        except OSError as error:
            self._flush_failed = error.errno or errno.EIO
            raise

    def close(self) -> None:
        self._image.close()

    def _parts(self, on: str, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) of what is really done; `_raise` says afterwards what the guest hears of the rest.

        The first fault that takes something away is the one that counts; delays add up."""
        self._error = 0
        done = [(offset, length)]
        count, first = length // SECTOR, offset // SECTOR
        for fault, numbers in self._plan.hits(on, first, count):
            if isinstance(fault, Delay):
                time.sleep(fault.seconds)
            elif done == [(offset, length)]:
                self._error = getattr(fault, "error", 0)
                done = [(SECTOR * (first + at), SECTOR * size) for at, size in _kept(fault, count, numbers)]
        return done

    def _raise(self) -> None:
        if self._error:
            raise OSError(self._error, os.strerror(self._error))


def _kept(fault: Fault, count: int, numbers: Random) -> list[tuple[int, int]]:
    """(first, count) of the sectors that a fault leaves, out of `count`."""
    if not count or not isinstance(fault, Short | Torn):
        return []
    if isinstance(fault, Short):
        return [(0, size)] if (size := numbers.randrange(count)) else []
    missing = numbers.randrange(count)
    return [(at, 1) for at in range(count) if at != missing and numbers.random() < 0.5]
