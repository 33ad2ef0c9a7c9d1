"""A balloon with a driver that is up, and lists of pages."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.balloon import BALLOON_F, Balloon
from kvmpy.virtio.spec import F

RAM = 4 << 20
PAGE = 4096
ALL = F.VERSION_1 | BALLOON_F.STATS_VQ | BALLOON_F.DEFLATE_ON_OOM | BALLOON_F.PAGE_REPORTING
INFLATE, DEFLATE, STATS, REPORTING = 0, 1, 2, 4
MEMFREE, MEMTOT = 4, 5


class Inflatable:
    """A balloon that wants statistics every ten seconds, whose driver uses the queues the specification gives it."""

    def __init__(self, transport: str) -> None:
        self.board = FakeBoard(RAM, transport)
        self.device = Balloon(stats=10)
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        begin(self.driver, ALL, [INFLATE, DEFLATE, STATS, REPORTING])


@pytest.fixture
def balloon(transport: str) -> Inflatable:
    return Inflatable(transport)


def begin(driver: RingDriver, features: int, queues: Sequence[int]) -> None:
    """Start with only these queues enabled."""
    driver.set("Status", 0)
    driver.set("Status", 3)
    driver.accept(features)
    driver.queues = []
    for index in range(max(queues) + 1):
        driver.set("QueueSel", index)
        driver.add_queue(8)
        driver.set("QueueReady", int(index in queues))
    driver.set("Status", 15)
    driver.board.steps.turn()


def pages(*pfns: int) -> bytes:
    return struct.pack(f"<{len(pfns)}I", *pfns)


def stats(*values: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", *value) for value in values)


def zeros(driver: RingDriver, first: int, count: int) -> list[int]:
    """Those of `count` pages from page `first` on that hold only zeros."""
    mem = driver.board.mem
    return [pfn for pfn in range(first, first + count) if not any(mem.read(pfn * PAGE, PAGE))]


def fill(driver: RingDriver, first: int, count: int) -> None:
    driver.board.mem.write(first * PAGE, b"x" * count * PAGE)
