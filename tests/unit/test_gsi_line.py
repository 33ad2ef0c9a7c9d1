"""A line to KVM's interrupt controllers remembers its level."""

from __future__ import annotations

import os
from typing import Any

from kvmpy.kvm.irq import GsiLine


class Wires:
    """Stands for the VM: notes what KVM_IRQ_LINE and KVM_IRQFD are told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.edges: list[tuple[int, int]] = []

    def irq_line(self, gsi: int, level: int) -> None:
        self.told.append((gsi, level))

    def irqfd(self, fd: int, gsi: int) -> None:
        self.edges.append((fd, gsi))


def line(wires: Any, gsi: int) -> GsiLine:
    return GsiLine(wires, gsi)


def test_repeated_levels_cost_no_call() -> None:
    wires = Wires()
    four = line(wires, 4)

    for level in (False, True, True, False, False, True):
        four.set(level)

    assert wires.told == [(4, 1), (4, 0), (4, 1)]


def test_edges_go_through_one_irqfd() -> None:
    wires = Wires()
    four = line(wires, 4)

    four.pulse()
    four.pulse()
    ((fd, gsi),) = wires.edges
    edges = os.eventfd_read(fd)
    four.close()

    assert (gsi, edges, wires.told) == (4, 2, [])
