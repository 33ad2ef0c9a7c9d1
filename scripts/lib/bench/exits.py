"""What one exit to the monitor costs, with the guest's own loop around it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import phases
from .contenders import Contender, Job, disk_image, found
from .harness import Figure, Options, Run
from .phases import Phase

CASES = (  # guests/bench/exits.c
    "port read, line status",
    "port write, POST code",
    "port read, scratch",
    "port write, scratch",
    "MMIO read",
    "MMIO write",
    "string output, 64 bytes",
    "notify",
)
SLICES = 10  # of each round


def runs(options: Options, folder: Path) -> dict[str, Run]:
    job = Job(disks=(disk_image(folder),))
    return {contender.name: partial(run, contender, job, options) for contender in found(unlocked=True)}


def run(contender: Contender, job: Job, options: Options) -> Iterator[Figure]:
    cases = [Phase(kind) for kind in range(len(CASES))]
    results = phases.run(contender, "exits", job, cases, options.seconds, pinned=True)
    for case, done in zip(CASES, results, strict=True):
        yield Figure(case, "us", done.seconds / done.operations * 1e6)
        yield Figure(case, "cpu us", done.cpu / done.operations * 1e6)  # says more on a busy host
