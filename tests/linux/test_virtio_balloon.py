"""Memory that Linux gives back and gets again (virtio/balloon.py)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import kvmpy
from kvmpy.virtio.balloon import Balloon

LIMIT = 60.0  # seconds, for anything the guest does
SIZE = 64 << 20  # of the balloon, in bytes
SLACK = 16 << 20  # what else a guest takes or gives back meanwhile


def ask(vm: kvmpy.Machine, command: str) -> str:
    """The output of `command` in the guest's shell."""
    vm.console.send(f"echo begin-$((6*7)); {command}; echo end-$((6*7))\n")
    vm.wait_for_console("begin-42\r\n", LIMIT)
    return vm.wait_for_console(r"(?s).*?end-42\r\n", LIMIT).removesuffix("end-42\r\n")


def meminfo(vm: kvmpy.Machine, name: str) -> int:
    """A line of the guest's /proc/meminfo in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", ask(vm, "cat /proc/meminfo"), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_balloon(cloud: Path) -> None:
    balloon = Balloon(stats=1)
    vm = kvmpy.Machine(kernel=cloud, mem="256M", append="quiet", modules=["virtio_mmio", "virtio_balloon"])
    vm.add(balloon)

    def backed() -> int:
        """Bytes of guest RAM that the host has memory for."""
        return vm.memory.resident()

    with vm:
        vm.wait_for_console("# ", LIMIT)
        total = meminfo(vm, "MemTotal")
        told = wait_until(lambda: balloon.stats.get("MEMTOT") == total)
        unused = backed()
        ask(vm, f"dd if=/dev/zero of=/file bs=1M count={SIZE >> 20} 2>/dev/null")
        used = backed()
        ask(vm, "rm /file")
        reported = wait_until(lambda: backed() < used - SIZE // 2)  # free pages, without any balloon

        ask(vm, f"dd if=/dev/zero of=/file bs=1M count={SIZE >> 20} 2>/dev/null; rm /file")
        free = meminfo(vm, "MemFree")
        with balloon.lock:
            balloon.target(SIZE)
        inflated = wait_until(lambda: balloon.actual == SIZE)
        left = meminfo(vm, "MemFree")
        backed_then = backed()
        with balloon.lock:
            balloon.target(0)
        deflated = wait_until(lambda: balloon.actual == 0)
        again = meminfo(vm, "MemFree")

    assert (told, reported, inflated, deflated) == (True, True, True, True)
    assert used - unused > SIZE - SLACK
    assert backed_then < used - SIZE + SLACK
    assert abs(free - left - SIZE) < SLACK
    assert abs(again - free) < SLACK
