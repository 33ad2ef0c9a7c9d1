"""What is read of real vCPUs after their end."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rig import LOAD, MMIO, RAM, SECONDS, Rig, emulates_kernel_code

from kvmpy.core.board import Reason
from kvmpy.evidence import MP_STATE_HALTED, Activity, Cpu, examine
from kvmpy.kvm import exits
from kvmpy.kvm.state import Regs
from kvmpy.x86 import layout, longmode

DIRECTORY = layout.PAGE_TABLES + 2 * layout.PAGE  # the first page directory of longmode.identity_map
MODES = {
    "real": lambda sregs, mem: longmode.real_mode(sregs),
    "protected": longmode.protected_mode,
    "long": longmode.long_mode,
}


def examined(vm: Rig) -> Cpu:
    return examine(vm.thread, vm.mem, vm.ports, vm.mmio)


def enter(vm: Rig, code: str, *, mode: str = "real") -> None:
    """Machine code to LOAD, the first vCPU to it."""
    vm.mem.write(LOAD, bytes.fromhex(code))
    vcpu = vm.add_vcpu()
    sregs = vcpu.sregs()
    MODES[mode](sregs, vm.mem)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=LOAD, rsp=LOAD))


def wait_halted(vm: Rig) -> None:
    """Until the first vCPU is in HLT."""
    while True:
        with vm.thread.paused() as vcpu:
            if vcpu.mp_state() == MP_STATE_HALTED:
                return


def test_triple_fault(vm: Rig) -> None:
    stop = vm.run("triple")

    cpu = examined(vm)

    assert stop.reason is Reason.TRIPLE_FAULT
    assert cpu.fatal == "KVM_EXIT_SHUTDOWN"
    assert cpu.was_reset or cpu.code[0].text == "ud2"


def test_code_and_stack_are_read_through_the_page_tables(vm: Rig) -> None:
    enter(vm, "", mode="long")
    vm.mem.write(DIRECTORY, struct.pack("<Q", 0x200083))  # virtual 0 is physical 2 MiB, so LOAD is:
    vm.mem.write(0x200000 + LOAD, bytes.fromhex("6a01 6a02 6a03 b000 e6f4 ebfe"))  # three pushes, END 0, jmp $
    vm.run()

    cpu = examined(vm)

    assert cpu.mode == "64-bit mode, ring 0"
    assert cpu.stack[:3] == (3, 2, 1)
    assert [instruction.text for instruction in cpu.before] == ["push 3", "mov al, 0", "out 0xf4, al"]
    assert cpu.code[0].text == f"jmp {LOAD + 10:#x}"
    assert cpu.loop


def test_code_and_stack_that_are_not_mapped(vm: Rig) -> None:
    enter(vm, "", mode="long")
    vm.vcpu.set_regs(Regs(rip=0xFFFF800000000000, rsp=0xDEAD0000))

    cpu = examined(vm)

    assert (cpu.before, cpu.code, cpu.stack) == ((), (), ())


def test_code_that_ends_with_the_memory(vm: Rig) -> None:
    vm.mem.write(RAM - 3, bytes.fromhex("b001f4"))
    enter(vm, "", mode="protected")
    vm.vcpu.set_regs(Regs(rip=RAM - 3))

    cpu = examined(vm)

    assert [instruction.text for instruction in cpu.code] == ["mov al, 1", "hlt"]


def test_accesses_are_counted_with_their_devices(vm: Rig) -> None:
    enter(vm, "b90300 e410 e2fc b000 e6f4")  # in al,10h three times; END 0
    vm.run()

    cpu = examined(vm)

    kinds = [(kind.what, kind.address, kind.size, kind.device, kind.count) for kind in cpu.exits]
    assert kinds == [("out", 0xF4, 1, "EndPort", 1), ("in", 0x10, 1, "Recorder", 3)]


def test_memory_accesses_are_counted_too(vm: Rig) -> None:
    store = "c705" + struct.pack("<I", MMIO).hex() + "78563412"  # mov dword [MMIO], 12345678h

    enter(vm, f"{store} {store} b000 e6f4", mode="protected")
    vm.run()

    cpu = examined(vm)

    assert cpu.mode == "32-bit protected mode, ring 0, paging off"
    kinds = [(kind.what, kind.address, kind.size, kind.count) for kind in cpu.exits]
    assert kinds == [("out", 0xF4, 1, 1), ("write", MMIO, 4, 2)]


@pytest.mark.skipif(not emulates_kernel_code(), reason="this host's KVM runs every instruction of ring 0")
def test_instruction_that_kvm_lacks(vm: Rig) -> None:
    enter(vm, "f3480fb8c3 f4", mode="long")
    vm.run()

    cpu = examined(vm)

    assert cpu.suberror == exits.EMULATION
    assert cpu.code[0].text == "popcnt rax, rbx"


@pytest.mark.parametrize(("code", "activity"), [("fa f4", Activity.HALTED), ("fb f4", Activity.IDLE)])
def test_halted_cpu(vm: Rig, code: str, activity: Activity) -> None:
    enter(vm, f"{code} b001 e610")
    vm.start()
    wait_halted(vm)
    vm.finish()

    assert examined(vm).activity is activity


def test_cpu_that_was_never_started(vm: Rig) -> None:
    vm.run("pio", cpus=2)

    assert examine(vm.threads[1], vm.mem, vm.ports, vm.mmio).activity is Activity.WAITING


def test_cpu_that_a_device_holds_is_not_waited_for(vm: Rig) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold(port: int, size: int) -> int:
        entered.set()
        release.wait(SECONDS)
        return 0

    vm.board.answer = hold
    enter(vm, "e410 b000 e6f4")
    vm.start()
    entered.wait(SECONDS)
    vm.thread.end()

    cpu = examined(vm)
    release.set()

    assert cpu.activity is Activity.BUSY
    assert cpu.regs is None
    assert [(kind.what, kind.address, kind.device) for kind in cpu.exits] == [("in", 0x10, "Recorder")]


def test_report_of_the_command_line(tmp_path: Path) -> None:
    image = tmp_path / "sector.bin"
    # "Oops ESC[2J" to COM1, then lidt of zeros, protected mode, ud2
    code = "be207c b90800 baf803 ac ee e2fc 0f011e407c 0f20c0 0c01 0f22c0 0f0b"
    image.write_bytes(bytes.fromhex(code).ljust(0x20, b"\0") + b"Oops\x1b[2J".ljust(512 - 0x20, b"\0"))
    command = [sys.executable, "-m", "kvmpy", "boot", "--boot", "flat", "--mem", "1M", str(image)]

    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)

    lines = done.stderr.decode().split("\n")
    assert done.returncode == 254
    assert done.stdout == b"Oops\x1b[2J"
    assert lines[0] == "kvmpy: triple fault (vcpu 0)"
    assert "  | Oops" in lines
    assert "-> an exception had no handler, nor had the double fault" in lines
    assert "\x1b" not in done.stderr.decode()
