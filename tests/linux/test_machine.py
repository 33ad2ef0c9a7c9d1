"""A running Linux from Python: its console, registers, memory, power button, and devices of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmpy

MMIO, PORT = 0xD800_0000, 0x5E0
LIMIT = 150.0  # seconds, for anything the guest does


class Doubler(kvmpy.RegisterDevice, span=8, stride=4):
    """Reads give twice what was written last; a device in a user's own file."""

    VALUE = kvmpy.Reg(0)
    WRITES = kvmpy.Reg(4, write=0)

    def attach(self, board: kvmpy.Board) -> None:
        board.mmio(self.SPAN, self, MMIO)
        board.cmdline("doubler=here")

    def write_VALUE(self, value: int) -> None:
        self.VALUE = 2 * value
        self.WRITES += 1


class Dice(kvmpy.RegisterDevice, span=1):
    """One port that always rolls the same."""

    ROLL = kvmpy.Reg(0, reset=4, write=0)

    def attach(self, board: kvmpy.Board) -> None:
        board.pio(PORT, self.SPAN, self)


@pytest.fixture(scope="module")
def vm(cloud: Path) -> Iterator[kvmpy.Machine]:
    """At its prompt, with two CPUs, a Doubler and the drivers of the power button."""
    machine = kvmpy.Machine(kernel=cloud, cpus=2, append="quiet", modules=["evdev", "button"])
    machine.add(Doubler())
    with machine:
        machine.wait_for_console("# ", LIMIT)
        yield machine


def ask(vm: kvmpy.Machine, command: str) -> str:
    """The output of `command` in the guest's shell."""
    vm.console.send(f"echo begin-$((6*7)); {command}; echo end-$((6*7))\n")
    vm.wait_for_console("begin-42\r\n", LIMIT)
    return vm.wait_for_console(r"(?s).*?end-42\r\n", LIMIT).removesuffix("end-42\r\n")


def test_device_of_ones_own(vm: kvmpy.Machine) -> None:
    answer = ask(vm, f"devmem {MMIO:#x} 32 0x21; devmem {MMIO:#x} 32; devmem {MMIO + 4:#x} 32; cat /proc/cmdline")

    assert answer.startswith("0x00000042\r\n0x00000001\r\n")
    assert "doubler=here" in answer


def test_registers_while_it_runs(vm: kvmpy.Machine) -> None:
    vm.console.send("echo spin-$((6*7)); while :; do :; done\n")
    vm.wait_for_console("spin-42", LIMIT)

    seen = [vm.regs(cpu) for _ in range(10) for cpu in (0, 1)]
    paging = vm.sregs(1).cr0 >> 31 & 1
    vm.console.send("\x03")

    assert len({regs.rip for regs in seen}) > 2
    assert all(regs.rflags & 2 for regs in seen)  # a bit that is always set
    assert paging == 1
    assert ask(vm, "echo alive") == "alive\r\n"


def test_memory_while_it_runs(vm: kvmpy.Machine) -> None:
    release = ask(vm, "uname -r").strip()

    found = re.search(rb"Linux version (\S+)", vm.memory.read(16 << 20, 32 << 20))  # where it is loaded

    assert found is not None
    assert found[1].decode() == release


def test_pausing_often_harms_nothing(vm: kvmpy.Machine) -> None:
    vm.console.send("echo go-$((6*7)); i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo counted-$i\n")
    vm.wait_for_console("go-42", LIMIT)

    for _ in range(100):
        with vm.paused() as vcpus:
            before = [vcpu.regs() for vcpu in vcpus]
            assert [vcpu.regs() for vcpu in vcpus] == before

    assert vm.wait_for_console(r"counted-\d+\r", LIMIT) == "counted-20000\r"


def test_power_button(vm: kvmpy.Machine) -> None:
    """It arrives as the key event KEY_POWER (116)."""
    event = "dd bs=24 count=1 <&3 2>/dev/null | od -An -v -tu2 -w2 | tail -n 4"  # struct input_event, without its time
    vm.console.send(f"exec 3</dev/input/event0; echo open-$((6*7)); {event}\n")
    vm.wait_for_console("open-42", LIMIT)

    vm.power_button()

    assert vm.wait_for_console(r"(\s+\d+){4}", LIMIT).split() == ["1", "116", "1", "0"]  # type, code, value


def test_mptable_instead_of_acpi(amd64: Path) -> None:
    """With `acpi=off` the CPUs and interrupts are those of the MP table."""
    dice = f"dd if=/dev/port bs=1 skip={PORT} count=1 2>/dev/null | od -An -tu1"
    script = f"nproc; grep -c IO-APIC.*ttyS0 /proc/interrupts; {dice}"
    machine = kvmpy.Machine(kernel=amd64, cpus=2, append="acpi=off", exec=script)
    machine.add(Dice())

    with machine:
        stop = machine.wait(LIMIT)

    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    assert machine.console.text.split() == ["2", "1", "4"]


def test_paused_machine_can_be_closed(cloud: Path) -> None:
    machine = kvmpy.Machine(kernel=cloud, cpus=2)
    machine.start()
    machine.pause()

    machine.close()

    assert machine.stopped == kvmpy.Stop(kvmpy.Reason.QUIT)
    assert all(vcpu.join(0) for vcpu in machine.vcpus)
