"""How long one waits for a machine whose disk is busy and whose other vCPUs exit at full speed."""

from __future__ import annotations

import json
import math
import os
import random
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import phases
from .contenders import BUILD, MIB, Contender, Job, Kvmpy, Qemu, disk_image, found
from .harness import Failed, Figure, Options, Run
from .phases import Phase

READ, DEPTH, SIZE = 0, 32, 4096  # guests/bench/blk.c
CPUS = max(2, os.cpu_count() or 1)
LOAD_SECONDS = 60.0  # the guest goes on for so long if nobody ends it
SAMPLES = 300
GAP = 0.005  # seconds between two samples, on average
PATIENCE = 5.0  # seconds for one sample
LOOK = 0.00005  # seconds between two looks into the guest's memory
AP_KEYS = 0x8808  # guests/bench/start.S
HUGE_PAGE = 2 * MIB


def runs(options: Options, folder: Path) -> dict[str, Run]:
    job = Job(cpus=CPUS, disks=(disk_image(folder, 16 * MIB),), qmp=folder / "qmp.sock")
    return {monitor.name: partial(run, monitor, job, folder, options) for monitor in found() if not monitor.lacks(job)}


def run(contender: Contender, job: Job, folder: Path, options: Options) -> Iterator[Figure]:
    path = folder / f"{contender.name}.bin".replace(" ", "-")
    path.write_bytes(phases.image("blk", contender, [Phase(READ, DEPTH, SIZE)], LOAD_SECONDS))
    job, count = job.with_image(path), 3 if options.smoke else SAMPLES
    with running(contender, job) as process:
        to_guest, to_echo = keys(process, job.mem * MIB, count)
        yield from figures("key to guest", to_guest)
        yield from figures("key to echo", to_echo)
        if isinstance(contender, Qemu) and job.qmp:
            yield from figures("pause", stops(job.qmp, count))
    if isinstance(contender, Kvmpy):
        words = [BUILD / "venv/bin/python", Path(__file__).parent / "pauses.py", path, *job.disks, CPUS, count, GAP]
        done = subprocess.run([str(word) for word in words], env=contender.env, stdout=subprocess.PIPE, check=True)
        yield from figures("pause", json.loads(done.stdout))


def figures(case: str, seconds: list[float]) -> Iterator[Figure]:
    ordered = sorted(seconds)
    for name, part in (("p50", 0.50), ("p99", 0.99), ("max", 1.0)):
        yield Figure(f"{case} {name}", "ms", ordered[math.ceil(part * len(ordered)) - 1] * 1e3)


@contextmanager
def running(contender: Contender, job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """The contender, its guest having begun with the load."""
    process = subprocess.Popen(
        contender.command(job),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=contender.env,
        bufsize=0,
    )
    try:
        assert process.stdout is not None
        if process.stdout.read(1) != b"B":
            raise Failed(f"does not start: {contender.command(job)}")
        wait()
        process.stdout.read(1)  # the end of that line
        yield process
    finally:
        process.kill()
        process.communicate()


def wait() -> None:
    time.sleep(random.uniform(0, 2 * GAP))


def keys(process: subprocess.Popen[bytes], ram: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds from a key on the console's input until the guest has read it, by polling the UART; and to its echo."""
    assert process.stdin is not None
    assert process.stdout is not None
    to_guest, to_echo = [], []
    with guest_ram(process.pid, ram) as memory:
        for number in range(1, count + 1):
            wait()
            begin = time.perf_counter()
            process.stdin.write(b"k")
            while memory(AP_KEYS) < number:
                time.sleep(LOOK)
                if time.perf_counter() - begin > PATIENCE:
                    raise Failed("did not bring a key to the guest")
            to_guest.append(time.perf_counter() - begin)
            if not select.select([process.stdout], [], [], PATIENCE)[0] or process.stdout.read(1) != b"k":
                raise Failed("gave no echo of a key")
            to_echo.append(time.perf_counter() - begin)
    return to_guest, to_echo


@contextmanager
def guest_ram(pid: int, size: int) -> Iterator[Callable[[int], int]]:
    """What reads four bytes of the RAM of a contender's guest, in its largest mapping: that is as long as the RAM, or
    somewhat longer, with the RAM where huge pages fit."""
    found = max(
        (int(end, 16) - int(begin, 16), int(begin, 16))
        for begin, end in (line.split()[0].split("-") for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    )
    if found[0] < size:
        raise Failed(f"has no mapping of {size} bytes for its guest's RAM")
    start = -(-found[1] // HUGE_PAGE) * HUGE_PAGE
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        yield lambda gpa: struct.unpack("<I", os.pread(memory.fileno(), 4, start + gpa))[0]


def stops(path: Path, count: int) -> list[float]:
    """Seconds that QEMU takes for `stop`; that also waits for the disk's requests."""
    results = []
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        lines = link.makefile("rb")
        lines.readline()  # the greeting

        def command(name: str) -> None:
            link.sendall(json.dumps({"execute": name}).encode() + b"\n")
            while "return" not in (answer := json.loads(lines.readline())):  # events come in between
                if "error" in answer:
                    raise Failed(f"answers {answer}")

        command("qmp_capabilities")
        for _ in range(count):
            wait()
            begin = time.perf_counter()
            command("stop")
            results.append(time.perf_counter() - begin)
            command("cont")
    return results
