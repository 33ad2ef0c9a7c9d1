"""A machine small enough for tests: RAM, one recording device on every port and MMIO address, vCPU threads."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from kvmpy.core.board import Reason, Stop
from kvmpy.core.bus import Bus
from kvmpy.core.memory import GuestMemory
from kvmpy.core.regs import Device
from kvmpy.kvm.fast import MMIO as MMIO_TAG
from kvmpy.kvm.fast import Cells
from kvmpy.kvm.handle import Kvm, Vcpu
from kvmpy.kvm.probe import runs_ring0_natively
from kvmpy.vcpu import VcpuThread
from kvmpy.x86 import layout, longmode

GUESTS = Path(__file__).parents[2] / "guests"
BINARIES = GUESTS / "build"
SECONDS = 30.0  # for anything a guest does; reached only when it hangs
RAM = 4 * layout.MIB
PORTS = 1 << 16
LOAD = layout.BOOT_SECTOR  # guests/tiny.ld

# guests/tiny.inc
REPORT, ASK, END = 0x10, 0x18, 0xF4
MMIO = layout.MMIO_DEVICES
LAPIC_WINDOW = layout.LAPIC  # messages to APIC 0 are writes here

# In which mode each guest is entered; all else is real mode.
LONG = {"irq", "lapic_timer", "longmode", "mmio", "popcnt", "puppet", "user"}
LONG |= {"virtio", "virtio_pci", "virtio_net", "virtio_net_pci"}
PROTECTED = {"protected", "triple"}


class Access(NamedTuple):
    """What a guest did: `value` is what it wrote, or what it was given."""

    verb: str
    address: int
    size: int
    value: int


class Recorder(Device):
    """A device on all addresses from `base` on: notes every access, answers reads with `answer(address, size)`.

    `told(access)` is called with each access after it was noted, on the vCPU's thread.
    """

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.log: list[Access] = []
        self.answer: Callable[[int, int], int] = lambda address, size: 0
        self.told: Callable[[Access], None] = lambda access: None
        self._more = threading.Condition()

    def read(self, offset: int, size: int) -> int:
        value = self.answer(self.base + offset, size)
        self._note(Access("read", self.base + offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self._note(Access("write", self.base + offset, size, value))

    def _note(self, access: Access) -> None:
        with self._more:
            self.log.append(access)
            self._more.notify_all()
        self.told(access)

    def written(self, address: int) -> list[int]:
        """The values written to `address`, in order."""
        return [a.value for a in self.log if a.verb == "write" and a.address == address]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until `condition`, which looks at what was recorded, holds; fails the test when it does not come true."""
        with self._more:
            assert self._more.wait_for(condition, SECONDS), f"the guest only did {self.log[-20:]}"

    def wait_more(self) -> None:
        """Until there is an access more than now."""
        count = len(self.log)
        self.wait_until(lambda: len(self.log) > count)

    def wait_written(self, address: int, values: list[int]) -> None:
        """Until the values written to `address` are `values`."""
        self.wait_until(lambda: self.written(address) == values)


