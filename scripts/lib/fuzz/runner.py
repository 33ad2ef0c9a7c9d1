"""Many cases in processes of their own: one that dies is one more outcome, and is known by its seed."""

from __future__ import annotations

import json
import mmap
import os
import selectors
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .kinds import KINDS
from .run import Bench, Case, Outcome, make, scratch

BLOCK = 10_000  # chains of one process
ENOUGH = 5  # failures, after which a process goes no further


class Task(NamedTuple):
    """Cases of one device and transport, from which as many chains come as wanted."""

    device: str
    transport: str
    seed: str
    chains: int


class Result(NamedTuple):
    """What came of a task: `failures` are (seed of the case, kind, what)."""

    device: str
    transport: str
    cases: int
    chains: int
    served: int
    tangled: int
    seconds: float  # of CPU
    failures: list[tuple[str, str, str]]


def tasks(devices: Sequence[str], transports: Sequence[str], seed: str, chains: int) -> list[Task]:
    """The same number of chains for each device and transport, `chains` in all or a few more."""
    pairs = [(device, transport) for device in devices for transport in transports]
    each = -(-chains // len(pairs))
    found = []
    for block in range(-(-each // BLOCK)):
        size = min(BLOCK, each - block * BLOCK)
        found += [Task(device, transport, f"{seed}.{block}", size) for device, transport in pairs]
    return found


def run_all(todo: Sequence[Task], engine: str, jobs: int, told: Callable[[Result], None]) -> list[Result]:
    """Do all of it in up to `jobs` processes at a time; `told` hears of each that has ended."""
    home = scratch()
    waiting, results = list(todo), []
    running: dict[int, tuple[Task, int, mmap.mmap, bytearray]] = {}
    watch = selectors.DefaultSelector()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                place = mmap.mmap(-1, mmap.PAGESIZE)
                pipe, pid = _child(lambda write, task=task, place=place: _work(task, engine, home, place, write))
                running[pipe] = task, pid, place, bytearray()
                watch.register(pipe, selectors.EVENT_READ)
            for key, _ in watch.select():
                task, pid, place, answer = running[key.fd]
                if data := os.read(key.fd, 1 << 16):
                    answer += data
                    continue
                watch.unregister(key.fd)
                del running[key.fd]
                os.close(key.fd)
                results.append(_result(task, os.waitpid(pid, 0)[1], place, answer))
                told(results[-1])
    finally:
        for _, pid, _, _ in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        watch.close()
        shutil.rmtree(home, ignore_errors=True)
    return results


def attempt(case: Case, engine: str) -> Outcome:
    """Run one case in a process of its own."""

    def work(write: int) -> None:
        bench = Bench(home)
        os.write(write, json.dumps(bench.run(case, engine)).encode())

    home = scratch()
    try:
        pipe, pid = _child(work)
        answer = b""
        while data := os.read(pipe, 1 << 16):
            answer += data
        os.close(pipe)
        status = os.waitpid(pid, 0)[1]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return Outcome(*json.loads(answer)) if answer else Outcome("crash", _end(status), 0)


def total(results: Sequence[Result]) -> list[Result]:
    """The results of each device and transport together, in the order of KINDS."""
    found: dict[tuple[str, str], Result] = {}
    for one in results:
        old = found.get(one[:2])
        if old is not None:
            sums = [a + b for a, b in zip(old[2:7], one[2:7], strict=True)]
            one = Result(*one[:2], *sums, old.failures + one.failures)
        found[one[:2]] = one
    return sorted(found.values(), key=lambda one: ([*KINDS].index(one.device), one.transport))


def table(results: Sequence[Result]) -> Iterator[str]:
    """For people."""
    form = "{:<14}{:<6}{:>8}{:>10}{:>12}{:>9}{:>9}  {}"
    yield form.format("device", "", "cases", "chains", "given back", "tangled", "CPU s", "violations")
    for one in results:
        kinds = Counter(kind for _, kind, _ in one.failures)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        yield form.format(*one[:6], f"{one.seconds:.1f}", found)
    sums = [sum(column) for column in zip(*(one[2:7] for one in results), strict=True)]
    count = sum(len(one.failures) for one in results)
    yield form.format("all", "", *sums[:4], f"{sums[4]:.1f}", count or "none")


def _child(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does `work` with the end of a pipe that it writes to; the other end, and its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return read, pid
    status = 1
    try:
        os.close(read)
        work(write)
        status = 0
    finally:
        os._exit(status)


def _work(task: Task, engine: str, home: Path, place: mmap.mmap, write: int) -> None:
    bench = Bench(home)
    begin = time.process_time()
    cases = chains = served = tangled = 0
    failures = []
    while chains < task.chains and len(failures) < ENOUGH:
        place[:8] = cases.to_bytes(8, "little")
        seed = f"{task.seed}/{cases}"
        outcome = bench.run(make(task.device, task.transport, seed), engine)
        cases += 1
        chains += max(outcome.chains, 1)
        served += outcome.served
        tangled += outcome.tangled
        if outcome.kind:
            failures.append((seed, outcome.kind, outcome.what))
    seconds = time.process_time() - begin
    result = Result(task.device, task.transport, cases, chains, served, tangled, seconds, failures)
    data = memoryview(json.dumps(result).encode())
    while data:
        data = data[os.write(write, data) :]


def _result(task: Task, status: int, place: mmap.mmap, answer: bytearray) -> Result:
    if answer and not status:
        *numbers, failures = json.loads(answer)
        return Result(*numbers, [tuple(failure) for failure in failures])
    number = int.from_bytes(place[:8], "little")
    failure = (f"{task.seed}/{number}", "crash", _end(status))
    return Result(task.device, task.transport, number + 1, 0, 0, 0, 0.0, [failure])


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
