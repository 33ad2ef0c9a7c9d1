"""The real-time clock tells the host's time and keeps what a guest sets."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from kvmpy.core.memory import GuestMemory, Region
from kvmpy.devices.cmos import SECOND, SIZE, UPDATE, Cmos
from kvmpy.testing import FakeBoard

RTC = 0x70
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
UIP, SET, BINARY, HOURS_24 = 0x80, 0x80, 0x04, 0x02
HELD = 0x70  # register A with the divider in reset
CLOCK = (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)


def ns(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> int:
    return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()) * SECOND


class Rtc:
    """The guest's end of the clock, and the host's clock to turn."""

    def __init__(self, now: int = ns(2024, 2, 29, 13, 14, 15)) -> None:
        self.now = now
        self.board = FakeBoard()
        self.chip = Cmos(RTC, clock=lambda: self.now)
        self.chip.attach(self.board)

    def get(self, index: int) -> int:
        self.board.ports.write(RTC, 1, index)
        return self.board.ports.read(RTC + 1, 1)

    def put(self, index: int, value: int) -> None:
        self.board.ports.write(RTC, 1, index)
        self.board.ports.write(RTC + 1, 1, value)

    def time(self) -> str:
        """The registers in hex: in BCD, `2024-02-29 13:14:15`."""
        return "{:02x}{:02x}-{:02x}-{:02x} {:02x}:{:02x}:{:02x}".format(*(self.get(index) for index in CLOCK))

    def put_time(self, *values: int) -> None:
        for index, value in zip(CLOCK, values, strict=True):
            self.put(index, value)


@pytest.fixture
def rtc() -> Rtc:
    return Rtc()


# Reading the time


def test_host_time_in_bcd_and_24_hours(rtc: Rtc) -> None:
    assert rtc.time() == "2024-02-29 13:14:15"
    assert rtc.get(WEEKDAY) == 5  # Thursday; Sunday is 1


def test_the_clock_goes_with_the_hosts(rtc: Rtc) -> None:
    rtc.now += 10 * 3600 * SECOND + 46 * 60 * SECOND

    assert rtc.time() == "2024-03-01 00:00:15"


def test_binary(rtc: Rtc) -> None:
    rtc.put(B, BINARY | HOURS_24)

    assert [rtc.get(index) for index in CLOCK] == [20, 24, 2, 29, 13, 14, 15]


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    [(0, 0x12, 12), (1, 0x01, 1), (11, 0x11, 11), (12, 0x92, 0x8C), (13, 0x81, 0x81), (23, 0x91, 0x8B)],
)
def test_12_hours(hour: int, bcd: int, binary: int) -> None:
    rtc = Rtc(ns(2024, 1, 1, hour))

    rtc.put(B, 0)
    in_bcd = rtc.get(HOURS)
    rtc.put(B, BINARY)

    assert (in_bcd, rtc.get(HOURS)) == (bcd, binary)


@pytest.mark.parametrize("year", [1970, 1999, 2000, 2038, 2099, 2100, 2155])
def test_years(year: int) -> None:
    assert Rtc(ns(year, 12, 31, 23, 59, 59)).time() == f"{year}-12-31 23:59:59"


def test_update_in_progress_is_set_before_each_second(rtc: Rtc) -> None:
    full_second = rtc.now
    flags = []
    for moment in (0, SECOND // 2, SECOND - UPDATE - 1, SECOND - UPDATE, SECOND - 1, SECOND):
        rtc.now = full_second + moment
        flags.append(rtc.get(A) & UIP)

    assert flags == [0, 0, 0, UIP, UIP, 0]


def test_battery_is_good_and_no_interrupt_is_pending(rtc: Rtc) -> None:
    assert (rtc.get(D), rtc.get(C)) == (0x80, 0)


def test_control_registers_have_the_values_a_bios_leaves(rtc: Rtc) -> None:
    assert (rtc.get(A), rtc.get(B)) == (0x26, 0x02)


# Setting the time


def linux_sets(rtc: Rtc, *values: int) -> None:
    """drivers/rtc/rtc-mc146818-lib.c, mc146818_set_time."""
    control, divider = rtc.get(B), rtc.get(A)
    rtc.put(B, control | SET)
    rtc.put(A, divider | HELD)
    rtc.put_time(*values)
    rtc.put(B, control)
    rtc.put(A, divider)


def test_time_set_by_linux_is_kept_and_goes_on(rtc: Rtc) -> None:
    linux_sets(rtc, 0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    at_once = rtc.time()
    rtc.now += 2 * SECOND

    assert at_once == "1999-12-31 23:59:58"
    assert rtc.time() == "2000-01-01 00:00:00"


def test_divider_reset_makes_the_first_second_half_as_long(rtc: Rtc) -> None:
    rtc.now += SECOND // 10
    linux_sets(rtc, 0x20, 0x24, 0x01, 0x01, 0x00, 0x00, 0x00)

    rtc.now += SECOND // 2 - 1
    before = rtc.get(SECONDS)
    rtc.now += 1

    assert (before, rtc.get(SECONDS)) == (0x00, 0x01)


def test_set_alone_keeps_the_phase_of_the_second(rtc: Rtc) -> None:
    rtc.now += SECOND * 9 // 10
    rtc.put(B, SET | HOURS_24)
    rtc.put_time(0x20, 0x24, 0x01, 0x01, 0x00, 0x00, 0x00)
    rtc.put(B, HOURS_24)

    rtc.now += SECOND // 10

    assert rtc.time() == "2024-01-01 00:00:01"


def test_a_divider_reset_of_the_past_does_not_count(rtc: Rtc) -> None:
    linux_sets(rtc, 0x20, 0x24, 0x01, 0x01, 0x00, 0x00, 0x00)
    rtc.now += SECOND * 4 // 10

    rtc.put(B, SET | HOURS_24)
    rtc.put(B, HOURS_24)
    rtc.now += SECOND // 10

    assert rtc.time() == "2024-01-01 00:00:01"


@pytest.mark.parametrize(("index", "value"), [(B, SET | HOURS_24), (A, HELD)])
def test_stopped_clock_stands_still_and_shows_what_is_written(rtc: Rtc, index: int, value: int) -> None:
    rtc.put(index, value)

    rtc.now += 3600 * SECOND
    stopped = rtc.time()
    rtc.put(MINUTES, 0x59)
    updating = rtc.get(A) & UIP

    assert stopped == "2024-02-29 13:14:15"
    assert rtc.time() == "2024-02-29 13:59:15"
    assert updating == 0


def test_time_set_in_binary_and_12_hours(rtc: Rtc) -> None:
    rtc.put(B, SET | BINARY)
    rtc.put_time(20, 30, 7, 4, 0x80 | 12, 34, 56)
    rtc.put(B, BINARY)

    rtc.put(B, HOURS_24)

    assert rtc.time() == "2030-07-04 12:34:56"


@pytest.mark.parametrize(("dial", "hour"), [(0x12, "00"), (0x01, "01"), (0x92, "12"), (0x91, "23")])
def test_time_set_in_12_hours(rtc: Rtc, dial: int, hour: str) -> None:
    rtc.put(B, SET)
    rtc.put_time(0x20, 0x30, 0x07, 0x04, dial, 0x00, 0x00)
    rtc.put(B, 0)

    rtc.put(B, HOURS_24)

    assert rtc.time() == f"2030-07-04 {hour}:00:00"


def test_register_written_while_the_clock_runs(rtc: Rtc) -> None:
    rtc.put(HOURS, 0x20)

    assert rtc.time() == "2024-02-29 20:14:15"


@pytest.mark.parametrize(
    "values",
    [
        (0x20, 0x24, 0x13, 0x01, 0, 0, 0),
        (0x20, 0x24, 0x00, 0x01, 0, 0, 0),
        (0x20, 0x23, 0x02, 0x29, 0, 0, 0),
        (0x20, 0x24, 0x01, 0x00, 0, 0, 0),
        (0x20, 0x24, 0x01, 0x01, 0x24, 0, 0),
        (0x20, 0x24, 0x01, 0x01, 0, 0x60, 0),
        (0x20, 0x24, 0x01, 0x01, 0, 0, 0x60),
        (0x20, 0x2A, 0x01, 0x01, 0, 0, 0),
        (0x20, 0xA2, 0x01, 0x01, 0, 0, 0),
        (0x00, 0x00, 0x01, 0x01, 0, 0, 0),
        (0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF),
    ],
)
def test_impossible_time_is_ignored(rtc: Rtc, values: tuple[int, ...]) -> None:
    linux_sets(rtc, *values)

    assert rtc.time() == "2024-02-29 13:14:15"


@pytest.mark.parametrize("hours", [0x00, 0x13, 0x80, 0x93])
def test_impossible_hour_on_a_12_hour_dial_is_ignored(rtc: Rtc, hours: int) -> None:
    rtc.put(B, SET)
    rtc.put_time(0x20, 0x30, 0x01, 0x01, hours, 0x00, 0x00)
    rtc.put(B, 0)

    rtc.put(B, HOURS_24)

    assert rtc.time() == "2024-02-29 13:14:15"


@pytest.mark.parametrize("century", [0x00, 0x99])
def test_the_end_of_time_is_survived(rtc: Rtc, century: int) -> None:
    linux_sets(rtc, century, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)

    rtc.now += 10 * SECOND

    assert rtc.time()[4:] == "-01-01 00:00:09"


# Memory


def test_memory_bytes_are_kept(rtc: Rtc) -> None:
    rtc.put(0x0F, 0x05)  # shutdown status
    rtc.put(0x7F, 0xA5)

    assert (rtc.get(0x0F), rtc.get(0x7F)) == (0x05, 0xA5)


def test_alarm_registers_are_memory(rtc: Rtc) -> None:
    rtc.put(0x01, 0xC0)

    assert rtc.get(0x01) == 0xC0


def test_bit_7_of_the_index_is_the_nmi_mask(rtc: Rtc) -> None:
    rtc.put(0x0F, 0x05)

    assert rtc.get(0x8F) == 0x05


@pytest.mark.parametrize("index", [C, D])
def test_status_registers_are_read_only(rtc: Rtc, index: int) -> None:
    before = rtc.get(index)

    rtc.put(index, 0x5A)

    assert rtc.get(index) == before


class Huge:
    """The length of RAM without the RAM."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("regions", "extended", "above_16m", "above_4g"),
    [
        ([(0, 1 << 20)], 0, 0, 0),
        ([(0, 8 << 20)], 7 << 10, 0, 0),
        ([(0, 512 << 20)], 0xFFFF, (496 << 20) >> 16, 0),
        ([(0, 4 << 30)], 0xFFFF, ((4 << 30) - (16 << 20)) >> 16, 0),
        ([(0, 3 << 30), (4 << 30, 5 << 30)], 0xFFFF, ((3 << 30) - (16 << 20)) >> 16, (5 << 30) >> 16),
    ],
)
def test_ram_size(regions: list[tuple[int, int]], extended: int, above_16m: int, above_4g: int) -> None:
    board = FakeBoard()
    board.mem = GuestMemory([Region(gpa, Huge(size)) for gpa, size in regions])  # type: ignore[arg-type]
    chip = Cmos(RTC)

    chip.attach(board)

    def number(index: int, size: int) -> int:
        return int.from_bytes(chip.memory[index : index + size], "little")

    assert number(0x15, 2) == 640
    assert (number(0x17, 2), number(0x30, 2)) == (extended, extended)
    assert (number(0x34, 2), number(0x5B, 3)) == (above_16m, above_4g)


