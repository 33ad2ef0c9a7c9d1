"""A disk: requests from a ring that is prepared once, through the page cache of the host."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import phases
from .contenders import MIB, Contender, Job, disk_image, found
from .harness import Figure, Options, Run
from .phases import Phase

KIB = 1 << 10
RANDOM_READ, RANDOM_WRITE, READ, WRITE = range(4)  # guests/bench/blk.c
CASES = {
    f"{name} depth {depth}": Phase(kind, depth, 4 * KIB)
    for depth in (1, 32, 128)
    for name, kind in (("4K read", RANDOM_READ), ("4K write", RANDOM_WRITE))
} | {"1M read depth 4": Phase(READ, 4, MIB), "1M write depth 4": Phase(WRITE, 4, MIB)}
SIZE = 256 * MIB
SLICES = 5  # of each round


def runs(options: Options, folder: Path) -> dict[str, Run]:
    job = Job(disks=(disk_image(folder, 16 * MIB if options.smoke else SIZE),))
    monitors = found(("threads", "io_uring"))
    return {monitor.name: partial(run, monitor, job, options) for monitor in monitors if not monitor.lacks(job)}


def run(contender: Contender, job: Job, options: Options) -> Iterator[Figure]:
    results = phases.run(contender, "blk", job, list(CASES.values()), options.seconds)
    for (case, phase), done in zip(CASES.items(), results, strict=True):
        if phase.bytes < MIB:
            yield Figure(case, "IOPS", done.operations / done.seconds)
        else:
            yield Figure(case, "MB/s", done.operations * phase.bytes / done.seconds / 1e6)
        if phase.depth == 1:
            yield Figure(case, "us latency", done.seconds / done.operations * 1e6)
        yield Figure(case, "cpu us", done.cpu / done.operations * 1e6)
        yield Figure(case, "cpu us, I/O", done.cpu_io / done.operations * 1e6)
