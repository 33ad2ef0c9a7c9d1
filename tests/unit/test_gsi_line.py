"""Lines to KVM's interrupt controllers remember their level, messages their routes."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Any

import pytest

from kvmpy.core.errors import ConfigError
from kvmpy.kvm.irq import MAX_GSIS, PINS, GsiLine, MsiRouter


class Wires:
    """Stands for the VM: notes what KVM_IRQ_LINE and KVM_IRQFD are told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.edges: list[tuple[int, int]] = []
        self.tables: list[tuple[Any, list[tuple[int, int, int]]]] = []

    def irq_line(self, gsi: int, level: int) -> None:
        self.told.append((gsi, level))

    def irqfd(self, fd: int, gsi: int) -> None:
        self.edges.append((fd, gsi))

    def set_routing(self, irqchip: Any, msi: list[tuple[int, int, int]]) -> None:
        self.tables.append((irqchip, msi))


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


class SlowWires(Wires):
    """KVM_IRQFD takes so long that the other of two devices gets there."""

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def irqfd(self, fd: int, gsi: int) -> None:
        super().irqfd(fd, gsi)
        with suppress(threading.BrokenBarrierError):
            self.both.wait(0.2)


def test_devices_that_share_a_line_share_its_irqfd() -> None:
    wires = SlowWires()
    four = line(wires, 4)
    other = threading.Thread(target=four.pulse)

    other.start()
    four.pulse()
    other.join()
    edges = os.eventfd_read(wires.edges[0][0])
    four.close()

    assert (len(wires.edges), edges) == (1, 2)


def router(wires: Any) -> MsiRouter:
    return MsiRouter(wires)


def test_pins_are_those_that_kvm_begins_with() -> None:
    assert len(PINS) == 16 + 24
    assert PINS[7:9] == [(7, 0, 7), (8, 1, 0)]
    assert PINS[-1] == (23, 2, 23)


def test_each_message_has_a_gsi_behind_the_pins() -> None:
    wires = Wires()
    messages = router(wires)
    first, second = messages.line(), messages.line()

    second.route(0xFEE00000, 0x31)
    first.route(0xFEE01000, 0x30)

    assert wires.tables == [
        (PINS, [(25, 0xFEE00000, 0x31)]),
        (PINS, [(25, 0xFEE00000, 0x31), (24, 0xFEE01000, 0x30)]),
    ]
    messages.close()


def test_repeated_routes_cost_no_call() -> None:
    wires = Wires()
    messages = router(wires)
    line = messages.line()

    for data in (1, 1, 2, 2, 1):
        line.route(0xFEE00000, data)

    assert [msi for _, msi in wires.tables] == [[(24, 0xFEE00000, data)] for data in (1, 2, 1)]
    assert len(wires.edges) == 1
    messages.close()


def test_message_is_one_write_to_an_irqfd() -> None:
    wires = Wires()
    messages = router(wires)
    line = messages.line()
    line.pulse()  # nowhere
    line.route(0xFEE00000, 1)

    line.pulse()
    line.pulse()

    ((fd, gsi),) = wires.edges
    assert (gsi, os.eventfd_read(fd)) == (24, 2)
    messages.close()


def test_more_messages_than_kvm_has_gsis_are_refused() -> None:
    messages = router(Wires())
    for _ in range(MAX_GSIS - len(PINS)):
        messages.line()

    with pytest.raises(ConfigError, match="no more interrupt messages"):
        messages.line()
