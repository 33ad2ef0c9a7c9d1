"""Faults as values, when each of them happens, and the log of those that did."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from ..core.errors import ConfigError
from ..core.record import Record

ANY = "any"


class Fault(Record, frozen=True):
    """What goes wrong, and when: with the operations `on`, the `nth` of these (1 is the first; 0: each), and of those
    a share of `probability`. A fault of the same seed, at the same place among its fellows, hits the same ones again.

    Raises ConfigError for what cannot be.
    """

    on: str = ANY
    nth: int = 0
    probability: float = 1.0

    def check(self, operations: Sequence[str]) -> None:
        """Raises ConfigError unless this can happen to a device that has these operations."""
        name = type(self).__name__
        if self.on != ANY and self.on not in operations:
            raise ConfigError(f"{name} on {self.on!r}", f"use {ANY}, {', '.join(operations)}")
        if self.nth < 0:
            raise ConfigError(f"{name} with nth={self.nth}", "use 1 for the first, 0 for each")
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"{name} with probability={self.probability}", "use a number from 0 to 1")

    def covers(self, on: str, at: int, size: int) -> bool:
        """Whether an operation is of those that this is about; `at` and `size` are what the operation counts in."""
        return self.on in (ANY, on)


class Injected(Record, frozen=True):
    """A fault that happened: to the device's operation `number` (0 is its first one), which was `on`, `at` a sector,
    of `size` sectors (disks) or bytes (frames)."""

    number: int
    on: str
    at: int
    size: int
    fault: Fault


class Plan:
    """Faults of one device; those that happen are added to `log`."""

    def __init__(self, faults: Sequence[Fault], seed: str, log: list[Injected]) -> None:
        self.faults = faults
        self.log = log
        self._faults = [(fault, random.Random(f"{seed} {place}")) for place, fault in enumerate(faults)]
        self._seen = [0] * len(self._faults)  # operations that each is about
        self._number = 0

    def hits(self, on: str, at: int = 0, size: int = 0) -> Iterator[tuple[Fault, random.Random]]:
        """The faults that happen to the next operation, each with its random numbers."""
        number, found = self._number, []
        self._number += 1
        for place, (fault, numbers) in enumerate(self._faults):
            if not fault.covers(on, at, size):
                continue
            self._seen[place] += 1
            if (not fault.nth or fault.nth == self._seen[place]) and numbers.random() < fault.probability:
                found.append((fault, numbers))
        for fault, numbers in found:
            self.log.append(Injected(number, on, at, size, fault))
            yield fault, numbers
