"""Cases and their outcome: one is performed on each engine, and the engines are compared."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from .generate import Generator
from .kinds import KINDS
from .oracle import Violation
from .ram import Ram
from .rig import Rig

SECONDS = 20  # for a case, which takes milliseconds
GROWTH = 96 << 20  # bytes of RSS that a process may gain after its first cases
SAMPLE = 200  # cases after which these are looked at
WARM = 50


class Case(NamedTuple):
    """What is done to a device, as JSON has it; the seed and the number it was made from, for people."""

    device: str
    transport: str
    seed: str
    ops: list[list[Any]]


class Outcome(NamedTuple):
    """`kind` is empty when all was well."""

    kind: str
    what: str
    chains: int
    served: int = 0
    tangled: int = 0


def make(device: str, transport: str, seed: str) -> Case:
    return Case(device, transport, seed, Generator(KINDS[device](), transport, f"{seed}/{device}/{transport}").case())


def scratch(home: Path | None = None) -> Path:
    """A new folder in `home`; by default in memory, where the host has that."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="kvmpy-fuzz-", dir=home or shm))


class Bench:
    """Runs cases in this process; files are in a folder of its own, in memory where the host has that."""

    def __init__(self, home: Path | None = None) -> None:
        self.folder = scratch(home)
        self._ram = Ram()
        self._number = 0
        self._least = 0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, case: Case, engine: str) -> Outcome:
        """`engine`: "python", "c", or "both", which are compared then."""
        twin = KINDS[case.device].TWIN
        engines = [engine] if engine != "both" else ["python", "c"] if twin else ["python"]
        traces = []
        outcome = Outcome("", "", 0)
        for one in engines:
            outcome, trace = self._one(case, one, watch=len(engines) > 1)
            if outcome.kind:
                return outcome._replace(what=f"{one}: {outcome.what}")
            traces.append(trace)
        if len(traces) > 1 and not any(op[0] in ("race", "flip") for op in case.ops):
            for number, (first, second) in enumerate(zip(*traces, strict=True)):
                if first != second:
                    names = "RAM status logs host".split()
                    odd = [name for name, a, b in zip(names, first, second, strict=True) if a != b]
                    what = f"after operation {number}, {case.ops[number][:2] if number < len(case.ops) else 'reset'}"
                    return outcome._replace(kind="twins", what=f"{what}: {', '.join(odd)} differ")
        return outcome

    def _one(self, case: Case, engine: str, *, watch: bool) -> tuple[Outcome, list[Any]]:
        folder = self.folder / "case"
        folder.mkdir()
        before = len(os.listdir("/proc/self/fd"))
        rig = None
        try:
            with _time_limit(SECONDS):
                rig = Rig(KINDS[case.device](), case.transport, engine, self._ram, folder)
                try:
                    for op in case.ops:
                        rig.perform(op)
                        if watch:
                            rig.observe()
                    rig.recover()
                    if watch:
                        rig.observe()
                finally:
                    rig.close()
            self._bounds(before)
        except Violation as error:
            return Outcome(error.kind, str(error), rig.chains if rig else 0), []
        except Exception as error:
            lines = traceback.format_exception(error)[-6:]
            return Outcome("exception", f"{type(error).__name__}: {error}\n{''.join(lines)}", 0), []
        finally:
            shutil.rmtree(folder)
        return Outcome("", "", rig.chains, rig.oracle.served, rig.oracle.tangled), rig.trace

    def _bounds(self, descriptors: int) -> None:
        """Descriptors, threads and memory of this process."""
        now = len(os.listdir("/proc/self/fd"))
        if now > descriptors:
            gc.collect()
            now = len(os.listdir("/proc/self/fd"))
        if now > descriptors:
            raise Violation("descriptors", f"{now - descriptors} are left open")
        if threading.active_count() > 1 and any(t.name.startswith("fuzz") for t in threading.enumerate()):
            raise Violation("threads", f"{threading.active_count()} run")
        self._number += 1
        if self._number % SAMPLE == WARM:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            self._least = self._least or resident
            if resident > self._least + GROWTH:
                raise Violation("memory-use", f"{resident - self._least >> 20} MiB more than after the first cases")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expired(number: int, frame: FrameType | None) -> None:
        raise Violation("time", f"a case takes more than {seconds} s\n{''.join(traceback.format_stack(frame)[-4:])}")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(TypeError):
            signal.signal(signal.SIGALRM, before)
