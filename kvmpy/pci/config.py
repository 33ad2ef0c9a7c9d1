"""The configuration space of a PCI function with one 64-bit memory BAR (PCI Local Bus 3.0, 6).

A hostile guest may write anything anywhere at any width: only bits of the mask change, and a handler looks at the
result. All of it is 256 bytes; the extended space behind them reads 0, which means no extended capability.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..core.regs import Bits, bit
from ..core.wire import U8, U16, U32, Overlay

SIZE = 256
CAPABILITIES = 0x40  # where the list begins, behind the header
MEMORY_BAR_64 = 0x4  # 6.2.5.1: in memory space, 64 bits, not prefetchable
BAR_FLAGS = 0xF
BAR_INDEX = 0  # of the only one; it takes the next one's place too


class COMMAND(Bits):
    """Command register (6.2.2)."""

    MEMORY = bit(1)
    MASTER = bit(2)
    INTX_DISABLE = bit(10)


class STATUS(Bits):
    """Status register (6.2.3)."""

    CAPABILITIES = bit(4)


MULTIFUNCTION = 1 << 7  # of the header type (6.2.1)


class Header(Overlay, size=CAPABILITIES):
    """Type 00h header (6.1); there is no interrupt pin: functions have MSI-X or poll."""

    vendor_id = U16(0x00)
    device_id = U16(0x02)
    command = U16(0x04)
    status = U16(0x06)
    revision_id = U8(0x08)
    class_code = U32(0x08)  # of which the lowest byte is the revision
    header_type = U8(0x0E)
    bar_low = U32(0x10)
    bar_high = U32(0x14)
    subsystem_vendor_id = U16(0x2C)
    subsystem_id = U16(0x2E)
    capabilities = U8(0x34)

    COMMAND_AT, BAR_LOW_AT, BAR_HIGH_AT = 0x04, 0x10, 0x14  # the double words in which handlers are interested


class ConfigSpace:
    """One function's registers, as its page of the ECAM answers them; `lock` is the function's.

    `on_read` and `on_write` hold handlers by the offset of a double word: before it is read, after it was written.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self.lock = lock
        self.data = bytearray(SIZE)
        self.mask = bytearray(SIZE)  # the bits that the guest can write
        self.header = Header(self.data)
        Header(self.mask).command = COMMAND.MEMORY | COMMAND.MASTER | COMMAND.INTX_DISABLE
        self.on_read: dict[int, Callable[[], None]] = {}
        self.on_write: dict[int, Callable[[], None]] = {}
        self._end = CAPABILITIES  # of the capabilities so far
        self._link = 0x34  # where the address of the next one goes

    def add_bar(self, base: int, size: int) -> None:
        """The memory BAR: `size` bytes, a power of two, at `base` as firmware would have put them."""
        writable = Header(self.mask)
        writable.bar_low, writable.bar_high = -size & 0xFFFFFFFF & ~BAR_FLAGS, 0xFFFFFFFF
        self.header.bar_low, self.header.bar_high = base & 0xFFFFFFFF | MEMORY_BAR_64, base >> 32

    @property
    def bar(self) -> int | None:
        """Where the memory BAR is; None while the guest does not let it answer."""
        if not self.header.command & COMMAND.MEMORY:
            return None
        return int(self.header.bar_high << 32 | self.header.bar_low & ~BAR_FLAGS)

    def add_capability(self, kind: int, body: bytes, writable: bytes = b"") -> int:
        """Link in a capability; `body` is what follows its first two bytes, `writable` its mask. Returns its offset."""
        at = self._end
        self._end = at + (2 + len(body) + 3 & ~3)
        self.data[at : at + 2 + len(body)] = bytes([kind, 0]) + body
        self.mask[at + 2 : at + 2 + len(writable)] = writable
        self.data[self._link] = at
        self._link = at + 1
        self.header.status |= STATUS.CAPABILITIES
        return at

    # Accesses: the guest's, with `lock` held.

    def read(self, offset: int, size: int) -> int:
        for at in range(offset & ~3, offset + size, 4):
            if handler := self.on_read.get(at):
                handler()
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at < SIZE:
                self.data[at] = self.data[at] & ~self.mask[at] | byte & self.mask[at]
        for at in range(offset & ~3, offset + size, 4):
            if handler := self.on_write.get(at):
                handler()
