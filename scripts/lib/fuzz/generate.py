"""Makes cases from a seed: mostly valid chains with plausible requests, each defect rare."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from . import defects, registers
from .ram import DATA, RANGES, RINGS

Segment = list[Any]  # address, bytes, 1 if the device writes it, what the driver puts there (hex; repeated)

CHAINS = 20  # of a case, about
LOW_END = RANGES[0][0] + RANGES[0][1]
HIGH, HIGH_END = RANGES[1][0], RANGES[1][0] + RANGES[1][1]


class Generator:
    """Collects the operations of one case in `ops`. `kind` makes requests with `chain`, through `random`."""

    def __init__(self, kind: Any, transport: str, seed: str) -> None:
        self.random = random.Random(seed)
        self.kind = kind
        self.transport = transport
        self.ops: list[list[Any]] = []
        self.features = 0
        self.sizes: list[int] = []
        self._free = DATA
        self._made = 0

    def case(self) -> list[list[Any]]:
        self.start()
        goal = self.random.choice((4, CHAINS, CHAINS, 2 * CHAINS))
        for _ in range(4 * goal):
            if self._made >= goal:
                break
            self._step()
        return self.ops

    def start(self) -> None:
        pick = self.random
        self.features = self.kind.FEATURES
        for bit in self.kind.OPTIONAL:
            self.features &= ~(bit if pick.random() < 0.3 else 0)
        self.sizes = [pick.choice(self.kind.QUEUE_SIZES) for _ in self.kind.SIZES]
        if pick.random() < 0.03:
            self.features ^= 1 << pick.randrange(64)
        if pick.random() < 0.03:
            self.sizes[pick.randrange(len(self.sizes))] = pick.choice([0, 1, 2, 3, 7, 24, 0x8000, 0xFFFF])
        if sum(24 * size + 64 for size in self.sizes) > DATA - RINGS:
            self.sizes = [8] * len(self.sizes)
        before, self.ops = self.ops, []
        made = self._made
        self.kind.begin(self)
        self._made = made
        self.ops = [*before, ["start", self.features, self.sizes, self.ops]]

    def _step(self) -> None:
        pick, chance = self.random, self.random.random()
        if chance < 0.03:
            registers.program(self)
        elif chance < 0.05:
            self.start()
        elif chance < 0.07:
            defects.poke(self)
        elif chance < 0.08:
            pick.choice((defects.race, defects.flip))(self)
        elif chance < 0.10:
            self.ops.append(["interrupts"])
        elif chance < 0.12:
            self.ops.append(["advance", pick.choice([0.01, 1.0, 10.0])])
        else:
            self.kind.request(self)

    # For kinds.

    def chain(self, queue: int, readable: Sequence[bytes], writable: Sequence[int], *, kick: float = 0.5) -> None:
        """A chain of these parts, split and placed at will, perhaps with a defect, perhaps with a kick."""
        pick = self.random
        segments = [[self.place(size), size, 0, part] for size, part in self._split(readable)]
        segments += [[self.place(size), size, 1, ""] for size in self._cut(writable)]
        if not segments:
            segments = [[self.place(0), 0, pick.randrange(2), ""]]
        odd: dict[str, Any] = {}
        if pick.random() < 0.25 and len(segments) <= self.sizes[queue % len(self.sizes)]:
            odd["indirect"] = self.place(16 * len(segments))
            if pick.random() < 0.3:
                odd["direct"] = pick.randrange(len(segments))  # of them are in front of the table
        if pick.random() < self.kind.DEFECT:
            defects.spoil(self, queue, segments, odd)
        self.ops.append(["chain", queue, segments, odd])
        self._made += 1
        if pick.random() < kick:
            self.kick(queue)

    def kick(self, queue: int) -> None:
        if self.random.random() < 0.01:
            queue = self.random.choice([queue + 1, 7, 0xFF, 0xFFFF, 0xFFFFFFFF])
        self.ops.append(["kick", queue])

    def host(self, name: str, *arguments: Any) -> None:
        self.ops.append(["host", name, *arguments])

    def place(self, size: int) -> int:
        """An address for a buffer: rarely the very end of RAM, or one that was used before."""
        pick = self.random
        chance = pick.random()
        if size <= HIGH_END - HIGH:
            if chance < 0.03:
                return pick.choice([LOW_END, HIGH_END]) - size
            if chance < 0.06:
                return pick.randrange(HIGH, HIGH_END - size + 1)
        start = self._free + (pick.randrange(16) if chance < 0.3 else 0)
        if start + size > LOW_END - 0x1000:
            start = DATA
        self._free = start + size
        return start

    def word(self, bits: int = 64) -> int:
        """A number of so many bits: small, at an edge, or any."""
        pick = self.random
        top = 1 << bits
        small, edges = (
            (0, 1, pick.randrange(16), pick.randrange(1 << 16)),
            (top - 1, top - pick.randrange(1, 4096), top >> 1),
        )
        return pick.choice((*small, *edges, pick.randrange(top))) % top

    def _split(self, parts: Sequence[bytes]) -> list[tuple[int, str]]:
        """(bytes, content) of the readable segments."""
        pick = self.random
        chance = pick.random()
        if chance < 0.1:
            parts = [b"".join(parts)]
        elif chance < 0.2:
            data, parts = b"".join(parts), []
            while data:
                at = pick.choice([1, 2, 8, 12, 16, pick.randint(1, len(data))])
                if len(parts) == 6:
                    at = len(data)
                parts, data = [*parts, data[:at]], data[at:]
        found = [(len(part), _short(part)) for part in parts if part]
        if chance > 0.97:
            found.insert(pick.randint(0, len(found)), (0, ""))
        return found

    def _cut(self, sizes: Sequence[int]) -> list[int]:
        pick = self.random
        chance = pick.random()
        if chance < 0.1:
            sizes = [sum(sizes)]
        elif chance < 0.2:
            left, sizes = sum(sizes), []
            while left:
                size = left if len(sizes) == 6 else pick.choice([1, 2, 12, 512, pick.randint(1, left)])
                sizes = [*sizes, min(size, left)]
                left -= sizes[-1]
        found = [size for size in sizes if size]
        if chance > 0.97:
            found.insert(pick.randint(0, len(found)), 0)
        return found


def _short(part: bytes) -> str:
    """As hex; what repeats itself only once."""
    if len(part) > 64 and part == (part[:16] * (len(part) // 16 + 1))[: len(part)]:
        part = part[:16]
    return part.hex()
