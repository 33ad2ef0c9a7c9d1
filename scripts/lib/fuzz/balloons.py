"""The balloon: pages that the driver names become zeros, and no others."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.virtio.balloon import BALLOON_F, MAX_PFNS, Balloon
from kvmpy.virtio.spec import F

from .kind import Kind, Violation
from .oracle import Done, Image, Ring, Span
from .ram import DATA, PAGE, RANGES

if TYPE_CHECKING:
    from .generate import Generator
    from .rig import Rig

INFLATE, DEFLATE, STATS = range(3)


class Inflatable(Kind):
    """A balloon that wants statistics every second and takes reports of free pages."""

    NAME = "balloon"
    FEATURES = Kind.FEATURES | BALLOON_F.STATS_VQ | BALLOON_F.PAGE_REPORTING | BALLOON_F.DEFLATE_ON_OOM
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX, BALLOON_F.STATS_VQ, BALLOON_F.PAGE_REPORTING)
    SIZES = (16,) * 5

    def open(self, folder: Path) -> Balloon:
        self.device = Balloon(stats=1)
        return self.device

    def request(self, make: Generator) -> None:
        pick, chance = make.random, make.random.random()
        if chance < 0.5:
            pages = range(DATA // PAGE, (RANGES[0][0] + RANGES[0][1]) // PAGE)
            count = pick.choice([0, 1, 1, 2, 8, 100])
            pfns = [pick.choice(pages) for _ in range(count)]
            if pick.random() < 0.3:
                pfns += [pick.choice([0, 1, 0x1A, 0x100, 0x103, 0x104, 0xD0000, 0xFFFFF, 0xFFFFFFFF, make.word(32)])]
            if pick.random() < 0.1:
                pfns = [*range(pages.start, pages.stop)] * 4
            make.chain(pick.choice([INFLATE, INFLATE, DEFLATE]), [struct.pack(f"<{len(pfns)}I", *pfns)], [])
        elif chance < 0.65:
            values = [(pick.randrange(20), make.word(64)) for _ in range(pick.choice([0, 1, 10, 100]))]
            data = b"".join(struct.pack("<HQ", *value) for value in values)
            make.chain(STATS, [data[: len(data) - (pick.random() < 0.1)]], [])
        elif chance < 0.85:
            make.chain(pick.choice([3, 4]), [], [pick.choice([PAGE, 2 * PAGE, 3 * PAGE, 100, 0]) for _ in range(2)])
        elif chance < 0.93:
            make.host("target", pick.choice([0, PAGE, 8 * PAGE]))
        else:
            make.ops.append(["advance", 1.0])

    def host(self, rig: Rig, name: str, *arguments: Any) -> None:
        with self.device.lock:
            self.device.target(arguments[0])

    def heads(self, index: int, ring: Ring) -> set[int] | None:
        """The driver gets its statistics back when new ones are wanted, others at once."""
        return set(range(ring.size)) if index == STATS else None

    def allows(self, one: Done, before: Image) -> list[Span]:
        if one.queue == INFLATE:
            data = before.gather(one.readable)[: 4 * MAX_PFNS]
            return [(pfn * PAGE, PAGE) for (pfn,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])]
        reporting = self.device._reporting_queue
        return one.writable if reporting is not None and one.queue == reporting.index else []

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        for one in chains:
            for address, size in self.allows(one, before) if one.queue == INFLATE else ():
                content = after.read(address, size)
                if content is not None and any(content):
                    raise Violation("data", f"page {address:#x} is not empty")
            if one.written:
                raise Violation("used.len", f"{one.written} bytes, where none were")

    def works(self, rig: Rig) -> None:
        page = (RANGES[0][0] + RANGES[0][1]) // PAGE - 1
        rig.op_write(page * PAGE, "ff")
        rig.request(INFLATE, [struct.pack("<I", page)], [])
        if any(rig.mem.read(page * PAGE, PAGE)):
            raise Violation("recovery", "a page does not go back")
