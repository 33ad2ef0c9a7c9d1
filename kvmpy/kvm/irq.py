"""Interrupt lines that end in KVM's in-kernel controllers."""

from __future__ import annotations

import os

from .handle import Vm


class GsiLine:
    """Input `gsi` of the PIC and the IOAPIC; remembers the level, so repeats cost nothing.

    Levels go through KVM_IRQ_LINE, edges through an irqfd: one write to an eventfd, whatever the vCPUs do.
    """

    def __init__(self, vm: Vm, gsi: int) -> None:
        self.gsi = gsi
        self._vm = vm
        self._level = False
        self._edge = -1

    def set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._vm.irq_line(self.gsi, int(level))

    def pulse(self) -> None:
        if self._edge < 0:
            self._edge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._vm.irqfd(self._edge, self.gsi)
        os.eventfd_write(self._edge, 1)

    def close(self) -> None:
        if self._edge >= 0:
            os.close(self._edge)
            self._edge = -1
