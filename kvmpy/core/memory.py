"""Guest-physical RAM: the single door from a guest address to bytes."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable

from .errors import GuestMemoryError, HostError
from .record import Record

MAP_NORESERVE = 0x4000  # asm-generic/mman.h; the mmap module names it only from Python 3.13 on


class Region(Record, frozen=True):
    """RAM that is contiguous in guest-physical space: `buf` is its bytes, at `offset` in the memfd."""

    gpa: int
    buf: memoryview
    offset: int = 0

    @property
    def end(self) -> int:
        return self.gpa + len(self.buf)


class GuestMemory:
    """Consumer side of guest RAM: `window` (zero copy), `read`, `write` and `discard`, all bounds-checked.

    `fd` is the memfd behind all regions (-1 when the memory was made from plain buffers, as tests do).
    """

    def __init__(self, regions: Iterable[Region], fd: int = -1) -> None:
        self.regions = sorted(regions, key=lambda region: region.gpa)
        self.fd = fd
        self._bases = [region.gpa for region in self.regions]
        self._maps: list[mmap.mmap] = []
        for low, high in zip(self.regions, self.regions[1:], strict=False):
            if low.end > high.gpa:
                raise ValueError(f"RAM regions overlap at {high.gpa:#x}")

    @classmethod
    def allocate(cls, ranges: Iterable[tuple[int, int]], *, huge: bool = True) -> GuestMemory:
        """Lazily backed RAM for (guest address, size in bytes) pairs, whole pages; HostError when the host refuses."""
        ranges = list(ranges)
        total = sum(size for _, size in ranges)
        if any(size <= 0 or size % mmap.PAGESIZE for _, size in ranges):
            raise ValueError(f"RAM is given in whole pages, not {ranges}")
        maps: list[mmap.mmap] = []
        regions: list[Region] = []
        fd = -1
        try:
            fd = os.memfd_create("kvmpy-ram", os.MFD_CLOEXEC)
            os.ftruncate(fd, total)
            offset = 0
            for gpa, size in ranges:
                area = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | MAP_NORESERVE, offset=offset)
                maps.append(area)
                if huge:
                    _advise(area, mmap.MADV_HUGEPAGE)
                regions.append(Region(gpa, memoryview(area), offset))
                offset += size
            memory = cls(regions, fd)
        except (OSError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            raise HostError(f"cannot map {total >> 20} MiB of guest RAM: {error}", "give less with --mem") from None
        except ValueError:
            os.close(fd)
            raise
        memory._maps = maps
        return memory

    def window(self, gpa: int, size: int) -> memoryview:
        """The bytes [gpa, gpa+size) themselves; raises GuestMemoryError unless all of them are in one RAM region."""
        index = bisect_right(self._bases, gpa) - 1
        if index >= 0 and size >= 0:
            region = self.regions[index]
            offset = gpa - region.gpa
            if offset + size <= len(region.buf):
                return region.buf[offset : offset + size]
        raise GuestMemoryError(f"guest range [{gpa:#x}, +{size:#x}) is not RAM")

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of [gpa, gpa+size); raises GuestMemoryError."""
        return bytes(self.window(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to [gpa, gpa+len(data)); raises GuestMemoryError."""
        self.window(gpa, len(data))[:] = data

    def address(self, window: memoryview) -> int:
        """The guest address of bytes that `window` returned, one at least; raises ValueError for other memory."""
        at = _host_address(window)
        for region in self.regions:
            offset = at - _host_address(region.buf)
            if 0 <= offset < len(region.buf):
                return region.gpa + offset
        raise ValueError("these bytes are not guest RAM")

    def discard(self, gpa: int, size: int) -> None:
        """Give the whole pages within [gpa, gpa+size) back to the host: they read as zeros, until they are used again.

        Raises GuestMemoryError, and HostError when the host keeps them.
        """
        window = self.window(gpa, size)
        region = self.regions[bisect_right(self._bases, gpa) - 1]
        first = -(-gpa // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (gpa + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size <= 0:
            return
        if not isinstance(window.obj, mmap.mmap):
            window[first - gpa : first - gpa + size] = bytes(size)
            return
        try:
            window.obj.madvise(mmap.MADV_REMOVE, first - region.gpa, size)  # a hole in the memfd, out of every mapping
        except OSError as error:
            raise HostError(
                f"cannot give {size >> 10} KiB of guest RAM back: {error.strerror}", "run kvmpy without locked memory"
            ) from None

    def close(self) -> None:
        """Unmap and close; every window must have been released, or Python refuses with BufferError."""
        for region in self.regions:
            region.buf.release()
        for area in self._maps:
            area.close()
        self.regions, self._bases, self._maps = [], [], []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _host_address(buffer: memoryview) -> int:
    import ctypes  # takes milliseconds to load, and only balloons ask

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _advise(area: mmap.mmap, advice: int) -> None:
    """madvise() that may be refused: huge pages are a hint, and a kernel without them says EINVAL."""
    try:
        area.madvise(advice)
    except OSError:
        return
