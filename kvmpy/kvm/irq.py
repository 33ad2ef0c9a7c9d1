"""Interrupt lines that end in KVM's in-kernel controllers."""

from __future__ import annotations

from .handle import Vm


class GsiLine:
    """Input `gsi` of the PIC and the IOAPIC, driven by KVM_IRQ_LINE; remembers the level, so repeats cost nothing."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self.gsi = gsi
        self._vm = vm
        self._level = False

    def set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._vm.irq_line(self.gsi, int(level))

    def pulse(self) -> None:
        self._vm.irq_line(self.gsi, 1)
        self._vm.irq_line(self.gsi, 0)
        self._level = False
