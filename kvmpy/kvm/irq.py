"""Interrupt lines and messages that end in KVM's in-kernel controllers."""

from __future__ import annotations

import os
import threading

from ..core.errors import ConfigError
from .handle import Vm

PIC_PINS, IOAPIC_PINS = 8, 24  # of each controller
PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2  # KVM_IRQCHIP_*
# KVM's own routing (arch/x86/kvm/irq.c, default_routing): GSI n is pin n of the IOAPIC, the first 16 of the PICs too.
PINS = [(gsi, PIC_SLAVE if gsi // PIC_PINS else PIC_MASTER, gsi % PIC_PINS) for gsi in range(2 * PIC_PINS)] + [
    (gsi, IOAPIC, gsi) for gsi in range(IOAPIC_PINS)
]
MAX_GSIS = 4096  # KVM_MAX_IRQ_ROUTES; GSIs are below that as well


class GsiLine:
    """Input `gsi` of the PIC and the IOAPIC; remembers the level, so repeats cost nothing.

    Levels go through KVM_IRQ_LINE, edges through an irqfd: one write to an eventfd, whatever the vCPUs do.
    """

    def __init__(self, vm: Vm, gsi: int) -> None:
        self.gsi = gsi
        self._vm = vm
        self._level = False
        self._edge = -1
        self._first = threading.Lock()  # a leaf: of devices that share the line, one makes its eventfd

    def set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._vm.irq_line(self.gsi, int(level))

    def pulse(self) -> None:
        if self._edge < 0:
            with self._first:
                if self._edge < 0:
                    edge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    self._vm.irqfd(edge, self.gsi)
                    self._edge = edge  # last: from here on others use it
        os.eventfd_write(self._edge, 1)

    def close(self) -> None:
        if self._edge >= 0:
            os.close(self._edge)
            self._edge = -1


class MsiLine:
    """A message-signalled interrupt: a GSI of its own, with an irqfd from the first message on."""

    def __init__(self, router: MsiRouter, gsi: int) -> None:
        self.gsi = gsi
        self._router = router
        self._edge = -1

    def route(self, address: int, data: int) -> None:
        self._router.route(self.gsi, address, data)
        if self._edge < 0:
            self._edge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._router.vm.irqfd(self._edge, self.gsi)

    def pulse(self) -> None:
        if self._edge >= 0:
            os.eventfd_write(self._edge, 1)

    def close(self) -> None:
        if self._edge >= 0:
            os.close(self._edge)
            self._edge = -1


class MsiRouter:
    """The GSIs above the pins, and KVM's table of routes, which is always set as a whole. Any thread may use it."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._lines: list[MsiLine] = []
        self._messages: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()  # a leaf: held while the table is changed

    def line(self) -> MsiLine:
        """One more; raises ConfigError when KVM has no more GSIs."""
        gsi = IOAPIC_PINS + len(self._lines)
        if len(PINS) + len(self._lines) >= MAX_GSIS:
            raise ConfigError("no more interrupt messages", "attach fewer devices, or some with fewer queues")
        self._lines.append(MsiLine(self, gsi))
        return self._lines[-1]

    def route(self, gsi: int, address: int, data: int) -> None:
        """Let `gsi` send this message."""
        with self._lock:
            if self._messages.get(gsi) != (address, data):
                self._messages[gsi] = (address, data)
                self.vm.set_routing(PINS, [(gsi, *message) for gsi, message in self._messages.items()])

    def close(self) -> None:
        for line in self._lines:
            line.close()
