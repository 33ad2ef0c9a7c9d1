"""The real-time clock of a PC, with its 128 bytes of battery-backed memory.

Source: Motorola MC146818A data sheet; Bochs' CMOS map for the bytes that tell the RAM size. The clock is the host's,
in UTC, plus an offset that changes when the guest sets the time. Alarm, periodic and update interrupts are not
modelled: their enable bits read back, their flags stay 0. So a guest must not be told of an interrupt here.
Linux: RTC_DRV_CMOS.

A hostile guest may set an impossible date, which is ignored, or any byte of the memory, which is only data.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core.board import Board
from ..core.regs import Bits, Field, Reg, RegisterDevice, bit
from ..core.typed import Any

SIZE = 128
SECOND = 10**9  # ns
UPDATE = (244 + 1984) * 1000  # ns before each full second during which UIP is set: tBUC + tUC
DIVIDER_START = SECOND // 2  # when the divider leaves reset, the first update comes half a second later
MAX_OFFSET = 1 << 63  # ns, of a restored state


class At:
    """Addresses in the memory."""

    SECONDS, MINUTES, HOURS = 0x00, 0x02, 0x04
    WEEKDAY, DAY, MONTH, YEAR = 0x06, 0x07, 0x08, 0x09
    REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
    BASE_MEMORY = 0x15  # KiB, two bytes
    EXTENDED_MEMORY = 0x17  # KiB above 1 MiB, two bytes
    EXTENDED_MEMORY_TOO = 0x30  # the same
    CENTURY = 0x32
    MEMORY_ABOVE_16M = 0x34  # units of 64 KiB, two bytes
    MEMORY_ABOVE_4G = 0x5B  # units of 64 KiB, three bytes

    TIME = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY))


class REG_A(Bits):
    """Register A."""

    RS = Field(3, 0)  # rate of the periodic interrupt
    DV = Field(6, 4)  # divider
    UIP = bit(7)  # update in progress

    HELD = 0b110  # DV with both of these bits set: the divider is held in reset


class REG_B(Bits):
    """Register B."""

    DSE = bit(0)  # daylight saving
    HOURS_24 = bit(1)
    BINARY = bit(2)  # rather than BCD
    SQWE = bit(3)
    UIE = bit(4)
    AIE = bit(5)
    PIE = bit(6)
    SET = bit(7)  # no updates: the program is setting the time


class REG_D(Bits):
    """Register D."""

    VRT = bit(7)  # the battery is good


PM = bit(7)  # of the hours, in 12-hour mode


class Cmos(RegisterDevice, span=2):
    """Index at `port`, data at `port`+1; `attach` puts the RAM size into the memory. `clock`: ns since 1970, UTC."""

    INDEX = Reg(0, read=False, write=0x7F)  # bit 7 masks NMIs on a PC
    DATA = Reg(1)
    REG_A = Reg(None, reset=0x26, bits=REG_A)  # divider runs, 1024 Hz
    REG_B = Reg(None, reset=REG_B.HOURS_24, bits=REG_B)
    DIVIDER_HELD = Reg(None)  # 1 when the divider has been in reset since the clock stopped

    def __init__(self, port: int, clock: Callable[[], int] = time.time_ns) -> None:
        self.port = port
        self.memory = bytearray(SIZE)  # the bytes at At.TIME count while the clock is stopped
        self.offset = 0  # ns from the host's time to the guest's
        self._clock = clock

    def attach(self, board: Board) -> None:
        ends = [region.end for region in board.mem.regions]
        low = max((end for end in ends if end <= 1 << 32), default=0)
        high = max((end - (1 << 32) for end in ends if end > 1 << 32), default=0)
        self._put(At.BASE_MEMORY, 2, 640)
        self._put(At.EXTENDED_MEMORY, 2, (low >> 10) - 1024)
        self._put(At.EXTENDED_MEMORY_TOO, 2, (low >> 10) - 1024)
        self._put(At.MEMORY_ABOVE_16M, 2, (low - (16 << 20)) >> 16)
        self._put(At.MEMORY_ABOVE_4G, 3, high >> 16)
        board.pio(self.port, self.SPAN, self)

    def read_DATA(self) -> int:
        match self.INDEX:
            case At.REG_A:
                updating = self._running and self._now() % SECOND >= SECOND - UPDATE
                return self.REG_A | (REG_A.UIP if updating else 0)
            case At.REG_B:
                return self.REG_B
            case At.REG_C:
                return 0
            case At.REG_D:
                return REG_D.VRT
            case index:
                if index in At.TIME and self._running:
                    self._show_time()
                return self.memory[index]

    def write_DATA(self, value: int) -> None:
        match self.INDEX:
            case At.REG_A:
                self._control(value & ~REG_A.UIP, self.REG_B)
            case At.REG_B:
                self._control(self.REG_A, value)
            case At.REG_C | At.REG_D:
                pass  # read-only
            case index if index in At.TIME and self._running:
                self._show_time()
                self.memory[index] = value
                self._set_time()
            case index:
                self.memory[index] = value

    def state(self) -> dict[str, Any]:
        return super().state() | {"memory": self.memory.hex(), "offset": self.offset}

    def restore(self, state: dict[str, Any]) -> None:
        memory, offset = state.get("memory"), state.get("offset")
        if not isinstance(memory, str) or len(memory) != 2 * SIZE:
            raise ValueError(f"Cmos: state has memory={memory!r}")
        if type(offset) is not int or abs(offset) > MAX_OFFSET:
            raise ValueError(f"Cmos: state has offset={offset!r}")
        super().restore(state)
        self.INDEX &= Cmos.INDEX.write
        self.memory, self.offset = bytearray.fromhex(memory), offset

    @property
    def _running(self) -> bool:
        return not self.REG_B & REG_B.SET and REG_A.DV.of(self.REG_A) & REG_A.HELD != REG_A.HELD

    def _now(self) -> int:
        return self._clock() + self.offset

    def _control(self, a: int, b: int) -> None:
        """Change registers A and B; the clock may stop or start by it."""
        was_running = self._running
        if was_running:
            self._show_time()
            self.DIVIDER_HELD = 0
        self.REG_A, self.REG_B = a, b
        if REG_A.DV.of(a) & REG_A.HELD == REG_A.HELD:
            self.DIVIDER_HELD = 1
        if self._running and not was_running:
            self._set_time()

    def _show_time(self) -> None:
        """The time, written as registers A and B want it, into the memory."""
        now = time.gmtime(self._now() // SECOND)
        hours = now.tm_hour
        if self.REG_B & REG_B.HOURS_24:
            shown = self._encode(hours)
        else:
            shown = self._encode((hours - 1) % 12 + 1) | (PM if hours >= 12 else 0)
        self.memory[At.HOURS] = shown
        self.memory[At.SECONDS] = self._encode(now.tm_sec)
        self.memory[At.MINUTES] = self._encode(now.tm_min)
        self.memory[At.WEEKDAY] = self._encode((now.tm_wday + 1) % 7 + 1)  # Sunday is 1
        self.memory[At.DAY] = self._encode(now.tm_mday)
        self.memory[At.MONTH] = self._encode(now.tm_mon)
        self.memory[At.YEAR] = self._encode(now.tm_year % 100)
        self.memory[At.CENTURY] = self._encode(now.tm_year // 100 % 100)

    def _set_time(self) -> None:
        """Let the clock go on from the time in the memory; an impossible one leaves it as it was."""
        try:
            seconds = self._read_time()
        except ValueError:
            return
        fraction = DIVIDER_START if self.DIVIDER_HELD else self._now() % SECOND
        self.offset = seconds * SECOND + fraction - self._clock()

    def _read_time(self) -> int:
        """Seconds since 1970 of the time in the memory; raises ValueError when there is no such time."""
        hours = self.memory[At.HOURS]
        if not self.REG_B & REG_B.HOURS_24:
            on_dial = self._decode(hours & ~PM)
            if not 1 <= on_dial <= 12:
                raise ValueError(f"{on_dial} o'clock")
            hour = on_dial % 12 + (12 if hours & PM else 0)
        else:
            hour = self._decode(hours)
        year = self._decode(self.memory[At.CENTURY]) * 100 + self._decode(self.memory[At.YEAR])
        month, day = self._decode(self.memory[At.MONTH]), self._decode(self.memory[At.DAY])
        minutes, seconds = self._decode(self.memory[At.MINUTES]), self._decode(self.memory[At.SECONDS])
        if hour > 23 or minutes > 59 or seconds > 59:
            raise ValueError(f"no such time: {hour}:{minutes}:{seconds}")
        return ((_days(year, month, day) * 24 + hour) * 60 + minutes) * 60 + seconds

    def _encode(self, number: int) -> int:
        return number if self.REG_B & REG_B.BINARY else number // 10 << 4 | number % 10

    def _decode(self, byte: int) -> int:
        if self.REG_B & REG_B.BINARY:
            return byte
        if byte & 0x0F > 9 or byte >> 4 > 9:
            raise ValueError(f"not BCD: {byte:#x}")
        return (byte >> 4) * 10 + (byte & 0x0F)

    def _put(self, address: int, size: int, number: int) -> None:
        """Store a little-endian number, or the nearest one that fits."""
        number = min(max(number, 0), (1 << 8 * size) - 1)
        self.memory[address : address + size] = number.to_bytes(size, "little")


def _days(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the Gregorian calendar; raises ValueError when there is no such date.

    Not with `datetime`, which takes long to load and cannot be loaded by a process that is locked in.
    """
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not (1 <= year <= 9999 and 1 <= month <= 12 and 1 <= day <= lengths[month - 1]):
        raise ValueError(f"no such date: {year}-{month}-{day}")
    before = year - 1
    return before * 365 + before // 4 - before // 100 + before // 400 + sum(lengths[: month - 1]) + day - 1 - 719162
