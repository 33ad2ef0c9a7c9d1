"""The board of a machine: its two buses, its interrupt lines, and room for devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from .core.board import Stop
from .core.bus import Bus, BusDevice
from .core.cell import Cell
from .core.errors import ConfigError, KvmError
from .core.events import EventLoop
from .core.irq import IrqLine
from .core.log import LEVELS, log
from .core.memory import GuestMemory
from .core.sink import Sink
from .core.typed import TYPE_CHECKING, Any
from .kvm.fast import MMIO, Cells
from .kvm.handle import Vm
from .kvm.irq import GsiLine, MsiLine, MsiRouter
from .x86 import layout

if TYPE_CHECKING:
    from .pci.bus import PciBus
    from .virtio.device import VirtioDevice
    from .virtio.mmio import VirtioMmio
    from .virtio.pci import VirtioPci

SPARE_GSIS = 4  # left for devices that have a line of their own


class MainBoard:
    """Implements core.board.Board on a KVM VM; `words` collects what devices want on the kernel command line.

    With `pci`, virtio devices get the PCI transport, else the MMIO one.
    """

    def __init__(
        self, vm: Vm, mem: GuestMemory, loop: EventLoop, stop: Callable[[Stop], None], *, pci: bool = False
    ) -> None:
        self.mem = mem
        self.loop = loop
        self.ports = Bus("port", lambda address, size, value: _unmapped("port", address, size, value))
        self.memory_bus = Bus(
            "mmio",
            lambda address, size, value: _unmapped("mmio", address, size, value),
            slots=self.ports.slots,
            tag=MMIO,
        )
        self.cells = Cells()
        self.words: list[str] = []
        self._vm = vm
        self._stop = stop
        self._lines: dict[int, GsiLine] = {}
        self._free_gsis = [gsi for gsi in layout.IRQ_DEVICES if gsi not in layout.IRQ_TAKEN]
        self._next_mmio = layout.MMIO_DEVICES
        self.virtio_mmio: list[tuple[VirtioMmio, int]] = []  # and the interrupt of each
        self.modules: list[str] = []  # of the guest's kernel, for the devices that are here
        self.virtio_pci: list[VirtioPci] = []
        self.pci: PciBus | None = None
        if pci:
            from .pci.bus import PciBus  # the transports are loaded when they are used

            self.pci = PciBus(self.memory_bus, layout.PCI_ECAM, range(layout.PCI_WINDOW, layout.PCI_WINDOW_END))
        self._msis = MsiRouter(vm)
        self._doorbells: list[tuple[EventDoorbell, EventLoop]] = []  # and what listens
        self._loops: list[EventLoop] = []  # of single devices
        self._start_loop: Callable[[EventLoop], None] | None = None  # once the machine runs

    def pio(self, base: int, size: int, device: BusDevice) -> None:
        self.ports.add(base, size, device)

    def mmio(self, size: int, device: BusDevice, base: int | None = None) -> int:
        if base is None:
            base = self._next_mmio
            end = base + (size + layout.PAGE - 1) // layout.PAGE * layout.PAGE
            if end > layout.MMIO_DEVICES_END:
                raise ConfigError(f"no room for {size:#x} bytes of MMIO", "attach fewer or smaller devices")
            self._next_mmio = end
        for region in self.mem.regions:
            if base < region.end and region.gpa < base + size:
                raise ConfigError(f"MMIO at {base:#x} would hide RAM", "leave the address to the board")
        self.memory_bus.add(base, size, device)
        return base

    def cell(self, address: int, size: int, *, mmio: bool = False, sink: Sink | None = None) -> Cell:
        return self.cells.add(address, size, mmio=mmio, stream=getattr(sink, "stream", None))

    def irq(self, gsi: int | None = None) -> IrqLine:
        if gsi is None:
            if not self._free_gsis:
                raise ConfigError("no free interrupt line", "attach fewer devices, or let some share a line by number")
            gsi = self._free_gsis.pop(0)
        if gsi not in self._lines:
            self._lines[gsi] = GsiLine(self._vm, gsi)
        return self._lines[gsi]

    def msi(self) -> MsiLine:
        return self._msis.line()

    def new_loop(self, name: str) -> EventLoop:
        loop = self.loop.sibling(f"{name}{len(self._loops)}")
        self._loops.append(loop)
        if self._start_loop is not None:
            self._start_loop(loop)
        return loop

    def start_loops(self, prepare: Callable[[], None] | None = None) -> None:
        """Let the loops of devices run, those of later devices too; each thread calls `prepare` first."""
        self._start_loop = lambda loop: loop.start(prepare)
        for loop in self._loops:
            loop.start(prepare)

    def doorbell(
        self,
        address: int | None,
        size: int,
        value: int | None,
        ring: Callable[[], None],
        owner: Any,
        loop: EventLoop | None = None,
    ) -> EventDoorbell:
        loop = loop or self.loop
        bell = EventDoorbell(self._vm, size, value)
        self._doorbells.append((bell, loop))
        bell.place(address)
        loop.add(bell.fd, partial(_rung, bell.fd, ring), owner=owner)
        return bell

    def virtio(self, device: VirtioDevice) -> None:
        if self.pci is not None:
            from .virtio.pci import VirtioPci

            self.virtio_pci.append(VirtioPci(device, self, self.pci))
            self.modules += [*VirtioPci.modules, *device.modules]
            return
        from .virtio.mmio import VirtioMmio

        gsi = self._edge_gsi()
        self.virtio_mmio.append((VirtioMmio(device, self, self.irq(gsi)), gsi))
        self.modules += [*VirtioMmio.modules, *device.modules]

    def virtio_devices(self) -> list[VirtioDevice]:
        """All of them, whatever their transport."""
        transports: list[VirtioMmio | VirtioPci] = [*self.virtio_pci, *(transport for transport, _ in self.virtio_mmio)]
        return [transport.core.device for transport in transports]

    def virtio_resources(self) -> list[tuple[int, int, int]]:
        """(base, bytes, gsi) of each virtio-mmio device, in the order in which they were attached."""
        return [(transport.base, transport.window, gsi) for transport, gsi in self.virtio_mmio]

    def virtio_words(self) -> list[str]:
        """The same for the command line of a kernel that does not use ACPI (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)."""
        return [f"virtio_mmio.device={size >> 10}K@{base:#x}:{gsi}" for base, size, gsi in self.virtio_resources()]

    def _edge_gsi(self) -> int:
        """A line for a device that only makes edges: these can share one, since the guest asks all of its devices
        after each edge. The last free lines are left to devices that cannot."""
        used = [gsi for _, gsi in self.virtio_mmio]
        if len(self._free_gsis) > SPARE_GSIS or (self._free_gsis and not used):
            return self._free_gsis.pop(0)
        if not used:
            raise ConfigError("no free interrupt line", "attach fewer devices that have one of their own")
        return min(used, key=used.count)

    def close(self) -> None:
        """Let go of guest memory and of what stands in the host for lines and doorbells."""
        for loop in self._loops:
            loop.stop()
        transports: list[VirtioMmio | VirtioPci] = [*self.virtio_pci, *(transport for transport, _ in self.virtio_mmio)]
        for transport in transports:
            with transport.core.device.lock:
                transport.core.reset()
                transport.core.device.close()
        for bell, loop in self._doorbells:
            loop.remove(bell.fd)
            os.close(bell.fd)
        self._msis.close()
        for line in self._lines.values():
            line.close()
        self._doorbells, self._lines, self._loops = [], {}, []

    def cmdline(self, *words: str) -> None:
        self.words += words

    def stop(self, why: Stop) -> None:
        self._stop(why)

    def log(self, event: str, **fields: object) -> None:
        log.warning(event, **fields)


class EventDoorbell:
    """A doorbell that KVM answers: the write signals the eventfd `fd`, and the vCPU goes on."""

    def __init__(self, vm: Vm, size: int, value: int | None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._vm = vm
        self._size = size
        self._value = value
        self._address: int | None = None

    def place(self, address: int | None) -> None:
        if self._address is not None:
            self._vm.ioeventfd(self.fd, self._address, self._size, match=self._value, remove=True)
            self._address = None
        if address is None:
            return
        try:
            self._vm.ioeventfd(self.fd, address, self._size, match=self._value)
            self._address = address
        except KvmError as error:
            if error.errno != errno.ENOSPC:  # KVM has room for NR_IOBUS_DEVS; without one, the device sees the write
                raise


def _rung(bell: int, ring: Callable[[], None]) -> None:
    with suppress(BlockingIOError):  # a callback of the same turn has closed and made descriptors
        os.eventfd_read(bell)
    ring()


def _unmapped(space: str, address: int, size: int, value: int | None) -> None:
    """Guests probe for hardware that is not there; worth a line only when somebody is looking."""
    if log.threshold > LEVELS["debug"]:
        return
    if value is None:
        log.debug(f"read of an unmapped {space}", address=hex(address), size=size)
    else:
        log.debug(f"write to an unmapped {space}", address=hex(address), size=size, value=hex(value))
