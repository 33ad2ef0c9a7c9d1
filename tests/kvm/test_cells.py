"""What the shim answers for a device is what the device would have answered: both run loops give a guest the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from rig import ASK, END, REPORT, Order, Rig, Shifted, port_read, port_write

from kvmpy.core.cell import Cell
from kvmpy.core.outbox import PlainOutbox
from kvmpy.core.sink import Sink
from kvmpy.devices.debugcon import Debugcon
from kvmpy.devices.postcode import PostCodes
from kvmpy.devices.serial import IER, LCR, LSR, MCR, Serial
from kvmpy.kvm.fast import FastOutbox
from kvmpy.testing import FakeBoard

COM1, POST, DEBUG = 0x3F8, 0x80, 0xE9
LIMIT = 40  # bytes under way that fill the sink: few, so that it happens
LSR_PORT = COM1 + 5


class Output:
    """A sink with one of the two outboxes behind it."""

    def __init__(self, box: Any) -> None:
        self.box = box
        self.stream = getattr(box, "stream", None)

    def put(self, byte: int) -> bool:
        return bool(self.box.put(bytes([byte])))


class CellBoard(FakeBoard):
    """A FakeBoard whose cells are those of a rig."""

    def __init__(self, vm: Rig) -> None:
        super().__init__()
        self._cells = vm.cells

    def cell(self, address: int, size: int, *, mmio: bool = False, sink: Sink | None = None) -> Cell:
        if self._cells is None:
            return super().cell(address, size)
        return self._cells.add(address, size, mmio=mmio, stream=getattr(sink, "stream", None))


class Bench:
    """A rig with a serial port, a debug port and a POST code port on it."""

    def __init__(self, *, compiled: bool) -> None:
        self.vm = Rig(compiled=compiled)
        board = CellBoard(self.vm)
        self.box: Any = FastOutbox(LIMIT, LIMIT) if compiled else PlainOutbox(LIMIT, LIMIT, lambda: None)
        output = Output(self.box)
        self.serial = Serial(output, COM1, 4)
        self.devices: list[Any] = [self.serial, Debugcon(output, DEBUG), PostCodes(POST, lambda: 0)]
        for device in self.devices:
            device.attach(board)
        for port in (REPORT, ASK):
            board.ports.add(port, 4, Shifted(self.vm.board, port))
        board.ports.add(END, 1, self.vm.end_port)
        self.vm.ports = board.ports
        self.vm.mmio = board.memory_bus

    def perform(self, orders: list[Order]) -> tuple[Any, ...]:
        """All that can be seen of what the guest did."""
        self.vm.perform(*orders)
        return self.vm.reports, self.box.take(), self.box.under_way, [device.state() for device in self.devices]


@pytest.fixture
def compiled() -> Iterator[Bench]:
    bench = Bench(compiled=True)
    yield bench
    bench.vm.close()
    bench.box.close()


@pytest.fixture
def reference() -> Iterator[Bench]:
    bench = Bench(compiled=False)
    yield bench
    bench.vm.close()


def some_order(choice: random.Random) -> Order:
    """Mostly what a driver does, at times anything."""
    port = choice.choice([COM1, COM1, LSR_PORT, LSR_PORT, COM1 + choice.randrange(8), POST, DEBUG])
    size = choice.choice([1, 1, 1, 1, 1, 2, 4])
    usual = {COM1 + 1: IER.ETBEI, COM1 + 3: LCR.WLS, COM1 + 4: MCR.OUT2}.get(port, 0x41)
    value = choice.choice([0, usual, usual, choice.randrange(1 << 8 * size)])
    return choice.choice([port_read(port, size), port_write(port, size, value)])


@pytest.mark.parametrize("seed", range(40))
def test_both_loops_give_the_same(compiled: Bench, reference: Bench, seed: int) -> None:
    choice = random.Random(seed)
    orders = [some_order(choice) for _ in range(120)]

    assert compiled.perform(orders) == reference.perform(orders)


class Turnstile:
    """A lock that counts how often it is taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *error: object) -> None: ...


def test_printing_by_polling_does_not_ask_the_device(compiled: Bench) -> None:
    """The test of the tests above: cells are used at all."""
    compiled.serial.lock = turnstile = Turnstile()  # type: ignore[assignment]

    compiled.vm.perform(*[port_read(LSR_PORT, 1), port_write(COM1, 1, 0x41)] * 10, port_read(COM1 + 7, 1))

    assert (turnstile.taken, compiled.box.take()) == (1, b"A" * 10)
    assert compiled.vm.reports == [LSR.IDLE] * 10 + [0]


def test_a_full_console_reaches_the_device(compiled: Bench) -> None:
    compiled.vm.perform(*[port_write(COM1, 1, 0x41)] * (LIMIT + 3), port_read(LSR_PORT, 1))

    assert compiled.box.take() == b"A" * LIMIT
    assert compiled.vm.reports == [0]
    assert len(compiled.serial.state()["tx"]) == 1
