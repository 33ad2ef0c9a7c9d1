"""What an exit does to the vCPU's thread: answered by a device, or the end of the machine, never a spin."""

from __future__ import annotations

import pytest
from rig import ASK, END, REPORT, Access, Rig

from kvmpy.core.board import Reason, Stop
from kvmpy.core.errors import KvmError
from kvmpy.kvm import exits

REQUEST_INTERRUPT_WINDOW = 0  # offset in struct kvm_run
DONE = Stop(Reason.EXIT)


class Fault(Exception):
    """What a broken device raises."""


def fail(*_: object) -> int:
    raise Fault("the cat is on the bus")


def test_exits_at_full_speed_arrive_once_and_in_order(vm: Rig) -> None:
    times = 5000
    vm.answer([0] * (times - 1) + [1])

    stop = vm.run("count")

    assert stop == DONE
    expected = [
        access for n in range(1, times + 1) for access in (Access("write", REPORT, 4, n), Access("read", ASK, 1, 0))
    ]
    expected[-1:] = [Access("read", ASK, 1, 1), Access("write", REPORT, 4, times)]
    assert vm.board.log == expected


def test_user_mode_reaches_ports(vm: Rig) -> None:
    vm.answer([0, 0, 1])

    vm.start("user")
    vm.board.wait_until(lambda: len(vm.board.log) == 4)

    assert [report & 3 for report in vm.reports] == [3]  # CPL, in CS
    assert [a.value for a in vm.board.log[1:]] == [0, 0, 1]


def test_halt_without_controllers(bare_vm: Rig) -> None:
    assert bare_vm.run("halt") == Stop(Reason.HALT, "vcpu 0")
    assert bare_vm.reports == [1]


def test_triple_fault(vm: Rig) -> None:
    assert vm.run("triple") == Stop(Reason.TRIPLE_FAULT, "vcpu 0")
    assert vm.reports == [1]


@pytest.mark.usefixtures("emulating_kvm")
def test_instruction_that_kvm_cannot_emulate(vm: Rig) -> None:
    stop = vm.run("popcnt")

    popcnt_ebx_eax = bytes.fromhex("f3 0f b8 c3")
    assert stop.reason is Reason.CRASH
    assert "vcpu 0: KVM_EXIT_INTERNAL_ERROR 1: KVM cannot emulate the instruction (f3 0f b8 c3" in stop.detail
    assert exits.failed_instruction(vm.vcpu.page).startswith(popcnt_ebx_eax)
    assert vm.reports == [1]


@pytest.mark.usefixtures("hardware_kvm")
def test_instruction_that_only_hardware_executes(vm: Rig) -> None:
    assert vm.run("popcnt") == DONE
    assert vm.reports == [1, 4]


def test_exit_that_nobody_asked_for_ends_in_a_crash_report(bare_vm: Rig) -> None:
    """KVM_EXIT_IRQ_WINDOW_OPEN is an exit of which the loop knows no more than the name."""
    bare_vm.answer([0, 1])
    bare_vm.load("user")  # runs with interrupts on
    bare_vm.vcpu.page[REQUEST_INTERRUPT_WINDOW] = 1

    stop = bare_vm.run()

    assert stop == Stop(Reason.CRASH, "vcpu 0: KVM_EXIT_IRQ_WINDOW_OPEN")


def test_debug_exit_ends_in_a_crash_report(vm: Rig) -> None:
    enable, single_step = 1 << 0, 1 << 1  # KVM_GUESTDBG_*
    vm.load("count")
    vm.vcpu.set_guest_debug(enable | single_step)

    assert vm.run() == Stop(Reason.CRASH, "vcpu 0: KVM_EXIT_DEBUG")


def test_device_that_raises_in_write(vm: Rig) -> None:
    vm.board.told = fail

    stop = vm.run("halt")

    assert stop.reason is Reason.ERROR
    assert isinstance(stop.cause, Fault)
    assert stop.detail == "Fault in a device: the cat is on the bus"


def test_device_that_raises_in_read(vm: Rig) -> None:
    vm.board.answer = fail

    stop = vm.run("pio")

    assert stop.reason is Reason.ERROR
    assert isinstance(stop.cause, Fault)


def test_mmio_device_that_raises(vm: Rig) -> None:
    vm.devices.answer = fail

    stop = vm.run("mmio")

    assert stop.reason is Reason.ERROR
    assert isinstance(stop.cause, Fault)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_device_that_tries_to_leave_python(vm: Rig, error: type[BaseException]) -> None:
    def leave(access: Access) -> None:
        raise error

    vm.board.told = leave

    stop = vm.run("halt")

    assert stop.reason is Reason.ERROR
    assert isinstance(stop.cause, error)


def test_device_whose_kvm_call_fails(vm: Rig) -> None:
    """The vCPU is well: it is the device's failure."""
    vm.board.told = lambda access: vm.vm.create_irqchip()  # there is one

    stop = vm.run("halt")

    assert stop.reason is Reason.ERROR
    assert isinstance(stop.cause, KvmError)
    assert "KVM_CREATE_IRQCHIP" in stop.detail


def test_device_that_raises_leaves_its_lock_free(vm: Rig) -> None:
    vm.board.told = fail

    vm.run("halt")

    assert vm.board.lock.acquire(blocking=False)


def test_recent_exits_are_kept_for_the_report(vm: Rig) -> None:
    vm.answer([0] * 99 + [1])

    vm.run("count")

    last = [exit[:4] for exit in vm.thread.recent()]
    write_report, read_ask = (exits.EXIT_IO, 1, 4, REPORT), (exits.EXIT_IO, 0, 1, ASK)
    assert last[-5:] == [read_ask, write_report, read_ask, write_report, (exits.EXIT_IO, 1, 1, END)]
    assert len(last) == 32


def test_port_exits_can_be_described(vm: Rig) -> None:
    seen: list[str] = []
    vm.board.told = lambda access: seen.append(exits.describe(vm.vcpu.page))

    vm.run("pio")

    assert seen[-2:] == ["KVM_EXIT_IO in port 0xfff0, 1 x 4 bytes", "KVM_EXIT_IO out port 0xfff8, 1 x 4 bytes"]


def test_mmio_exits_can_be_described(vm: Rig) -> None:
    seen: list[str] = []
    vm.devices.told = lambda access: seen.append(exits.describe(vm.vcpu.page))

    vm.run("mmio")

    assert seen[0] == "KVM_EXIT_MMIO write 0x1122334455667788 to 0xd0000008, 8 bytes"
    assert seen[4] == "KVM_EXIT_MMIO read 0xd0000010, 1 bytes"
    assert len(seen) == 20
