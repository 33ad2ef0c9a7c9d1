"""Runs a guest that goes through phases (guests/bench/bench.h), and takes time and CPU time at their borders."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .contenders import ROOT, Contender, Job
from .harness import Failed

PARAMETERS = struct.Struct("<IIIIQQ")  # behind the first four bytes of the image
PHASE = struct.Struct("<III")
MAX_PHASES = 32
WARMUP = 0.2  # seconds at most
RUN_LIMIT = 300.0  # seconds for one run of one contender
TICK = os.sysconf("SC_CLK_TCK")
KVM_RUN = "16", "0xae80"  # the number of ioctl, the request


class Phase(NamedTuple):
    """What the guest is to do, and how often at once; `kind` and the meaning of `bytes` are the guest's."""

    kind: int
    depth: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """One phase: operations, seconds, CPU seconds of the whole process and of its threads other than vCPUs."""

    operations: int
    seconds: float
    cpu: float
    cpu_io: float


class Border(NamedTuple):
    """The moment at which a phase began or ended: time, CPU time of the process, ticks of each thread."""

    time: float
    cpu: float
    threads: dict[str, int]


class Watch:
    """The times of a process, which is a contender with vCPU threads."""

    def __init__(self, pid: int) -> None:
        self._clock = ~pid << 3 | 2  # CPUCLOCK_SCHED of another process, as clock_getcpuclockid(3) makes it
        self._tasks = Path(f"/proc/{pid}/task")
        self.vcpus: set[str] = set()

    def border(self) -> Border:
        now, cpu = time.perf_counter(), time.clock_gettime(self._clock)
        threads: dict[str, int] = {}
        for task in self._tasks.iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                threads[task.name] = int(fields[11]) + int(fields[12])
        return Border(now, cpu, threads)

    def find_vcpus(self) -> None:
        """Note the threads that are inside KVM_RUN."""
        for task in self._tasks.iterdir():
            with contextlib.suppress(OSError):
                words = (task / "syscall").read_text().split()
                if len(words) > 2 and (words[0], words[2]) == KVM_RUN:
                    self.vcpus.add(task.name)

    def pin(self) -> None:
        """Keep the vCPUs on the last processor: one may be slower than the other, and it would be chance who has it."""
        for task in self.vcpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(task), {max(os.sched_getaffinity(0))})

    def between(self, begin: Border, end: Border, operations: int) -> Measured:
        ticks = sum(n - begin.threads.get(t, 0) for t, n in end.threads.items() if t not in self.vcpus)
        return Measured(operations, end.time - begin.time, end.cpu - begin.cpu, ticks / TICK)


def image(guest: str, contender: Contender, phases: Sequence[Phase], seconds: float) -> bytes:
    """The guest with its parameters; it warms up for a fifth of each phase, but not for long."""
    data = bytearray((ROOT / f"guests/build/bench_{guest}.bin").read_bytes())
    ticks, warmup = int(seconds * tsc_hz()), int(min(seconds / 5, WARMUP) * tsc_hz())
    head = (contender.device, contender.pin, contender.exit_port, len(phases), ticks, warmup)
    PARAMETERS.pack_into(data, 4, *head)
    for number, phase in enumerate(phases):
        PHASE.pack_into(data, 4 + PARAMETERS.size + PHASE.size * number, *phase)
    return bytes(data)


def tsc_hz() -> float:
    """About the rate of the TSC: phases are timed here, the guest only wants to know when to stop."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2]) * 1e6
    return 2e9


def run(
    contender: Contender, guest: str, job: Job, phases: Sequence[Phase], seconds: float, *, pinned: bool = False
) -> list[Measured]:
    """One run of the contender: what came of each phase. `job.image` is made here. With `pinned`, all contenders' vCPUs
    run on the same processor."""
    with tempfile.TemporaryDirectory(prefix="kvmpy-bench-") as folder:
        path = Path(folder) / "guest.bin"
        path.write_bytes(image(guest, contender, phases, seconds))
        command = contender.command(job.with_image(path))
        with open(Path(folder) / "stderr", "w+b") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=contender.env, cwd=ROOT
            )
            limit = threading.Timer(RUN_LIMIT, process.kill)
            limit.start()
            try:
                results = _listen(process, len(phases), pinned)
            finally:
                limit.cancel()
                process.kill()
                process.communicate()
            if len(results) < len(phases) or not all(result.operations for result in results):
                errors.seek(0)
                told = errors.read().decode(errors="replace")[-500:]
                raise Failed(f"did {len(results)} of {len(phases)} phases of {guest}: {told}")
    return results


def _listen(process: subprocess.Popen[bytes], count: int, pinned: bool) -> list[Measured]:
    assert process.stdout is not None
    watch = Watch(process.pid)
    borders: list[tuple[Border, Border, int]] = []
    begin: Border | None = None
    for line in process.stdout:
        if line.startswith(b"B"):
            begin = watch.border()
            watch.find_vcpus()
            if pinned:
                watch.pin()
        elif line.startswith(b"E") and begin is not None:
            borders.append((begin, watch.border(), int(line[1:], 16)))
            watch.find_vcpus()
            begin = None
        if len(borders) == count:
            break
    return [watch.between(*border) for border in borders]  # when all vCPUs are known
