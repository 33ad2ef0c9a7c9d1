"""Guest addresses reach RAM, all of the access or nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy.core.errors import GuestMemoryError, HostError
from kvmpy.core.memory import GuestMemory, Region

PAGE = mmap.PAGESIZE
LOW, HIGH = 0x1000, 1 << 32


@pytest.fixture
def mem() -> GuestMemory:
    """16 bytes at LOW and 32 at HIGH, given in the wrong order."""
    return GuestMemory([Region(HIGH, memoryview(bytearray(32))), Region(LOW, memoryview(bytearray(16)))])


def test_write_and_read(mem: GuestMemory) -> None:
    mem.write(LOW + 3, b"abc")
    mem.write(HIGH + 29, memoryview(b"xyz"))

    assert mem.read(LOW, 16) == b"\0\0\0abc" + bytes(10)
    assert mem.read(HIGH + 28, 4) == b"\0xyz"


def test_read_is_a_copy_and_window_is_not(mem: GuestMemory) -> None:
    copy, window = mem.read(LOW, 4), mem.window(LOW, 4)

    mem.write(LOW, b"new!")

    assert copy == bytes(4)
    assert window == b"new!"


def test_a_window_writes_through(mem: GuestMemory) -> None:
    mem.window(HIGH, 4)[:] = b"abcd"

    assert mem.read(HIGH, 4) == b"abcd"


OUTSIDE = [
    (0, 1),
    (LOW - 1, 1),
    (LOW - 1, 2),
    (LOW, 17),
    (LOW + 15, 2),
    (LOW + 16, 1),
    (LOW, HIGH - LOW + 1),
    (HIGH + 32, 1),
    (HIGH, 1 << 64),
    ((1 << 64) - 4, 8),
    (-1, 1),
    (-LOW, 1),
    (LOW, -1),
    (LOW + 8, -8),
    (LOW + 17, 0),
]


@pytest.mark.parametrize(("gpa", "size"), OUTSIDE)
def test_window_refuses_what_is_not_ram(mem: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(GuestMemoryError, match=f"{gpa:#x}"):
        mem.window(gpa, size)


@pytest.mark.parametrize("gpa", [LOW - 1, LOW + 14, LOW + 16, HIGH + 30, -3])
def test_write_outside_changes_nothing(mem: GuestMemory, gpa: int) -> None:
    with pytest.raises(GuestMemoryError):
        mem.write(gpa, b"abc")

    assert mem.read(LOW, 16) == bytes(16)
    assert mem.read(HIGH, 32) == bytes(32)


def test_nothing_at_the_end_of_ram_is_still_ram(mem: GuestMemory) -> None:
    assert mem.read(LOW + 16, 0) == b""


def test_without_regions_everything_is_refused() -> None:
    with pytest.raises(GuestMemoryError):
        GuestMemory([]).read(0, 1)


def test_overlapping_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap at 0x1f"):
        GuestMemory([Region(0x1F, memoryview(bytearray(4))), Region(0, memoryview(bytearray(32)))])


def test_touching_regions_are_fine_and_no_window_spans_them() -> None:
    mem = GuestMemory([Region(0, memoryview(bytearray(16))), Region(16, memoryview(bytearray(16)))])

    with pytest.raises(GuestMemoryError):
        mem.window(8, 16)


# What the host gives.


def test_allocated_memory_is_aligned_for_huge_pages() -> None:
    mem = GuestMemory.allocate([(0, 4 << 20), (HIGH + (1 << 20), 4 << 20)])
    at = [ctypes.addressof(ctypes.c_char.from_buffer(region.buf)) for region in mem.regions]
    mem.write(0, b"low")
    mem.write(HIGH + (5 << 20) - 4, b"high")

    ends = [mem.read(0, 4), mem.read(HIGH + (5 << 20) - 4, 4)]
    mem.close()

    assert [address % (2 << 20) for address in at] == [0, 1 << 20]
    assert ends == [b"low\0", b"high"]


def test_allocated_memory_is_asked_for_where_it_is() -> None:
    asked = []

    def address_of(area: mmap.mmap) -> int:
        asked.append(len(area))
        return PAGE

    mem = GuestMemory.allocate([(0, PAGE)], address_of=address_of)
    (region,) = mem.regions
    mem.close()

    assert asked == [PAGE + (2 << 20)]
    assert region.offset == (2 << 20) - PAGE


def test_allocated_memory_is_lazy() -> None:
    mem = GuestMemory.allocate([(0, 1 << 36)])

    before = mem.resident()
    mem.write((1 << 36) - 4, b"last")
    given = mem.resident()
    last = mem.read((1 << 36) - 4, 4)
    mem.close()

    assert last == b"last"
    assert before == 0
    assert 0 < given <= 2 << 20  # a huge page at most


def test_children_do_not_have_it() -> None:
    mem = GuestMemory.allocate([(0, PAGE)])
    mem.write(0, b"secret")
    at = ctypes.addressof(ctypes.c_char.from_buffer(mem.regions[0].buf))

    child = os.fork()
    if child == 0:
        maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        os._exit(any(int(begin, 16) <= at < int(end, 16) for begin, end in maps))
    _, status = os.waitpid(child, 0)
    mem.close()

    assert status == 0


def test_close_is_idempotent() -> None:
    mem = GuestMemory.allocate([(0, PAGE)])

    mem.close()
    mem.close()

    with pytest.raises(GuestMemoryError):
        mem.read(0, 1)


def test_close_waits_for_windows() -> None:
    mem = GuestMemory.allocate([(0, PAGE)])
    window = mem.window(0, 16)

    with pytest.raises(BufferError):
        mem.close()

    window.release()
    mem.close()
    assert mem.regions == []


@pytest.mark.parametrize("ranges", [[(0, 0)], [(0, PAGE), (HIGH, 0)], [(0, -PAGE)], [(0, PAGE + 1)], [(0, 100)]])
def test_allocate_takes_whole_pages_only(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        GuestMemory.allocate(ranges)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, 1 << 70])
def test_more_than_the_host_can_map_is_one_clear_line(size: int) -> None:
    with pytest.raises(HostError, match=r"cannot map .* MiB of guest RAM: .*; give less with --mem"):
        GuestMemory.allocate([(0, size)])


def test_layout_with_an_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory.allocate([(0, 2 * PAGE), (PAGE, PAGE)])


# What is given back.


def test_address_of_a_window(mem: GuestMemory) -> None:
    assert mem.address(mem.window(HIGH + 5, 3)) == HIGH + 5
    assert [mem.address(mem.window(base, 1)) for base in (LOW, HIGH)] == [LOW, HIGH]
    with pytest.raises(ValueError, match="not guest RAM"):
        mem.address(memoryview(bytearray(4)))


def test_the_byte_behind_a_region_has_no_address() -> None:
    backing = memoryview(bytearray(32))
    mem = GuestMemory([Region(LOW, backing[:16])])

    assert mem.address(backing[15:]) == LOW + 15
    with pytest.raises(ValueError, match="not guest RAM"):
        mem.address(backing[16:])


@pytest.mark.parametrize("huge", [False, True])
def test_discarded_pages_leave_the_host(huge: bool) -> None:
    mem = GuestMemory.allocate([(0, 4 * PAGE), (HIGH, 64 * PAGE)], huge=huge)
    mem.write(0, b"low" * PAGE)
    mem.write(HIGH, b"x" * 64 * PAGE)
    before = mem.resident()

    mem.discard(HIGH + PAGE, 62 * PAGE)
    after = mem.resident()
    kept = [mem.read(0, 3), mem.read(HIGH + PAGE - 1, 2), mem.read(HIGH + 63 * PAGE - 1, 2)]
    mem.write(HIGH + PAGE, b"used again")
    again = mem.read(HIGH + PAGE, 11)
    mem.close()

    assert before - after == 62 * PAGE
    assert kept == [b"low", b"x\0", b"\0x"]
    assert again == b"used again\0"


@pytest.mark.parametrize(
    ("gpa", "size", "gone"),
    [(0, PAGE, 1), (1, 2 * PAGE, 1), (1, 2 * PAGE - 2, 0), (PAGE - 1, PAGE + 2, 1), (0, 0, 0), (1, 8, 0)],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: GuestMemory.allocate([(0, 3 * PAGE)]),
        lambda: GuestMemory([Region(0, memoryview(bytearray(3 * PAGE)))]),
    ],
    ids=["memfd", "plain"],
)
def test_discard_takes_whole_pages_only(gpa: int, size: int, gone: int, make: Callable[[], GuestMemory]) -> None:
    mem = make()
    mem.write(0, b"x" * 3 * PAGE)

    mem.discard(gpa, size)
    zeros = mem.read(0, 3 * PAGE).count(0)
    mem.close()

    assert zeros == gone * PAGE


@pytest.mark.parametrize(("gpa", "size"), OUTSIDE)
def test_discard_refuses_what_is_not_ram(mem: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(GuestMemoryError):
        mem.discard(gpa, size)


def test_discard_the_host_refuses_is_one_clear_line() -> None:
    mem = GuestMemory.allocate([(0, PAGE)], huge=False)
    at = ctypes.addressof(ctypes.c_char.from_buffer(mem.regions[0].buf))
    assert ctypes.CDLL(None).mlock(ctypes.c_void_p(at), ctypes.c_size_t(PAGE)) == 0

    with pytest.raises(HostError, match=r"cannot give 4 KiB of guest RAM back: .*; run"):
        mem.discard(0, PAGE)

    mem.close()
