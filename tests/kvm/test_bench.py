"""The benchmark works in each row, and its guests count what they do; what it measures is no matter of tests."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import subprocess
import sys
from typing import Any

import pytest
from rig import BINARIES, END, GUESTS, LOAD, MMIO, Rig

from kvmpy.boot.elf import parse
from kvmpy.boot.placement import put_segments
from kvmpy.core.board import Reason, Stop
from kvmpy.x86 import longmode

ROOT = GUESTS.parent
OURS = {"kvmpy", "kvmpy pure"}
QEMU = {"QEMU"} if shutil.which("qemu-system-x86_64") else set[str]()
QEMU_DISKS = {f"{name} {aio}" for name in QEMU for aio in ("threads", "io_uring")}
BARE, UNLOCKED = {"bare C loop"}, {"kvmpy --sandbox off"}

CASES = {  # what each row must have been through, and by whom
    "exits": ("notify", OURS | QEMU | BARE | UNLOCKED),
    "console": ("virtio, 80 bytes", OURS | QEMU),
    "blk": ("4K write depth 128", OURS | QEMU_DISKS),
    "net": ("send 1500 B", OURS | QEMU),
    "start": ("process start to exit", OURS | QEMU | BARE | UNLOCKED),
    "memory": ("8 disks, 8 networks", OURS | QEMU),
    "scale": ("2 vCPUs, scratch", OURS | QEMU),
    "latency": ("key to guest p99", OURS | QEMU),
}

COM1, LINE_STATUS, SCRATCH = 0x3F8, 0x3FD, 0x3FF
CAN_SEND, UP = 0x20, 0x0F
READ_SCRATCH = 2  # guests/bench/exits.c
AP_COUNTS = 0x880C  # guests/bench/bench.h
TICKS = 1000  # as short as can be: one round of the loop


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All rows but linux, once."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, str(ROOT / "scripts/bench"), "all", "--smoke", "--json", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: list[dict[str, Any]] = json.loads(path.read_text())["figures"]
    return found


@pytest.mark.parametrize("row", CASES)
def test_row_has_all_contenders(figures: list[dict[str, Any]], row: str) -> None:
    case, contenders = CASES[row]

    records = [record for record in figures if (record["row"], record["case"]) == (row, case)]

    assert {record["contender"] for record in records} == contenders
    assert all(record["median"] > 0 for record in records if record["unit"] in ("us", "ms", "IOPS", "packets/s"))


def bench_guest(vm: Rig, name: str, at: int, *phases: tuple[int, int, int]) -> None:
    """The guest at `at`, with devices that let it pass (guests/bench/bench.h)."""
    subprocess.run(["make", "-s", "-C", str(GUESTS), "bench"], check=True)
    head = struct.pack("<IIIIQQ", MMIO, 5, END, len(phases), TICKS, 0)
    vm.mem.write(at, (BINARIES / f"bench_{name}.bin").read_bytes())
    vm.mem.write(at + 4, head + b"".join(struct.pack("<III", *phase) for phase in phases))
    vm.board.answer = lambda port, size: CAN_SEND if port == LINE_STATUS else 0
    vm.devices.answer = lambda address, size: UP


def said(vm: Rig) -> str:
    return bytes(vm.board.written(COM1)).decode()


def test_guest_counts_its_exits(vm: Rig) -> None:
    vm.add_vcpu()
    bench_guest(vm, "exits", LOAD, (READ_SCRATCH, 0, 0))
    enter(vm, 0, 0, LOAD)

    assert vm.run() == Stop(Reason.EXIT)

    begin, end = (place for place, access in enumerate(vm.board.log) if access[1:] in ((COM1, 1, 66), (COM1, 1, 69)))
    reads = [access for access in vm.board.log[begin:end] if access.address == SCRATCH]
    assert said(vm) == f"B\nE{len(reads):08x}\n"
    assert len(reads) > 0


@pytest.mark.parametrize("base", [0xF0000, 0xFFFF0000], ids=["below 1 MiB", "below 4 GiB"])
def test_guest_is_a_rom_at_the_reset_vector(vm: Rig, base: int) -> None:
    rom = 0xF0000  # QEMU shows a 64 KiB ROM at both places
    vm.add_vcpu()
    bench_guest(vm, "exits", rom, (READ_SCRATCH, 0, 0))
    vm.vm.set_memory(1, 0xFFFF0000, vm.mem.window(rom, 0x10000))
    enter(vm, 0xF000, base, 0xFFF0)

    assert vm.run() == Stop(Reason.EXIT)
    assert said(vm).startswith("B\nE")


def test_guest_enters_in_long_mode_as_an_elf_kernel(vm: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of Firecracker, which is on none of our machines."""
    monkeypatch.syspath_prepend(ROOT / "scripts/lib")
    elf = importlib.import_module("bench.contenders").elf
    vm.add_vcpu()
    bench_guest(vm, "exits", LOAD, (READ_SCRATCH, 0, 0))

    kernel = parse(memoryview(elf(vm.mem.read(LOAD, 0x10000))))
    put_segments(vm.mem, kernel.segments)
    sregs, regs = vm.vcpu.sregs(), vm.vcpu.regs()
    longmode.long_mode(sregs, vm.mem)
    regs.rip = kernel.entry
    vm.vcpu.set_sregs(sregs)
    vm.vcpu.set_regs(regs)

    assert vm.run() == Stop(Reason.EXIT)
    assert said(vm).startswith("B\nE")


def test_all_cpus_of_the_guest_exit(vm: Rig) -> None:
    """The second one reads as well, and is counted."""
    for _ in range(2):
        vm.add_vcpu()
    bench_guest(vm, "smp", LOAD, (0, 0, SCRATCH))
    enter(vm, 0, 0, LOAD)

    vm.run()

    (others,) = struct.unpack("<I", vm.mem.read(AP_COUNTS, 4))
    assert others > 0


def enter(vm: Rig, selector: int, base: int, rip: int) -> None:
    """The first vCPU to real mode at `rip` in the code segment `selector`."""
    sregs, regs = vm.vcpu.sregs(), vm.vcpu.regs()
    longmode.real_mode(sregs)
    sregs.cs.selector, sregs.cs.base = selector, base
    regs.rip = rip
    vm.vcpu.set_sregs(sregs)
    vm.vcpu.set_regs(regs)
