"""How fast a guest can print, to a reader that takes it as fast as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import phases
from .contenders import Contender, Job, found
from .harness import Figure, Options, Run
from .phases import Phase

UART, VIRTIO = range(2)  # guests/bench/console.c
CASES = {
    "virtio, 80 bytes": Phase(VIRTIO, 1, 80),
    "virtio, 16 of 4096 bytes": Phase(VIRTIO, 16, 4096),
}
SLICES = 5  # of each round


def runs(options: Options, folder: Path) -> dict[str, Run]:
    return {contender.name: partial(run, contender, options) for contender in found()}


def run(contender: Contender, options: Options) -> Iterator[Figure]:
    yield from figures(contender, Job(), {"UART": Phase(UART, 1, 64)}, options)
    job = Job(console=True)
    if not contender.lacks(job):
        yield from figures(contender, job, CASES, options)


def figures(contender: Contender, job: Job, cases: dict[str, Phase], options: Options) -> Iterator[Figure]:
    results = phases.run(contender, "console", job, list(cases.values()), options.seconds)
    for case, done in zip(cases, results, strict=True):
        yield Figure(case, "KB/s", done.operations / done.seconds / 1e3)
        yield Figure(case, "cpu us/KB", done.cpu / done.operations * 1e9)
