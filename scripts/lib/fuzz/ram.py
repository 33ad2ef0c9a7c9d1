"""Guest RAM between pages that nobody can touch: an access that leaves it ends the process."""

from __future__ import annotations

import ctypes
import mmap
import random

from kvmpy.core.errors import GuestMemoryError
from kvmpy.core.memory import GuestMemory, Region

PAGE = mmap.PAGESIZE
RANGES = ((0, 0x1A000), (0x100000, 0x4000))  # guest address, bytes: a hole between the two
RINGS, DATA = 0x1000, 0x6000  # what lies where, below the hole
PROT_NONE = 0
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x02, 0x20, 0x100000  # <asm-generic/mman-common.h>

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

Poke = tuple[int, bytes]


class RacingMemory(GuestMemory):
    """Guest memory that another CPU changes in the middle of the device's work: see `race`."""

    _moment = 0
    _pokes: list[Poke] = []
    raced = False  # some of it has happened

    def race(self, moment: int, pokes: list[Poke]) -> None:
        """When the device looks at RAM for the `moment`th time from now on, write all of `pokes` first."""
        self._moment, self._pokes = moment, pokes

    def window(self, gpa: int, size: int) -> memoryview:
        if self._moment:
            self._moment -= 1
            if not self._moment:
                self.raced = True
                for address, data in self._pokes:
                    self.poke(address, data)
        return super().window(gpa, size)

    def poke(self, address: int, data: bytes) -> None:
        """What a guest's store does: nothing where there is no RAM."""
        try:
            super().window(address, len(data))[:] = data
        except GuestMemoryError:
            return


class Ram:
    """The mappings, used by one case after the other. The pages in front of and behind each are not accessible."""

    def __init__(self) -> None:
        self._areas = [_guarded(size) for _, size in RANGES]
        source = random.Random(0)
        self._pattern = [source.randbytes(size) for _, size in RANGES]

    def fresh(self) -> RacingMemory:
        """All of it, filled with what it is always filled with at first."""
        regions = []
        for (gpa, size), area, pattern in zip(RANGES, self._areas, self._pattern, strict=True):
            buf = memoryview(area)[:size]
            buf[:] = pattern
            regions.append(Region(gpa, buf))
        return RacingMemory(regions)


def _guarded(size: int) -> mmap.mmap:
    refused = []
    while True:
        area = mmap.mmap(-1, size + PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        if libc.mmap(start - PAGE, PAGE, PROT_NONE, flags, -1, 0) == start - PAGE:
            break
        refused.append(area)  # something lies in front of it: keep the place, and try another one
    if libc.mprotect(start + size, PAGE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    return area