# A guest that does everything, and state


def test_every_write_to_every_register_is_survived(rtc: Rtc) -> None:
    for value in range(256):
        for index in range(256):
            rtc.put(index, value)
            rtc.get(index)

    assert len(rtc.chip.memory) == SIZE
    assert rtc.get(SECONDS) in range(256)


def test_state_round_trip_through_json(rtc: Rtc) -> None:
    linux_sets(rtc, 0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    rtc.put(0x0F, 0x05)
    rtc.get(SECONDS)
    state = json.loads(json.dumps(rtc.chip.state()))

    other = Rtc()
    other.chip.restore(state)

    assert other.chip.state() == state
    assert other.time() == "1999-12-31 23:59:58"
    assert other.get(0x0F) == 0x05


def test_restored_index_stays_in_the_memory(rtc: Rtc) -> None:
    state = rtc.chip.state()
    state["registers"]["INDEX"] = 0xFF

    rtc.chip.restore(state)

    assert rtc.board.ports.read(RTC + 1, 1) == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"memory": "00"},
        {"memory": None},
        {"memory": "zz" * SIZE},
        {"offset": 1 << 64},
        {"offset": 0.5},
        {"offset": None},
        {"version": 0},
    ],
)
def test_restore_refuses_a_damaged_state(rtc: Rtc, damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Cmos: state|non-hexadecimal"):
        rtc.chip.restore(rtc.chip.state() | damage)
