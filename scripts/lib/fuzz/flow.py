"""The driver's side of one queue: descriptors, and chains that are made of them as a case says."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from kvmpy.testing import RingDriver

from .oracle import DESC, INDIRECT, NEXT, WRITE
from .ram import RacingMemory

LONGEST = 1 << 17  # bytes that are put into a buffer


class Flow:
    """`ring` is the queue as a RingDriver has it. Descriptors are free until they are part of a chain under way."""

    def __init__(self, mem: RacingMemory, ring: Any) -> None:
        self._mem, self._ring = mem, ring
        self._free = deque(range(ring.size))
        self._under_way: dict[int, list[int]] = {}
        self._seen = 0  # of the used ring

    def reclaim(self, end: int) -> None:
        """Take back the descriptors of the chains that the device has given back, whose used ring ends at `end`."""
        if end - self._seen & 0xFFFF > self._ring.size:  # it was reset behind the driver's back
            return
        while self._seen != end:
            entry = self._mem.read(self._ring.used + 4 + 8 * (self._seen % self._ring.size), 4)
            self._free.extend(self._under_way.pop(int.from_bytes(entry, "little"), ()))
            self._seen = self._seen + 1 & 0xFFFF

    def submit(self, driver: RingDriver, index: int, segments: list[Any], odd: dict[str, Any]) -> bool:
        """Make a chain available, see Rig.op_chain; False when there are not enough descriptors."""
        table = odd.get("indirect")
        direct = len(segments) if table is None else min(odd.get("direct", 0), len(segments) - 1)
        need = direct + (table is not None)
        if need > len(self._free):
            return False
        places = [self._free.popleft() for _ in range(need)]
        head = places[0]
        self._under_way[head] = places
        order = [*places[:direct], *range(len(segments) - direct)]
        entries = self._entries(segments, order)
        if 0 < direct < len(segments):
            entries[direct - 1][3] = places[direct]
        for number, field, value in odd.get("entries", ()):
            entries[number % len(entries)][field] = value
        if "loop" in odd:
            entries[-1][2] |= NEXT
            entries[-1][3] = order[odd["loop"] % len(order)]
        for number, (place, entry) in enumerate(zip(order, entries, strict=True)):
            base = self._ring.desc if table is None or number < direct else table
            self._mem.poke(base + 16 * place, DESC.pack(*entry))
        if table is not None:
            flags, length = INDIRECT | odd.get("flags", 0), odd.get("length", 16 * (len(entries) - direct))
            self._mem.poke(self._ring.desc + 16 * places[-1], DESC.pack(table, length, flags, odd.get("next", 0)))
        driver.publish(index, odd.get("head", head))
        if jump := odd.get("jump"):
            self._ring.next_avail = self._ring.next_avail + jump & 0xFFFF
            self._mem.poke(self._ring.avail + 2, struct.pack("<H", self._ring.next_avail))
        return True

    def _entries(self, segments: list[Any], order: list[int]) -> list[list[int]]:
        """Fill the buffers; the fields of a descriptor for each."""
        entries = []
        for (address, size, writable, data), following in zip(segments, [*order[1:], None], strict=True):
            if data:
                payload, length = bytes.fromhex(data), min(size, LONGEST)
                self._mem.poke(address, (payload * (length // len(payload) + 1))[:length])
            flags = WRITE * writable | (NEXT if following is not None else 0)
            entries.append([address, size, flags, following or 0])
        return entries