class Rig:
    """A VM on its buses. `load` a guest, then `run` it to its end, or `start` it and `finish` it.

    `compiled`: the shim decodes exits and answers `cells`; else Python looks at every exit.
    """

    def __init__(self, *, irqchip: bool = True, compiled: bool = True) -> None:
        self.cells = Cells() if compiled else None
        self.stops: SimpleQueue[Stop] = SimpleQueue()
        self.board = Recorder()
        self.devices = Recorder(layout.HOLE)
        self.ports = Bus("port")
        self.mmio = Bus("mmio", slots=self.ports.slots, tag=MMIO_TAG)
        self.ports.add(0, END, self.board)
        self.end_port = EndPort(self.stops)
        self.ports.add(END, 1, self.end_port)
        self.ports.add(END + 1, PORTS - END - 1, Shifted(self.board, END + 1))
        self.mmio.add(layout.HOLE, layout.HOLE_END - layout.HOLE, self.devices)
        self.threads: list[VcpuThread] = []
        self._undo = ExitStack()
        self.kvm = Kvm()
        self._undo.callback(self.kvm.close)
        self.mem = GuestMemory.allocate([(0, RAM)], huge=False)
        self._undo.callback(self.mem.close)
        self.vm = self.kvm.create_vm()
        self._undo.callback(self.vm.close)
        self.vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        self.vm.set_tss_addr(layout.KVM_TSS)
        self.irqchip = irqchip
        if irqchip:
            self.vm.create_irqchip()
            self.vm.create_pit()
        for slot, region in enumerate(self.mem.regions):
            self.vm.set_memory(slot, region.gpa, region.buf)

    @property
    def thread(self) -> VcpuThread:
        return self.threads[0]

    @property
    def vcpu(self) -> Vcpu:
        return self.threads[0].vcpu

    @property
    def reports(self) -> list[int]:
        """What the guest has written to its REPORT port."""
        return self.board.written(REPORT)

    def answer(self, values: Iterable[int]) -> None:
        """What reads of the ASK port give, one after the other."""
        answers = iter(values)
        self.board.answer = lambda address, size: next(answers) if address == ASK else 0

    def add_vcpu(self) -> Vcpu:
        vcpu = self.vm.create_vcpu(len(self.threads))
        self._undo.callback(vcpu.close)
        vcpu.set_cpuid(self.kvm.supported_cpuid())
        thread = VcpuThread(vcpu, self.ports, self.mmio, self.stops.put, self.cells)
        self._undo.callback(thread.close)
        self.threads.append(thread)
        return vcpu

    def load(self, guest: str, *, cpus: int = 1) -> None:
        """A tiny guest to memory, the first of `cpus` vCPUs to its entry."""
        self.mem.write(LOAD, (BINARIES / f"{guest}.bin").read_bytes())
        for _ in range(cpus):
            self.add_vcpu()
        sregs = self.vcpu.sregs()
        if guest in LONG:
            longmode.long_mode(sregs, self.mem)
        elif guest in PROTECTED:
            longmode.protected_mode(sregs, self.mem)
        else:
            longmode.real_mode(sregs)
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.regs()
        regs.rip, regs.rsp = LOAD, LOAD
        self.vcpu.set_regs(regs)

    def start(self, guest: str = "", *, cpus: int = 1) -> None:
        if guest:
            self.load(guest, cpus=cpus)
        for thread in self.threads:
            thread.start()

    def wait(self) -> Stop:
        """Until some vCPU asks for a stop."""
        return self.stops.get(timeout=SECONDS)

    def wait_mp_state(self, state: int, *, cpu: int = 0) -> None:
        """Until a running vCPU is in KVM_MP_STATE_* `state`."""
        deadline = time.monotonic() + SECONDS
        while True:
            with self.threads[cpu].paused() as vcpu:
                found = vcpu.mp_state()
            if found == state:
                return
            assert time.monotonic() < deadline, f"the vCPU is in mp_state {found}, not {state}"
            time.sleep(0.001)  # a pause after the other would not let the guest run at all

    def finish(self) -> None:
        """End all vCPU threads."""
        for thread in self.threads:
            thread.end()
        for thread in self.threads:
            assert thread.join(SECONDS), "a vCPU thread did not end"

    def run(self, guest: str = "", *, cpus: int = 1) -> Stop:
        """From the start to the first stop, which it returns."""
        self.start(guest, cpus=cpus)
        stop = self.wait()
        self.finish()
        return stop

    def perform(self, *orders: Order) -> None:
        """Have the puppet guest do `orders`; what it reads is in `reports`."""
        self.answer(itertools.chain(*(order.words() for order in orders), [0]))
        assert self.run("puppet") == Stop(Reason.EXIT)

    def close(self) -> None:
        try:
            self.finish()
        finally:
            self._undo.close()


class Order(NamedTuple):
    """One thing for the puppet guest to do (guests/puppet.S)."""

    verb: int
    address: int
    size: int
    value: int = 0

    def words(self) -> tuple[int, ...]:
        head = self.verb | self.size << 8
        return (head, *struct.unpack("<4I", struct.pack("<QQ", self.address, self.value)))


def port_write(port: int, size: int, value: int) -> Order:
    return Order(1, port, size, value)


def port_read(port: int, size: int) -> Order:
    return Order(2, port, size)


def store(address: int, size: int, value: int) -> Order:
    return Order(3, address, size, value)


def load(address: int, size: int) -> Order:
    return Order(4, address, size)


class EndPort(Device):
    """The guest's last word: a byte, its status."""

    def __init__(self, stops: SimpleQueue[Stop]) -> None:
        self._stops = stops

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._stops.put(Stop(Reason.EXIT, status=value))


class Shifted(Device):
    """The part of `device` from `offset` on."""

    def __init__(self, device: Recorder, offset: int) -> None:
        self._device = device
        self._offset = offset

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._offset + offset, size, value)


@cache
def emulates_kernel_code() -> bool:
    """Whether this host's KVM has no VT-x or AMD-V, so that its emulator executes all of a guest's ring 0."""
    with closing(Kvm()) as kvm:
        return not runs_ring0_natively(kvm)
