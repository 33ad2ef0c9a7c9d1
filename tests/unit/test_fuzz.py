"""Hostile drivers in volume (scripts/fuzz): every device on both transports, and proof that mistakes are found.

A violation that scripts/fuzz has found and saved in fuzz_cases is tried here for ever after.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts/lib"))

from fuzz import run  # noqa: E402
from fuzz.kinds import KINDS, TRANSPORTS  # noqa: E402
from fuzz.run import Bench, Outcome, make  # noqa: E402
from fuzz.shrink import load  # noqa: E402

from kvmpy.core.memory import GuestMemory  # noqa: E402
from kvmpy.host.disk import Raw  # noqa: E402
from kvmpy.host.fuse import FuseServer  # noqa: E402
from kvmpy.virtio.blk import Blk  # noqa: E402
from kvmpy.virtio.net import Net  # noqa: E402
from kvmpy.virtio.queue import Chain, VirtQueue  # noqa: E402
from kvmpy.virtio.rng import Rng  # noqa: E402

CHAINS = 20_000
FEW = 40  # cases, among which a planted mistake must show
CASES = sorted((Path(__file__).parent / "fuzz_cases").glob("*.json"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What came of each device and transport, all tried in one run of scripts/fuzz."""
    figures = tmp_path_factory.mktemp("fuzz") / "figures.json"
    command = [ROOT / "scripts/fuzz", "--chains", str(CHAINS), "--jobs", "2", "--no-save", "--json", figures]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    assert figures.exists(), done.stdout
    return {(one["device"], one["transport"]): one for one in json.loads(figures.read_text())}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("device", KINDS)
def test_no_violation(device: str, transport: str, results: dict[tuple[str, str], dict[str, Any]]) -> None:
    """And chains do come back: a harness whose requests are all refused would find nothing."""
    result = results[device, transport]

    assert result["failures"] == []
    assert result["chains"] >= CHAINS // len(results)
    assert result["served"] > result["chains"] // 5


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_what_was_found_before(path: Path, bench: Bench) -> None:
    assert bench.run(load(path), "both").what == ""


def test_a_seed_is_a_case() -> None:
    assert make("blk", "pci", "7/3") == make("blk", "pci", "7/3") != make("blk", "pci", "7/4")


# Mistakes that devices could make.


def first(bench: Bench, device: str, engine: str = "python") -> Outcome:
    """The first violation among some cases."""
    outcomes = (bench.run(make(device, "mmio", f"planted/{number}"), engine) for number in range(FEW))
    return next((outcome for outcome in outcomes if outcome.kind), Outcome("", "", 0))


def counts_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    push = VirtQueue.push

    def wrong(self: VirtQueue, *chains: Chain) -> None:
        for chain in chains:
            chain.written += 1
        push(self, *chains)

    monkeypatch.setattr(VirtQueue, "push", wrong)


def believes_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: GuestMemory, gpa: int, size: int) -> memoryview:
        region = max((r for r in self.regions if r.gpa <= gpa), key=lambda r: r.gpa)
        return region.buf[gpa - region.gpa : gpa - region.gpa + size]

    monkeypatch.setattr(GuestMemory, "window", wrong)


def writes_to_readable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Chain.write

    def wrong(self: Chain, data: bytes, at: int | None = None) -> int:
        if self.readable and len(self.readable[0]):
            self.readable[0][0] ^= 0xFF
        return write(self, data, at)

    monkeypatch.setattr(Chain, "write", wrong)


def writes_behind_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Rng, index: int, queue: VirtQueue) -> None:
        for chain in queue.available():
            end = sum(queue.mem.address(chain.writable[-1]) + len(chain.writable[-1]) for _ in chain.writable[-1:])
            chain.write(os.urandom(min(chain.capacity, 1 << 16)))
            queue.mem.poke(end, b"!")  # type: ignore[attr-defined]
            queue.push(chain)

    monkeypatch.setattr(Rng, "notify", wrong)


def forgets_the_end_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blk, "_has", lambda self, sector, length: sector < 1 << 20)


