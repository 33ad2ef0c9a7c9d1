"""What a device may do to guest memory in one step: RAM and used rings before and behind it, compared.

The oracle has its own way through the rings, written from VIRTIO 1.2, 2.7, on a copy of RAM from before the step.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from .ram import RANGES

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC = struct.Struct("<QIHH")
U16 = struct.Struct("<H")
USED = struct.Struct("<II")

Span = tuple[int, int]  # guest address, bytes


class Violation(Exception):
    """The device did what it must not: `kind` is one word, the same for the same mistake."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class Image(NamedTuple):
    """A copy of RAM."""

    parts: tuple[bytes, ...]

    def read(self, gpa: int, size: int) -> bytes | None:
        for (start, length), part in zip(RANGES, self.parts, strict=True):
            if start <= gpa and gpa + size <= start + length:
                return part[gpa - start : gpa - start + size]
        return None

    def gather(self, spans: Sequence[Span]) -> bytes:
        return b"".join(self.read(*span) or b"" for span in spans)


class Ring(NamedTuple):
    """Where a queue was, and how far the device had come."""

    size: int
    desc: int
    avail: int
    used: int
    ready: bool
    indirect: bool
    next_avail: int
    next_used: int

    @property
    def control(self) -> list[Span]:
        return [(self.desc, 16 * self.size), (self.avail, 6 + 2 * self.size), (self.used, 6 + 8 * self.size)]


class Done(NamedTuple):
    """A chain that the device gave back: what it could read and write, and how much it says it wrote."""

    queue: int
    head: int
    readable: list[Span]
    writable: list[Span]
    tables: list[Span]
    written: int

    @property
    def capacity(self) -> int:
        return sum(size for _, size in self.writable)


def rings(queues: Sequence[Any]) -> list[Ring]:
    """Those of a device as they are now."""
    return [Ring(q.size, q.desc, q.avail, q.used, q.ready, q.indirect, *q.positions[:2]) for q in queues]


def walk(image: Image, ring: Ring, head: int, tables: list[Span]) -> tuple[list[Span], list[Span]] | None:
    """Readable and writable spans of a chain; None when it breaks a rule. Appends its indirect table to `tables`."""
    readable: list[Span] = []
    writable: list[Span] = []
    table, size, at = ring.desc, ring.size, head
    nested = False
    while at < size:
        entry = image.read(table + 16 * at, 16)
        if entry is None:
            return None
        address, length, flags, following = DESC.unpack(entry)
        if flags & INDIRECT:
            table, size, at = address, length // 16, 0
            tables.append((address, length))
            bad = length % 16 or not 0 < size <= ring.size or flags & NEXT or nested
            nested = True
            if bad or not ring.indirect or image.read(address, length) is None:
                return None
            continue
        if image.read(address, length) is None or (writable and not flags & WRITE):
            return None
        (writable if flags & WRITE else readable).append((address, length))
        if len(readable) + len(writable) > ring.size:
            return None
        if not flags & NEXT:
            return readable, writable
        at = following
    return None


