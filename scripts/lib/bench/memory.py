"""What a monitor takes beyond its guest's RAM, while the guest sleeps."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from .contenders import MIB, ROOT, Contender, Job, disk_image, found
from .harness import Failed, Figure, Options, Run
from .start import image

RAM = 128  # MiB
SETTLE = 0.3  # seconds from the guest's first byte on
MANY = 8
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def runs(options: Options, folder: Path) -> dict[str, Run]:
    return {
        contender.name: partial(run, contender, folder, 0.0 if options.smoke else SETTLE)
        for contender in found(real_mode=True)
    }


def run(contender: Contender, folder: Path, settle: float) -> Iterator[Figure]:
    plain = Job(image(folder, contender, 0), mem=RAM)
    yield from figures("1 vCPU, 128 MiB", contender, plain, settle)
    disks = tuple(disk_image(folder, name=f"{number}.img") for number in range(MANY))
    with ExitStack() as stack:
        nets = tuple(listener(stack, folder / f"{number}.sock") for number in range(MANY))
        full = Job(plain.image, mem=RAM, disks=disks, nets=nets)
        if not contender.lacks(full):
            yield from figures("8 disks, 8 networks", contender, full, settle)


def listener(stack: ExitStack, path: Path) -> Path:
    """A UNIX socket that takes a connection and says nothing."""
    path.unlink(missing_ok=True)
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(str(path))
    server.listen(1)
    return path


def figures(case: str, contender: Contender, job: Job, settle: float) -> Iterator[Figure]:
    process = subprocess.Popen(
        contender.command(job),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=contender.env,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"B\n":
            process.kill()
            raise Failed(f"does not start: {process.communicate()[1].decode()[-500:]}")
        time.sleep(settle)
        rss, pss = beyond_ram(process.pid, job.mem * MIB)
    finally:
        process.kill()
        process.communicate()
    yield Figure(case, "MiB RSS", rss / MIB)
    yield Figure(case, "MiB PSS", pss / MIB)


def beyond_ram(pid: int, ram: int) -> tuple[int, int]:
    """Bytes of RSS and PSS in mappings that are too small to be the guest's RAM."""
    totals = {"Rss": 0, "Pss": 0}
    counts = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            counts = int(found[2], 16) - int(found[1], 16) < ram
        elif counts and (key := line.partition(":")[0]) in totals:
            totals[key] += int(line.split()[1]) * 1024
    return totals["Rss"], totals["Pss"]
