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
GROWTH = 64 << 20  # bytes of RSS that a process may gain after its first cases
SAMPLE = 200  # cases after which these are looked at
WARM = 50
VIEW = ("RAM", "status", "log", "host")


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
        self._rams = [Ram(), Ram()]
        self._number = 0
        self._least = 0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, case: Case, engine: str) -> Outcome:
        """`engine`: "python", "c", or "both", which are compared after each operation."""
        engines = [engine] if engine != "both" else ["python", "c"] if KINDS[case.device].TWIN else ["python"]
        before = len(os.listdir("/proc/self/fd"))
        rigs: list[Rig] = []
        kind = what = ""
        try:
            with _time_limit(SECONDS):
                try:
                    for name, ram in zip(engines, self._rams, strict=False):
                        folder = self.folder / name
                        folder.mkdir()
                        rigs.append(Rig(KINDS[case.device](), case.transport, name, ram, folder))
                    self._perform(case, rigs)
                finally:
                    for rig in reversed(rigs):
                        rig.close()
            self._bounds(before)
        except Violation as error:
            kind, what = error.kind, str(error)
        except Exception as error:
            lines = traceback.format_exception(error)[-6:]
            kind, what = "exception", f"{type(error).__name__}: {error}\n{''.join(lines)}"
        for name in engines:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if not rigs:
            return Outcome(kind, what, 0)
        return Outcome(kind, what, rigs[0].chains, rigs[0].oracle.served, rigs[0].oracle.tangled)

    def _perform(self, case: Case, rigs: list[Rig]) -> None:
        alike = not any(op[0] in ("race", "flip") for op in case.ops)
        for number, op in enumerate([*case.ops, None]):
            for rig in rigs:
                try:
                    if op is None:
                        rig.recover()
                    else:
                        rig.perform(op)
                except Violation as error:
                    raise Violation(error.kind, f"{error.args[0].partition(': ')[2]} ({rig.engine})") from None
            if len(rigs) > 1 and alike:
                first, second = (rig.view for rig in rigs)
                odd = [name for name, a, b in zip(VIEW, first, second, strict=True) if a != b]
                if odd:
                    what = op[:2] if op else "the end"
                    raise Violation("twins", f"after operation {number}, {what}: {', '.join(odd)} differ")

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
