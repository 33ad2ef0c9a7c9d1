"""The board of a machine: its two buses, its interrupt lines, and room for devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .core.board import Stop
from .core.bus import Bus, BusDevice
from .core.errors import ConfigError
from .core.events import EventLoop
from .core.irq import IrqLine
from .core.log import LEVELS, log
from .core.memory import GuestMemory
from .kvm.handle import Vm
from .kvm.irq import GsiLine
from .x86 import layout


class MainBoard:
    """Implements core.board.Board on a KVM VM; `words` collects what devices want on the kernel command line."""

    def __init__(self, vm: Vm, mem: GuestMemory, loop: EventLoop, stop: Callable[[Stop], None]) -> None:
        self.mem = mem
        self.loop = loop
        self.ports = Bus("port", lambda address, size, value: _unmapped("port", address, size, value))
        self.memory_bus = Bus("mmio", lambda address, size, value: _unmapped("mmio", address, size, value))
        self.words: list[str] = []
        self._vm = vm
        self._stop = stop
        self._lines: dict[int, GsiLine] = {}
        self._free_gsis: Iterator[int] = (gsi for gsi in layout.IRQ_DEVICES if gsi not in layout.IRQ_TAKEN)
        self._next_mmio = layout.MMIO_DEVICES

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

    def irq(self, gsi: int | None = None) -> IrqLine:
        if gsi is None:
            gsi = next(self._free_gsis, None)
            if gsi is None:
                raise ConfigError("no free interrupt line", "attach fewer devices, or let some share a line by number")
        if gsi not in self._lines:
            self._lines[gsi] = GsiLine(self._vm, gsi)
        return self._lines[gsi]

    def cmdline(self, *words: str) -> None:
        self.words += words

    def stop(self, why: Stop) -> None:
        self._stop(why)

    def log(self, event: str, **fields: object) -> None:
        log.warning(event, **fields)


def _unmapped(space: str, address: int, size: int, value: int | None) -> None:
    """Guests probe for hardware that is not there; worth a line only when somebody is looking."""
    if log.threshold > LEVELS["debug"]:
        return
    if value is None:
        log.debug(f"read of an unmapped {space}", address=hex(address), size=size)
    else:
        log.debug(f"write to an unmapped {space}", address=hex(address), size=size, value=hex(value))
