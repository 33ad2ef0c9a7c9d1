"""Guest-physical RAM: the single door from a guest address to bytes."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable

from .errors import GuestMemoryError, HostError
from .record import Record

MAP_NORESERVE = 0x4000  # asm-generic/mman.h; the mmap module names it only from Python 3.13 on
HUGE_PAGE = 2 << 20  # bytes
LOOK = 1 << 18  # pages that are asked for at once


class Region(Record, frozen=True):
    """RAM that is contiguous in guest-physical space: `buf` is its bytes, at `offset` in their mapping."""

    gpa: int
    buf: memoryview
    offset: int = 0

    @property
    def end(self) -> int:
        return self.gpa + len(self.buf)


class GuestMemory:
    """Consumer side of guest RAM: `window` (zero copy), `read`, `write` and `discard`, all bounds-checked."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.gpa)
        self._bases = [region.gpa for region in self.regions]
        self._maps: list[mmap.mmap] = []
        for low, high in zip(self.regions, self.regions[1:], strict=False):
            if low.end > high.gpa:
                raise ValueError(f"RAM regions overlap at {high.gpa:#x}")

    @classmethod
    def allocate(
        cls,
        ranges: Iterable[tuple[int, int]],
        *,
        huge: bool = True,
        address_of: Callable[[mmap.mmap], int] | None = None,
    ) -> GuestMemory:
        """Lazily backed RAM for (guest address, size in bytes) pairs, whole pages; HostError when the host refuses.

        Children of this process do not have it. With `huge` it is aligned for huge pages, by `address_of`, which tells
        where a mapping is (ctypes, which can too, takes milliseconds to load).
        """
        ranges = list(ranges)
        if any(size <= 0 or size % mmap.PAGESIZE for _, size in ranges):
            raise ValueError(f"RAM is given in whole pages, not {ranges}")
        maps: list[mmap.mmap] = []
        regions: list[Region] = []
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            for gpa, size in ranges:
                area = mmap.mmap(-1, size + HUGE_PAGE * huge, flags=flags)
                maps.append(area)
                area.madvise(mmap.MADV_DONTFORK)
                offset = 0
                if huge:
                    _advise(area, mmap.MADV_HUGEPAGE)
                    offset = (gpa - (address_of or _host_address)(area)) % HUGE_PAGE
                regions.append(Region(gpa, memoryview(area)[offset : offset + size], offset))
            memory = cls(regions)
        except (OSError, OverflowError) as error:
            total = sum(size for _, size in ranges)
            raise HostError(f"cannot map {total >> 20} MiB of guest RAM: {error}", "give less with --mem") from None
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
            window.obj.madvise(mmap.MADV_DONTNEED, first - region.gpa + region.offset, size)
        except OSError as error:
            raise HostError(
                f"cannot give {size >> 10} KiB of guest RAM back: {error.strerror}", "run kvmpy without locked memory"
            ) from None

    def resident(self) -> int:
        """Bytes that the host has really given, as far as it has not swapped them out."""
        import ctypes

        mincore = ctypes.CDLL(None, use_errno=True).mincore
        pages = 0
        states = (ctypes.c_ubyte * LOOK)()
        for region in self.regions:
            size, at = len(region.buf), _host_address(region.buf)
            for begin in range(0, size, LOOK * mmap.PAGESIZE):
                length = min(size - begin, LOOK * mmap.PAGESIZE)
                if mincore(ctypes.c_void_p(at + begin), ctypes.c_size_t(length), states):
                    raise HostError(f"cannot look at guest RAM: {os.strerror(ctypes.get_errno())}")
                pages += bytes(states)[: length // mmap.PAGESIZE].count(1)
        return pages * mmap.PAGESIZE

    def close(self) -> None:
        """Unmap it; every window must have been released, or Python refuses with BufferError."""
        for region in self.regions:
            region.buf.release()
        for area in self._maps:
            area.close()
        self.regions, self._bases, self._maps = [], [], []


def _host_address(buffer: memoryview | mmap.mmap) -> int:
    import ctypes  # takes milliseconds to load

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _advise(area: mmap.mmap, advice: int) -> None:
    """madvise() that may be refused: huge pages are a hint, and a kernel without them says EINVAL."""
    try:
        area.madvise(advice)
    except OSError:
        return
