"""Pauses a machine under load, many times: pauses.py IMAGE DISK CPUS COUNT GAP; prints the seconds of each as JSON."""

from __future__ import annotations

import json
import random
import sys
import time

from kvmpy import Machine


def main() -> None:
    image, disk, cpus, count, gap = sys.argv[1:]
    results = []
    machine = Machine(kernel=image, boot="flat", mem="64M", cpus=int(cpus), devices=[f"virtio-blk,path={disk}"])
    with machine:
        machine.wait_for_console("B\n", timeout=30)
        for _ in range(int(count)):
            time.sleep(random.uniform(0, 2 * float(gap)))
            begin = time.perf_counter()
            machine.pause()
            results.append(time.perf_counter() - begin)
            machine.resume()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
