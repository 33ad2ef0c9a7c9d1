"""MSI-X: a table in which the guest writes the message of each vector (PCI Local Bus 3.0, 6.8.2).

A hostile guest may name vectors that are not there, leave half-written messages, or mask and unmask for ever: the
table has a fixed size, a message is looked at only when its vector is unmasked, and one that does not go to the local
APICs goes nowhere.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

from ..core.irq import Message
from ..core.regs import Bits, Field, bit

CAPABILITY = 0x11
ENTRY = struct.Struct("<QII")  # 6.8.2.6 to 6.8.2.9: message address, message data, vector control
MASKED = 1  # the only bit of the vector control
MESSAGES, MESSAGES_END = 0xFEE00000, 0xFEF00000  # where local APICs listen (Intel SDM vol. 3A, 11.11.1)
MAX_VECTORS = 2048


class CONTROL(Bits):
    """Message control (6.8.2.3)."""

    TABLE_SIZE = Field(10, 0)
    FUNCTION_MASK = bit(14)
    ENABLE = bit(15)


class Msix:
    """The vectors of one function, one Message each. Any thread may call any method: they share a lock, a leaf."""

    def __init__(self, messages: Sequence[Message]) -> None:
        if not 0 < len(messages) <= MAX_VECTORS:
            raise ValueError(f"{len(messages)} MSI-X vectors: use 1 to {MAX_VECTORS}")
        self.messages = messages
        self.table = bytearray(ENTRY.pack(0, 0, MASKED) * len(messages))
        self.pending = 0  # one bit for each vector
        self._lock = threading.Lock()
        self._live = 0  # the vectors that are unmasked and have a message that can be sent
        self.control = CONTROL.TABLE_SIZE.put(0, len(messages) - 1)

    def capability(self, bar: int, table: int, pba: int) -> tuple[bytes, bytes]:
        """The capability's bytes behind the first two, and which of their bits the guest can write."""
        body = struct.pack("<HII", self.control, table | bar, pba | bar)
        return body, struct.pack("<H", CONTROL.FUNCTION_MASK | CONTROL.ENABLE)

    @property
    def enabled(self) -> bool:
        return bool(self.control & CONTROL.ENABLE)

    def signal(self, vector: int) -> bool:
        """Send the message of `vector`, or keep it pending while it is masked; nothing for a vector that is none.

        False: MSI-X is off.
        """
        with self._lock:
            if not self.enabled:
                return False
            if self._live >> vector & 1:
                self.messages[vector].pulse()
            elif vector < len(self.messages) and self._masked(vector):
                self.pending |= 1 << vector
            return True

    def write_control(self, value: int) -> None:
        """The guest has written the message control."""
        with self._lock:
            self._control(value)

    # The structures in the BAR: aligned double words or quad words (6.8.2).

    def read_table(self, offset: int, size: int) -> int:
        with self._lock:
            return int.from_bytes(self.table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        if size not in (4, 8) or offset % size or offset + size > len(self.table):
            return
        with self._lock:
            self.table[offset : offset + size] = value.to_bytes(size, "little")
            if offset % ENTRY.size + size == ENTRY.size:  # the vector control was part of it
                self._update(offset // ENTRY.size)

    def read_pending(self, offset: int, size: int) -> int:
        return self.pending >> 8 * offset & (1 << 8 * size) - 1

    # Inside, with the lock held.

    def _control(self, value: int) -> None:
        self.control = value
        if not self.enabled:
            self.pending = 0
        for vector in range(len(self.messages)):
            self._update(vector)

    def _masked(self, vector: int) -> bool:
        _, _, control = ENTRY.unpack_from(self.table, ENTRY.size * vector)
        return bool(self.control & CONTROL.FUNCTION_MASK or control & MASKED)

    def _update(self, vector: int) -> None:
        """The masks may have changed: from its unmasking on, the vector's message counts, and one that waited goes."""
        one = 1 << vector
        self._live &= ~one
        if not self.enabled or self._masked(vector):
            return
        address, data, _ = ENTRY.unpack_from(self.table, ENTRY.size * vector)
        if not MESSAGES <= address < MESSAGES_END:
            return
        self.messages[vector].route(address, data)
        self._live |= one
        if self.pending & one:
            self.pending &= ~one
            self.messages[vector].pulse()

    def state(self) -> dict[str, object]:
        with self._lock:
            return {"table": self.table.hex(), "pending": self.pending}

    def restore(self, state: dict[str, object], control: int) -> None:
        """Take back what `state` gave; raises ValueError for another number of vectors."""
        table = bytes.fromhex(str(state["table"]))
        if len(table) != len(self.table):
            raise ValueError(f"MSI-X: state has {len(table)} bytes of table, expected {len(self.table)}")
        with self._lock:
            self.table[:] = table
            self.pending = int(str(state["pending"])) & (1 << len(self.messages)) - 1
            self._control(control)
