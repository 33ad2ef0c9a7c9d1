"""Many machines, one after the other and side by side: nothing is left of them, and nothing grows.

KVMPY_LIVES=1000 and KVMPY_AT_ONCE=100 are for patient people; by default there are fewer.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import kvmpy
from kvmpy import Reason
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.net import Net
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.vsock import Vsock

SECONDS = 60.0
LIVES = int(os.environ.get("KVMPY_LIVES", "100"))
AT_ONCE = int(os.environ.get("KVMPY_AT_ONCE", "20"))
WARM = 30  # lives until all is loaded that is loaded once, and heaps have their size
OBJECTS = 2  # of Python for each further life, at most: a machine has thousands
GROWTH = 16 << 10 if LIVES < 500 else 2 << 10  # bytes of memory for each, at most: the smallest VM has a hundred pages
SAY_AND_LEAVE = bytes.fromhex("baf803 b078 ee ba0006 b034 ee fa f4")
SAY_AND_WAIT = bytes.fromhex("baf803 b078 ee fb f4 ebfc")  # ...; sti; hlt; jmp back


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Callable[[], list[kvmpy.VirtioDevice]]]:
    """One of each kind, as often as it is called."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "share").mkdir()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.bind(str(tmp_path / "net"))
        peer.listen()
        peer.setblocking(False)

        def make() -> list[kvmpy.VirtioDevice]:
            with suppress(BlockingIOError):  # of earlier cards
                peer.accept()[0].close()
            net = Net(backend="socket", path=tmp_path / "net")
            return [Blk(path=tmp_path / "disk"), net, Fs(path=tmp_path / "share", tag="t"), Vsock(), Rng(), Balloon()]

        yield make


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def used() -> tuple[int, int, int]:
    """Descriptors, threads and mappings of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count(), Path("/proc/self/maps").read_text().count("\n")


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def slope(values: list[int]) -> float:
    """Of the straight line that is nearest to them."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((at - middle) ** 2 for at in range(len(values)))
    return sum((at - middle) * (value - mean) for at, value in enumerate(values)) / spread


def live(kernel: Path, number: int, devices: list[kvmpy.VirtioDevice]) -> None:
    """One machine, from its making to its end."""
    transport = "pci" if number % 2 else "mmio"
    machine = kvmpy.Machine(kernel=kernel, mem="2M", cpus=1 + number % 2, transport=transport)
    for device in devices:
        machine.add(device)
    stop = machine.run(SECONDS)
    machine.close()
    assert (stop.reason, machine.console.text) == (Reason.POWEROFF, "x")


@pytest.mark.parametrize("full", [False, True], ids=["plain", "all devices"])
@pytest.mark.timeout(60 + LIVES)
def test_one_after_the_other(
    image: Callable[[bytes], Path], devices: Callable[[], list[kvmpy.VirtioDevice]], full: bool
) -> None:
    kernel = image(SAY_AND_LEAVE)
    memory: list[int] = []

    for life in range(LIVES):
        live(kernel, life, devices() if full else [])
        memory.append(resident())
        if life == WARM:
            gc.collect()
            before, objects = used(), len(gc.get_objects())

    gc.collect()
    fds, threads, maps = used()
    assert (fds, threads) == before[:2]
    assert maps <= before[2] + 8  # heaps of threads come and go; each machine has five mappings
    assert len(gc.get_objects()) <= objects + OBJECTS * (LIVES - WARM)
    assert slope(memory[WARM:]) < GROWTH


@pytest.mark.usefixtures("many_descriptors")
def test_side_by_side_in_one_process(image: Callable[[bytes], Path]) -> None:
    kernel = image(SAY_AND_WAIT)
    with kvmpy.Machine(kernel=kernel, mem="1M") as machine:
        machine.wait_for_console("x")
    before = used()

    machines = [kvmpy.Machine(kernel=kernel, mem="1M") for _ in range(AT_ONCE)]
    for machine in machines:
        machine.start()
    said = [machine.wait_for_console("x", SECONDS) for machine in machines]
    together = used()
    for machine in machines:
        machine.close()

    assert said == ["x"] * AT_ONCE
    assert together[1] >= before[1] + 3 * AT_ONCE
    assert used()[:2] == before[:2]


def test_side_by_side_in_processes_of_their_own(image: Callable[[bytes], Path]) -> None:
    command = [sys.executable, "-m", "kvmpy", "boot", "--mem", "1M", "--quiet", str(image(SAY_AND_WAIT))]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(max(4, AT_ONCE // 5) if AT_ONCE < 100 else AT_ONCE)
    ]
    try:
        said = [os.read(process.stdout.fileno(), 1) for process in processes if process.stdout is not None]
        for process in processes:
            process.terminate()
        ended = [(process.communicate(timeout=SECONDS), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert said == [b"x"] * len(processes)
    assert ended == [((b"", b""), 128 + 15)] * len(processes)
