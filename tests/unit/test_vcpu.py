"""The vCPU loop on exits that no test guest can cause, served by a scripted KVM_RUN."""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.core.board import Reason, Stop
from kvmpy.core.bus import Bus
from kvmpy.core.regs import Device
from kvmpy.kvm import exits
from kvmpy.vcpu import VcpuThread

UNKNOWN = 4242
SECONDS = 30.0


class Exit:
    """What one KVM_RUN leaves behind: its result, the exit reason, the union of struct kvm_run."""

    def __init__(self, reason: int, union: bytes = b"", result: int = 0) -> None:
        self.reason, self.union, self.result = reason, union, result


class Ports(Device):
    """Remembers what was written."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append(value)


def outb(value: int) -> Exit:
    """KVM_EXIT_IO; the data is put where data_offset says by `run`."""
    return Exit(exits.EXIT_IO, struct.pack("<BBHIQB", 1, 1, 0x10, 1, exits.UNION + 16, value))


def run(*script: Exit) -> tuple[list[Stop], list[int], int]:
    """(stops, bytes written to the port, calls of KVM_RUN that were not in the script) of a vCPU with these exits."""
    page = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    left = list(script)
    unasked: list[int] = []

    def kvm_run(fd: int) -> int:
        if not left:
            unasked.append(fd)
            return -errno.EFAULT
        step = left.pop(0)
        struct.pack_into("<I", page, 8, step.reason)
        page[exits.UNION : exits.UNION + len(step.union)] = step.union
        return step.result

    runner: Callable[[], Any] = lambda: kvm_run  # noqa: E731
    vcpu: Any = SimpleNamespace(fd=7, index=3, page=page, runner=runner)
    ports, stops = Ports(), []
    bus = Bus("port")
    bus.add(0x10, 1, ports)
    thread = VcpuThread(vcpu, bus, Bus("mmio"), stops.append)
    thread.start()
    assert thread.join(SECONDS)
    return stops, ports.written, len(unasked)


@pytest.mark.parametrize(
    ("last", "stop"),
    [
        (Exit(UNKNOWN), Stop(Reason.CRASH, "vcpu 3: exit reason 4242")),
        (Exit(0), Stop(Reason.CRASH, "vcpu 3: KVM_EXIT_UNKNOWN")),
        (
            Exit(exits.EXIT_FAIL_ENTRY, struct.pack("<QI", 0x80000021, 3)),
            Stop(Reason.CRASH, "vcpu 3: KVM_EXIT_FAIL_ENTRY hardware entry failure reason 0x80000021"),
        ),
        (
            Exit(exits.EXIT_INTERNAL_ERROR, struct.pack("<II", 2, 0)),
            Stop(Reason.CRASH, "vcpu 3: KVM_EXIT_INTERNAL_ERROR 2: exceptions while delivering another one"),
        ),
        (
            Exit(exits.EXIT_INTERNAL_ERROR, struct.pack("<II", 77, 0)),
            Stop(Reason.CRASH, "vcpu 3: KVM_EXIT_INTERNAL_ERROR 77: unknown suberror"),
        ),
        (Exit(exits.EXIT_SHUTDOWN), Stop(Reason.TRIPLE_FAULT, "vcpu 3")),
        (Exit(exits.EXIT_HLT), Stop(Reason.HALT, "vcpu 3")),
        (
            Exit(exits.EXIT_SYSTEM_EVENT, struct.pack("<II", 1, 0)),
            Stop(Reason.POWEROFF, "KVM_EXIT_SYSTEM_EVENT shutdown"),
        ),
        (Exit(exits.EXIT_SYSTEM_EVENT, struct.pack("<II", 2, 0)), Stop(Reason.RESET, "KVM_EXIT_SYSTEM_EVENT reset")),
        (Exit(exits.EXIT_SYSTEM_EVENT, struct.pack("<II", 3, 0)), Stop(Reason.PANIC, "KVM_EXIT_SYSTEM_EVENT crash")),
        (Exit(exits.EXIT_SYSTEM_EVENT, struct.pack("<II", 9, 0)), Stop(Reason.CRASH, "KVM_EXIT_SYSTEM_EVENT 9")),
        (Exit(0, result=-errno.EFAULT), Stop(Reason.CRASH, "KVM_RUN(vcpu 3): Bad address")),
    ],
    ids=lambda value: value.reason.name if isinstance(value, Stop) else str(value.reason),
)
def test_last_exit_stops_the_machine_once(last: Exit, stop: Stop) -> None:
    stops, written, unasked = run(outb(1), last)

    assert stops == [stop]
    assert written == [1]
    assert unasked == 0


def test_interrupted_runs_are_repeated_and_nothing_is_served_twice() -> None:
    interrupted = Exit(exits.EXIT_INTR, result=-errno.EINTR)
    woken = Exit(exits.EXIT_INTR, result=-errno.EAGAIN)
    left = Exit(exits.EXIT_INTR)

    stops, written, unasked = run(interrupted, outb(1), interrupted, woken, left, outb(2), Exit(exits.EXIT_HLT))

    assert written == [1, 2]
    assert stops == [Stop(Reason.HALT, "vcpu 3")]
    assert unasked == 0
