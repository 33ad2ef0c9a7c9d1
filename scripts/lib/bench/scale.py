"""More of it: vCPUs that exit at the same time, machines at the same time, machines one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import phases
from .contenders import BUILD, MIB, Contender, Job, Kvmpy, found
from .harness import Failed, Figure, Options, Run
from .memory import RAM, beyond_ram
from .phases import Phase
from .start import image

CPUS = (1, 2, 4, 8)
PORTS = {"line status": 0x3FD, "scratch": 0x3FF}  # of COM1
MACHINES = 50
LIVES = 300


def runs(options: Options, folder: Path) -> dict[str, Run]:
    return {contender.name: partial(run, contender, folder, options) for contender in found(real_mode=True)}


def run(contender: Contender, folder: Path, options: Options) -> Iterator[Figure]:
    for cpus in CPUS[1:2] if options.smoke else CPUS:
        job = Job(cpus=cpus)
        if not contender.lacks(job):
            yield from exits(contender, job, options)
    yield from at_once(contender, folder, 2 if options.smoke else MACHINES)
    if isinstance(contender, Kvmpy):
        yield from in_one_process(contender, folder, 2 if options.smoke else LIVES)


def exits(contender: Contender, job: Job, options: Options) -> Iterator[Figure]:
    results = phases.run(contender, "smp", job, [Phase(0, bytes=port) for port in PORTS.values()], options.seconds)
    for name, done in zip(PORTS, results, strict=True):
        rate = done.operations / done.seconds
        yield Figure(f"{job.cpus} vCPUs, {name}", "exits/s", rate)
        yield Figure(f"{job.cpus} vCPUs, {name}", "cpu us", done.cpu / done.operations * 1e6)


def at_once(contender: Contender, folder: Path, count: int) -> Iterator[Figure]:
    """From the start of the first process to the first byte of the last guest, and the memory of each."""
    command = contender.command(Job(image(folder, contender, 0), mem=RAM))
    processes: list[subprocess.Popen[bytes]] = []
    begin = time.monotonic()
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=contender.env,
                )
            )
        for process in processes:
            assert process.stdout is not None
            if os.read(process.stdout.fileno(), 1) != b"B":
                raise Failed(f"did not start all of {count} machines")
        seconds = time.monotonic() - begin
        pss = sum(beyond_ram(process.pid, RAM * MIB)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
    yield Figure(f"{count} machines at once", "ms", seconds * 1e3)
    yield Figure(f"{count} machines at once", "MiB PSS each", pss / count / MIB)


def in_one_process(contender: Contender, folder: Path, count: int) -> Iterator[Figure]:
    """lives.py: what a machine takes from its making to its end, and what is left behind."""
    command = [
        BUILD / "venv/bin/python",
        Path(__file__).parent / "lives.py",
        image(folder, contender, 0x502),
        str(count),
    ]
    done = subprocess.run(command, env=contender.env, stdout=subprocess.PIPE, check=True)
    facts = json.loads(done.stdout)
    yield Figure(f"{count} machines in one process", "ms each", facts["seconds"] / count * 1e3)
    yield Figure(f"{count} machines in one process", "MiB RSS more", facts["rss"] / MIB)
    yield Figure(f"{count} machines in one process", "descriptors more", facts["descriptors"])
