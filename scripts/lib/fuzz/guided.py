"""Cases that are made from bytes, and atheris, which looks for bytes that reach code where none has been before."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from .generate import Generator
from .kinds import KINDS
from .run import Bench, Case
from .shrink import save

LONGEST = 4096  # bytes of an input


class Bytes(random.Random):
    """Chances that are read from bytes; when these are used up, those of a seed."""

    def __new__(cls, data: bytes) -> Bytes:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        self._data = b""
        super().__init__(len(data))
        self._data, self._at = data, 0

    def getrandbits(self, count: int, /) -> int:
        size = -(-count // 8)
        if self._at + size > len(self._data):
            return super().getrandbits(count)
        self._at += size
        return int.from_bytes(self._data[self._at - size : self._at], "little") & (1 << count) - 1

    def random(self) -> float:
        return self.getrandbits(16) / (1 << 16)


def case(device: str, transport: str, data: bytes) -> Case:
    make = Generator(KINDS[device](), transport, "")
    make.random = Bytes(data)
    return Case(device, transport, data.hex(), make.case())


def search(device: str, transport: str, engine: str, seconds: int, folder: Path) -> None:
    """Ends when the time is over, or at the first violation, which is saved in `folder`: atheris ends the process."""
    import atheris  # not among the developers' tools: only for those who install it

    bench = Bench()
    child = os.fork()
    if child:  # atheris leaves without looking back
        status = os.waitpid(child, 0)[1]
        bench.close()
        raise SystemExit(os.waitstatus_to_exitcode(status) and 1)

    def one(data: bytes) -> None:
        made = case(device, transport, data)
        outcome = bench.run(made, engine)
        if outcome.kind:
            print(outcome.what, save(made, outcome.kind, folder), sep="\n", file=sys.stderr)
            raise AssertionError(outcome.kind)

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-len_control=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()
