"""A line to KVM's interrupt controllers remembers its level."""

from __future__ import annotations

from typing import Any

from kvmpy.kvm.irq import GsiLine


class Wires:
    """Stands for the VM: notes what KVM_IRQ_LINE is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def irq_line(self, gsi: int, level: int) -> None:
        self.told.append((gsi, level))


def line(wires: Any, gsi: int) -> GsiLine:
    return GsiLine(wires, gsi)


def test_repeated_levels_cost_no_call() -> None:
    wires = Wires()
    four = line(wires, 4)

    for level in (False, True, True, False, False, True):
        four.set(level)

    assert wires.told == [(4, 1), (4, 0), (4, 1)]


def test_pulse_leaves_the_line_low() -> None:
    wires = Wires()
    four = line(wires, 4)

    four.set(True)
    four.pulse()
    four.set(True)

    assert wires.told == [(4, 1), (4, 1), (4, 0), (4, 1)]
