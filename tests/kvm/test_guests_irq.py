"""Interrupts reach the guest from every source: timers, lines, eventfds, messages; and other CPUs start."""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Iterator

import pytest
from rig import ASK, LAPIC_WINDOW, REPORT, SECONDS, Access, Rig, emulates_kernel_code

from kvmpy.core.board import Reason, Stop
from kvmpy.kvm.irq import GsiLine, MsiRouter
from kvmpy.vcpu import VcpuThread

DONE = Stop(Reason.EXIT)
EDGE_PIN, LEVEL_PIN = 5, 20
VECTOR = 0x30  # of pin 0 (guests/irq.S)
READY = 1
MESSAGE_VECTOR = 0x51
LAST = 0x20  # a vector of lowest priority
IOAPIC_CHIP = 2  # KVM_IRQCHIP_IOAPIC


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def waiting(vm: Rig) -> Rig:
    """The irq guest, in HLT or on its way there."""
    vm.start("irq")
    vm.board.wait_written(REPORT, [READY])
    return vm


def wait_for_eventfd(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(SECONDS * 1000), "the eventfd was not signalled"
    return os.eventfd_read(fd)


def message_after_all(rig: Rig) -> None:
    """Wait for an interrupt of the lowest priority: when it comes, no other is pending."""
    rig.vm.signal_msi(LAPIC_WINDOW, LAST)
    rig.board.wait_until(lambda: LAST in rig.reports)


def test_pit_through_pic(vm: Rig) -> None:
    assert vm.run("pit") == DONE
    assert vm.reports == [1, 2, 3]


def test_lapic_timer(vm: Rig) -> None:
    assert vm.run("lapic_timer") == DONE
    assert vm.reports == [1, 2, 3, 4]


def test_pit_through_ioapic(waiting: Rig) -> None:
    waiting.vm.set_pit(pit_at_100_hz(waiting.vm.pit()))

    pin_of_pit = 0  # in KVM's default routing; a PC wires it to pin 2
    waiting.board.wait_until(lambda: waiting.reports[:3] == [READY, VECTOR + pin_of_pit, VECTOR + pin_of_pit])


def pit_at_100_hz(state: bytes) -> bytes:
    """struct kvm_pit_state2 with channel 0 in mode 2 (asm/kvm.h: count at 0, rw_mode at 12, mode at 13)."""
    changed = bytearray(state)
    struct.pack_into("<I8xBB", changed, 0, 11932, 3, 2)
    return bytes(changed)


def test_edge_line(waiting: Rig) -> None:
    line = GsiLine(waiting.vm, EDGE_PIN)

    line.pulse()
    waiting.board.wait_written(REPORT, [READY, VECTOR + EDGE_PIN])
    line.pulse()

    waiting.board.wait_written(REPORT, [READY, VECTOR + EDGE_PIN, VECTOR + EDGE_PIN])


def test_level_line_interrupts_until_it_is_lowered(waiting: Rig) -> None:
    line = GsiLine(waiting.vm, LEVEL_PIN)
    lowered = threading.Event()

    def lower_at_the_third(access: Access) -> None:  # the guest reports before its end of interrupt
        if waiting.reports.count(VECTOR + LEVEL_PIN) == 3:
            line.set(False)
            lowered.set()

    waiting.board.told = lower_at_the_third
    line.set(True)
    assert lowered.wait(SECONDS)
    message_after_all(waiting)

    times = 3 + emulates_kernel_code()  # such a KVM ends an interrupt when it delivers it, and takes the next
    assert waiting.reports == [READY] + [VECTOR + LEVEL_PIN] * times + [LAST]


def test_irqfd(waiting: Rig, eventfd: int) -> None:
    waiting.vm.irqfd(eventfd, EDGE_PIN)

    os.eventfd_write(eventfd, 1)

    waiting.board.wait_written(REPORT, [READY, VECTOR + EDGE_PIN])


def test_irqfd_removed(waiting: Rig, eventfd: int) -> None:
    waiting.vm.irqfd(eventfd, EDGE_PIN)
    waiting.vm.irqfd(eventfd, EDGE_PIN, remove=True)

    os.eventfd_write(eventfd, 1)
    waiting.vm.irq_line(EDGE_PIN + 1, 1)

    waiting.board.wait_written(REPORT, [READY, VECTOR + EDGE_PIN + 1])
    assert os.eventfd_read(eventfd) == 1  # nobody took it


def test_irqfd_with_resample_tells_of_the_end_of_interrupt(waiting: Rig, eventfd: int) -> None:
    resample = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    waiting.vm.irqfd(eventfd, LEVEL_PIN, resample=resample)

    os.eventfd_write(eventfd, 1)

    assert wait_for_eventfd(resample) == 1
    message_after_all(waiting)
    assert waiting.reports == [READY, VECTOR + LEVEL_PIN, LAST]  # once: KVM has lowered the line
    os.close(resample)


def test_message_signalled(waiting: Rig) -> None:
    delivered = waiting.vm.signal_msi(LAPIC_WINDOW, MESSAGE_VECTOR)

    assert delivered
    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR])