def writes_a_sector_more(monkeypatch: pytest.MonkeyPatch) -> None:
    writev = Raw.writev

    def wrong(self: Raw, offset: int, buffers: Sequence[memoryview]) -> None:
        writev(self, offset, [*buffers, memoryview(bytes(512))])

    monkeypatch.setattr(Raw, "writev", wrong)


def answers_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Rng, index: int, queue: VirtQueue) -> None:
        chains = list(queue.available())
        for chain in reversed(chains):
            chain.write(bytes(min(chain.capacity, 1 << 16)))
            queue.push(chain)

    monkeypatch.setattr(Rng, "notify", wrong)


def never_comes_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    notify = Rng.notify

    def wrong(self: Rng, index: int, queue: VirtQueue) -> None:
        notify(self, index, queue)
        queue.more = True

    monkeypatch.setattr(Rng, "notify", wrong)


def never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Rng, index: int, queue: VirtQueue) -> None:
        while True:
            pass

    monkeypatch.setattr(Rng, "notify", wrong)
    monkeypatch.setattr(run, "SECONDS", 0.05)


def raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rng, "notify", lambda self, index, queue: queue.pop().none)


def logs_what_the_guest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rng, "notify", lambda self, index, queue: self.board.log("rng", why="x" * 10_000))


def leaves_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FuseServer, "close", lambda self: None)


def loses_a_byte_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    outgoing = Net._outgoing
    monkeypatch.setattr(Net, "_outgoing", lambda self, chain: (outgoing(self, chain) or [b""])[:-1] or None)


def keeps_its_place_over_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = VirtQueue.reset

    def wrong(self: VirtQueue) -> None:
        place = getattr(self, "_next_avail", 0)
        reset(self)
        self._next_avail = place

    monkeypatch.setattr(VirtQueue, "reset", wrong)


PLANTED = [
    (counts_one_more, "rng", {"used.len"}),
    (counts_one_more, "console", {"used.len"}),
    (believes_lengths, "blk", {"bad-chain", "exception"}),
    (writes_to_readable_memory, "blk", {"memory"}),
    (writes_behind_the_chain, "rng", {"memory"}),
    (forgets_the_end_of_the_disk, "blk", {"status", "file"}),
    (writes_a_sector_more, "blk", {"file"}),
    (answers_in_any_order, "rng", {"head"}),
    (never_comes_to_rest, "rng", {"rest"}),
    (never_ends, "rng", {"time"}),
    (raises, "rng", {"exception"}),
    (logs_what_the_guest_says, "rng", {"log"}),
    (leaves_files_open, "fs", {"descriptors"}),
    (loses_a_byte_of_a_frame, "net", {"wire"}),
    (keeps_its_place_over_a_reset, "rng", {"recovery", "head", "bad-chain"}),
]


@pytest.mark.parametrize(("mistake", "device", "kinds"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_planted_mistakes_are_found(
    mistake: Callable[[pytest.MonkeyPatch], None],
    device: str,
    kinds: set[str],
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)

    assert first(bench, device).kind in kinds


def test_twins_that_differ_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python that says something where C does not; neither does anything that the model forbids."""
    read = Blk._in

    def wrong(self: Blk, *request: Any) -> int:
        self.board.log("a read")
        return read(self, *request)

    monkeypatch.setattr(Blk, "_in", wrong)

    assert first(bench, "blk", "both").kind == "twins"


DIES = """
import ctypes, sys
sys.path[:0] = [{root!r}, {root!r} + "/scripts/lib"]
from fuzz import runner
from fuzz.run import make
from kvmpy.virtio.rng import Rng

def behind(self, index, queue):
    region = self.board.mem.regions[{region}]
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(region.buf)) + {offset}, 0, 1)

Rng.notify = behind
print(runner.attempt(make("rng", "mmio", "0/0"), "python").what)
"""


@pytest.mark.parametrize(("region", "offset"), [(0, "len(region.buf)"), (1, "len(region.buf)"), (0, "-1"), (1, "-1")])
def test_an_access_outside_ram_ends_the_process(region: int, offset: str) -> None:
    script = DIES.format(root=str(ROOT), region=region, offset=offset)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.stdout == "the process was ended by SIGSEGV\n"
