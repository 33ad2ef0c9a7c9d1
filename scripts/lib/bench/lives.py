"""Makes, runs and takes apart machines one after the other in one process: lives.py IMAGE COUNT."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from kvmpy import Machine


def live(image: str) -> None:
    machine = Machine(kernel=image, boot="flat", mem="16M")
    machine.run(timeout=10)
    machine.close()


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    image, count = sys.argv[1], int(sys.argv[2])
    live(image)  # all modules are there, and what is kept is kept
    before, descriptors, begin = rss(), len(os.listdir("/proc/self/fd")), time.monotonic()
    for _ in range(count):
        live(image)
    seconds = time.monotonic() - begin
    more = len(os.listdir("/proc/self/fd")) - descriptors
    print(json.dumps({"seconds": seconds, "rss": rss() - before, "descriptors": more}))


if __name__ == "__main__":
    main()