def test_message_to_nobody_is_not_delivered(waiting: Rig) -> None:
    apic_id = 9
    assert not waiting.vm.signal_msi(LAPIC_WINDOW | apic_id << 12, MESSAGE_VECTOR)


def test_message_through_routing(waiting: Rig, eventfd: int) -> None:
    gsi = 30  # beyond the pins
    pins = [(EDGE_PIN, IOAPIC_CHIP, EDGE_PIN)]
    waiting.vm.set_routing(pins, [(gsi, LAPIC_WINDOW, MESSAGE_VECTOR)])
    waiting.vm.irqfd(eventfd, gsi)

    os.eventfd_write(eventfd, 1)
    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR])
    waiting.vm.irq_line(EDGE_PIN, 1)

    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR, VECTOR + EDGE_PIN])


def test_routing_can_cross_wires(waiting: Rig) -> None:
    waiting.vm.set_routing([(EDGE_PIN, IOAPIC_CHIP, EDGE_PIN + 1)])

    waiting.vm.irq_line(EDGE_PIN, 1)

    waiting.board.wait_written(REPORT, [READY, VECTOR + EDGE_PIN + 1])


def test_messages_of_devices_and_pins_at_once(waiting: Rig) -> None:
    router = MsiRouter(waiting.vm)
    first, second = router.line(), router.line()
    first.pulse()  # to nobody yet
    first.route(LAPIC_WINDOW, MESSAGE_VECTOR)
    second.route(LAPIC_WINDOW, MESSAGE_VECTOR + 1)

    first.pulse()
    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR])
    second.pulse()
    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR, MESSAGE_VECTOR + 1])
    waiting.vm.irq_line(EDGE_PIN, 1)
    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR, MESSAGE_VECTOR + 1, VECTOR + EDGE_PIN])
    router.close()


def test_message_can_be_changed(waiting: Rig) -> None:
    router = MsiRouter(waiting.vm)
    line = router.line()
    line.route(LAPIC_WINDOW, MESSAGE_VECTOR)
    line.route(LAPIC_WINDOW, MESSAGE_VECTOR + 2)

    line.pulse()

    waiting.board.wait_written(REPORT, [READY, MESSAGE_VECTOR + 2])
    router.close()


def test_nmi(waiting: Rig) -> None:
    with waiting.thread.paused() as vcpu:
        vcpu.nmi()

    assert waiting.wait() == Stop(Reason.EXIT, status=0xEE)
    assert waiting.reports == [READY, 2]


def test_interrupt_into_a_vm_without_controllers(bare_vm: Rig) -> None:
    halted = bare_vm.run("irq")
    bare_vm.vcpu.interrupt(MESSAGE_VECTOR)
    bare_vm.threads = [VcpuThread(bare_vm.vcpu, bare_vm.ports, bare_vm.mmio, bare_vm.stops.put)]
    again = bare_vm.run()

    assert halted == again == Stop(Reason.HALT, "vcpu 0")
    assert bare_vm.reports == [READY, MESSAGE_VECTOR]


@pytest.mark.parametrize("cpus", [2, 4])
def test_start_of_other_cpus(vm: Rig, cpus: int) -> None:
    vm.answer([cpus])

    stop = vm.run("smp", cpus=cpus)

    assert stop == DONE
    assert sorted(vm.reports) == list(range(cpus))
    assert [a for a in vm.board.log if a.verb == "read"] == [Access("read", ASK, 1, cpus)]