class Oracle:
    """Watches one device. `model` is the device's own: it says what more is allowed, and is told what was done."""

    def __init__(self, mem: Any, core: Any, model: Any) -> None:
        self._mem, self._core, self._model = mem, core, model
        self.loose = False  # other CPUs were at work: nothing that was read before can be relied upon
        self.served = 0  # chains that came back
        self._wrong: list[Violation] = []  # of this step, if its chains did not overwrite each other
        self._suspect: list[Span] = []  # tables of chains that cannot be followed
        self.stale = False  # the guest has written since
        self.tangled = 0  # steps in which the driver had itself to blame, and no more could be said
        self.image = Image(())
        self.rings: list[Ring] = []
        self.mark()

    def mark(self) -> None:
        parts = [bytes(region.buf) for region in self._mem.regions]
        # What is the same is one object: traces of many images stay small.
        old = self.image.parts or parts
        self.image = Image(tuple(was if was == now else now for was, now in zip(old, parts, strict=True)))
        self.rings = rings(self._core.queues)
        self.stale = False

    def begin(self) -> None:
        if self.stale:
            self.mark()

    def check(self) -> None:
        """Compare with the last mark; raises Violation."""
        before, old = self.image, self.rings
        self.mark()
        if self.loose:
            self._model.tangled()
            return
        if before == self.image and old == self.rings:
            return
        allowed: list[Span] = []
        done: list[Done] = []
        self._wrong, self._suspect = [], []
        for index, (was, now) in enumerate(zip(old, self.rings, strict=True)):
            allowed += self._ring(index, was, now, before, done)
        self.served += len(done)
        more = [span for one in done for span in self._model.allows(one, before)]
        if self._is_tangled(done, more):
            self.tangled += 1
            self._model.tangled()
            return
        for wrong in self._wrong:
            raise wrong
        for one in done:
            allowed += prefix(one.writable, one.written)
        allowed += more
        self._compare(before, allowed)
        if done:
            self._model.done(done, before, self.image)

    def _ring(self, index: int, was: Ring, now: Ring, before: Image, done: list[Done]) -> list[Span]:
        """What may have changed in a queue's rings; appends the chains that came back."""
        if not was.ready:
            if not now.ready:
                return []
            return [(now.used, 2), (now.used + 4 + 8 * now.size, 2)]
        if now.desc != was.desc or now.size != was.size:  # the device was reset
            return []
        count = now.next_used - was.next_used & 0xFFFF
        if count > was.size:
            raise Violation("budget", f"queue {index} of {was.size}: {count} chains given back in one step")
        spans = [(was.used + 2, 2), (was.used + 4 + 8 * was.size, 2)]
        heads = self._model.heads(index, was)
        for n in range(count):
            slot = was.used + 4 + 8 * ((was.next_used + n) % was.size)
            spans.append((slot, 8))
            entry = before.read(was.avail + 4 + 2 * ((was.next_avail + n) % was.size), 2)
            (head,) = U16.unpack(entry) if entry else (-1,)
            given, written = USED.unpack(self.image.read(slot, 8) or bytes(8))
            if heads is not None:
                head = given if given in heads else head
            tables: list[Span] = []
            chain = walk(before, was, head, tables)
            if chain is None and heads is not None:
                continue  # taken in an earlier step, since when its descriptors have changed
            if chain is None:
                self._suspect += tables
                self._wrong.append(
                    Violation("bad-chain", f"queue {index}: head {head} is no chain, and was given back")
                )
                break
            one = Done(index, head, *chain, tables, written)
            done.append(one)
            if given != head:
                self._wrong.append(Violation("head", f"queue {index}: {given} was given back, {head} was next"))
            elif written > one.capacity:
                what = f"queue {index}: {written} bytes written into {one.capacity}"
                self._wrong.append(Violation("used.len", what))
        return spans

    def _controls(self) -> list[Span]:
        return [span for ring in self.rings if ring.ready or ring.desc for span in ring.control]

    def _is_tangled(self, done: list[Done], more: list[Span]) -> bool:
        """Whether a buffer that was written lies over what the device had yet to read."""
        written = [span for one in done for span in one.writable]
        read = [span for one in done for span in one.readable]
        tables = [span for one in done for span in one.tables] + self._suspect
        if overlap(written + more, self._controls() + read + tables) or overlaps_itself(written):
            return True
        return overlap(read + tables, [ring.control[2] for ring in self.rings if ring.ready or ring.desc])

    def _compare(self, before: Image, allowed: list[Span]) -> None:
        for (gpa, size), was, now in zip(RANGES, before.parts, self.image.parts, strict=True):
            if was == now:
                continue
            expected = bytearray(was)
            for address, length in allowed:
                start, end = max(address - gpa, 0), min(address + length - gpa, size)
                if start < end:
                    expected[start:end] = now[start:end]
            if expected != now:
                at = next(n for n in range(size) if expected[n] != now[n])
                count = sum(a != b for a, b in zip(expected, now, strict=True))
                raise Violation(
                    "memory", f"{count} bytes changed that were not the device's, the first at {gpa + at:#x}"
                )


def prefix(spans: Sequence[Span], size: int) -> list[Span]:
    """The first `size` bytes of `spans`."""
    found = []
    for address, length in spans:
        if size <= 0:
            break
        found.append((address, min(length, size)))
        size -= length
    return found


def last(spans: Sequence[Span]) -> list[Span]:
    """The last byte of `spans`."""
    return next(([(address + length - 1, 1)] for address, length in reversed(spans) if length), [])


def overlap(some: Sequence[Span], others: Sequence[Span]) -> bool:
    """Whether a byte of `some` is one of `others`."""
    ordered = sorted((address, address + size) for address, size in others if size)
    starts = [start for start, _ in ordered]
    furthest: list[int] = []  # end of those that begin there or earlier
    for _, end in ordered:
        furthest.append(max(end, furthest[-1]) if furthest else end)
    for address, size in some:
        index = bisect_right(starts, address + size - 1) - 1
        if size and index >= 0 and furthest[index] > address:
            return True
    return False


def overlaps_itself(spans: Sequence[Span]) -> bool:
    end = -1
    for address, size in sorted(span for span in spans if span[1]):
        if address < end:
            return True
        end = address + size
    return False
