"""Addresses reach the device that owns them, and only whole accesses do."""

from __future__ import annotations

import threading

import pytest

from kvmpy.core.bus import MAX_RESOLVED, Bus


class Recorder:
    """Answers reads with `value`, and remembers every access and whether its lock was held."""

    def __init__(self, value: int = 0) -> None:
        self.lock = threading.Lock()
        self.value = value
        self.reads: list[tuple[int, int, bool]] = []
        self.writes: list[tuple[int, int, int, bool]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size, self.lock.locked()))
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value, self.lock.locked()))


@pytest.fixture
def bus() -> Bus:
    return Bus("port")


def test_access_has_the_offset_and_the_lock(bus: Bus) -> None:
    device = Recorder(0x12)
    bus.add(0x3F8, 8, device)

    value = bus.read(0x3FD, 1)
    bus.write(0x3FA, 2, 0xBEEF)

    assert value == 0x12
    assert device.reads == [(5, 1, True)]
    assert device.writes == [(2, 2, 0xBEEF, True)]
    assert not device.lock.locked()


@pytest.mark.parametrize(("size", "seen"), [(1, 0x88), (2, 0x7788), (4, 0x55667788), (8, 0x1122334455667788)])
def test_values_are_cut_to_the_size(bus: Bus, size: int, seen: int) -> None:
    device = Recorder(0x1122334455667788)
    bus.add(0, 8, device)

    bus.write(0, size, 0x1122334455667788)

    assert bus.read(0, size) == seen
    assert device.writes[0][2] == seen


@pytest.mark.parametrize(("size", "floating"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF), (8, (1 << 64) - 1)])
def test_unmapped_reads_float_high(bus: Bus, size: int, floating: int) -> None:
    assert bus.read(0x1234, size) == floating


def test_unmapped_is_told_of_reads_and_writes() -> None:
    told: list[tuple[int, int, int | None]] = []
    bus = Bus("port", lambda address, size, value: told.append((address, size, value)))

    bus.read(0x1234, 2)
    bus.write(0x1234, 1, 0x56)

    assert told == [(0x1234, 2, None), (0x1234, 1, 0x56)]


@pytest.mark.parametrize(("address", "size"), [(0xFF, 1), (0xFF, 2), (0x108, 1), (0x107, 2), (0x104, 8)])
def test_access_outside_or_across_an_end_is_unmapped(bus: Bus, address: int, size: int) -> None:
    device = Recorder()
    bus.add(0x100, 8, device)

    bus.write(address, size, 0)

    assert bus.read(address, size) == (1 << 8 * size) - 1
    assert (device.reads, device.writes) == ([], [])


def test_pci_configuration_address_does_not_reach_the_reset_register(bus: Bus) -> None:
    reset = Recorder()
    bus.add(0xCF9, 1, reset)

    bus.write(0xCF8, 4, 0x80000600)

    assert reset.writes == []


def test_access_across_two_devices_reaches_neither(bus: Bus) -> None:
    low, high = Recorder(), Recorder()
    bus.add(0x100, 4, low)
    bus.add(0x104, 4, high)

    bus.write(0x102, 4, 0)

    assert (low.writes, high.writes) == ([], [])


def test_neighbours_are_told_apart_whatever_the_order_they_came_in(bus: Bus) -> None:
    devices = [Recorder(n) for n in range(8)]
    for n in (3, 0, 7, 1, 6, 2, 5, 4):
        bus.add(0x100 + n, 1, devices[n])

    assert [bus.read(0x100 + n, 1) for n in range(8)] == list(range(8))


@pytest.mark.parametrize(("base", "size"), [(0x100, 8), (0xFF, 2), (0x107, 1), (0xF0, 0x100), (0x102, 2)])
def test_overlap_is_refused_with_both_names(bus: Bus, base: int, size: int) -> None:
    bus.add(0x100, 8, Recorder())

    with pytest.raises(ValueError, match=r"port: Recorder at .* overlaps Recorder at 0x100\+0x8"):
        bus.add(base, size, Recorder())


@pytest.mark.parametrize(("base", "size"), [(0, 0), (0x100, -1), (-1, 1)])
def test_a_range_without_an_address_is_refused(bus: Bus, base: int, size: int) -> None:
    with pytest.raises(ValueError, match="port: Recorder at"):
        bus.add(base, size, Recorder())


def test_a_device_added_later_is_found_where_nothing_was(bus: Bus) -> None:
    first = bus.read(0x200, 1)

    bus.add(0x200, 1, Recorder(7))

    assert (first, bus.read(0x200, 1)) == (0xFF, 7)


def test_a_device_that_was_removed_is_not_found_any_more(bus: Bus) -> None:
    gone, stays = Recorder(7), Recorder(8)
    bus.add(0x200, 1, gone)
    bus.add(0x201, 1, stays)
    before = bus.read(0x200, 1), bus.read(0x201, 1)

    bus.remove(0x200)

    assert before == (7, 8)
    assert (bus.read(0x200, 1), bus.read(0x201, 1)) == (0xFF, 8)


def test_the_place_of_a_removed_device_is_free(bus: Bus) -> None:
    bus.add(0x200, 8, Recorder(7))
    bus.read(0x200, 1)
    bus.remove(0x200)

    bus.add(0x200, 8, Recorder(9))

    assert bus.read(0x200, 1) == 9


def test_removing_what_is_not_there_is_refused(bus: Bus) -> None:
    bus.add(0x200, 8, Recorder())

    with pytest.raises(ValueError, match="port: nothing begins at 0x201"):
        bus.remove(0x201)


def test_a_look_up_under_way_does_not_bring_a_removed_device_back(bus: Bus) -> None:
    """The device goes away between the look-up and the note of what it found."""

    class Leaving:
        @property
        def lock(self) -> threading.Lock:
            bus.remove(0x300)
            return threading.Lock()

        def read(self, offset: int, size: int) -> int:
            return 5

        def write(self, offset: int, size: int, value: int) -> None:
            raise AssertionError

    bus.add(0x300, 1, Leaving())
    first = bus.read(0x300, 1)

    assert (first, bus.read(0x300, 1)) == (5, 0xFF)


def test_same_address_different_sizes_are_different_accesses(bus: Bus) -> None:
    device = Recorder()
    bus.add(0, 16, device)

    for size in (1, 2, 4, 8):
        bus.read(1, size)

    assert [(offset, size) for offset, size, _ in device.reads] == [(1, 1), (1, 2), (1, 4), (1, 8)]


def test_a_guest_that_touches_everything_does_not_grow_the_memo_without_end(bus: Bus) -> None:
    bus.add(0, MAX_RESOLVED * 2, Recorder(3))

    values = {bus.read(address, 1) for address in range(MAX_RESOLVED + 100)}

    assert values == {3}
    assert len(bus.slots) == MAX_RESOLVED


def test_the_lock_is_released_when_a_device_raises(bus: Bus) -> None:
    class Broken(Recorder):
        def read(self, offset: int, size: int) -> int:
            raise RuntimeError("bug")

    device = Broken()
    bus.add(0, 1, device)

    with pytest.raises(RuntimeError, match="bug"):
        bus.read(0, 1)

    assert not device.lock.locked()
