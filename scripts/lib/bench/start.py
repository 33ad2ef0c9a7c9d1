"""From the start of the process to the guest's first instruction, its first byte on the serial port, and the end."""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .contenders import BUILD, ROOT, Contender, Job, found
from .harness import Failed, Figure, Options, Run

RUN_LIMIT = 30.0  # seconds
STARTS = 3  # in each round
SLICES = 5  # of each round
SPAWN = "process start to "


def image(folder: Path, contender: Contender, exit_port: int) -> Path:
    """guests/bench_start.S; it sleeps when the port is 0."""
    data = bytearray((ROOT / "guests/build/bench_start.bin").read_bytes())
    struct.pack_into("<H", data, 4, exit_port)
    path = folder / f"{contender.name}-{exit_port}.bin".replace(" ", "-")
    path.write_bytes(data)
    return path


def runs(options: Options, folder: Path) -> dict[str, Run]:
    return {
        contender.name: partial(run, contender, folder, options) for contender in found(real_mode=True, unlocked=True)
    }


def run(contender: Contender, folder: Path, options: Options) -> Iterator[Figure]:
    job = Job(image(folder, contender, contender.exit_port))
    starts = [once(contender, job, folder / "first") for _ in range(1 if options.smoke else STARTS)]
    for place, (case, unit) in enumerate(
        [("first KVM_RUN", "ms"), ("first byte", "ms"), ("exit", "ms"), ("exit", "cpu ms")]
    ):
        yield Figure(f"{SPAWN}{case}", unit, statistics.median(start[place] for start in starts))


def once(contender: Contender, job: Job, first: Path) -> tuple[float, float, float, float]:
    """Milliseconds to the first KVM_RUN, to the first byte, to the exit; and CPU time, user and system."""
    first.unlink(missing_ok=True)
    env = contender.env | {"LD_PRELOAD": str(BUILD / "first_run.so"), "BENCH_FIRST_RUN": str(first)}
    command = contender.command(job)
    begin = time.monotonic_ns()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd=ROOT
    )
    assert process.stdout is not None
    limit = threading.Timer(RUN_LIMIT, process.kill)
    limit.start()
    said = os.read(process.stdout.fileno(), 1)
    byte = time.monotonic_ns()
    _, status, used = os.wait4(process.pid, 0)
    end = time.monotonic_ns()
    limit.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
    process.communicate()
    if said != b"B" or process.returncode not in (0, 1):  # isa-debug-exit makes 1 of 0
        raise Failed(f"ended with {process.returncode} after {said!r}: {command}")
    run_at = int(first.read_text())
    milliseconds = [(moment - begin) / 1e6 for moment in (run_at, byte, end)]
    return *milliseconds, (used.ru_utime + used.ru_stime) * 1e3
