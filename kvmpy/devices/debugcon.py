"""A debug port: every byte written to it is output, without set-up or waiting.

Source: Bochs, "port E9 hack"; QEMU, isa-debugcon. Reading gives 0xE9, which tells a guest that the port is there.
SeaBIOS and OVMF use 0x402. The port has no way to say "busy": what a guest writes while the sink is full is
dropped and counted, so a hostile guest can lose only its own output.
"""

from __future__ import annotations

from ..core.board import Board
from ..core.cell import READ_VALUE, WRITE_STREAM, Cell
from ..core.regs import Reg, RegisterDevice
from ..core.sink import Sink

PRESENT = 0xE9


class Debugcon(RegisterDevice, span=1):
    """One byte at `port`; what the guest writes goes to `sink`. `dropped` counts what did not."""

    BYTE = Reg(0, reset=PRESENT)
    DROPPED = Reg(None)

    def __init__(self, sink: Sink, port: int) -> None:
        self.port = port
        self._sink = sink
        self._put = sink.put
        self._full = False
        self._cell = Cell()

    def attach(self, board: Board) -> None:
        board.pio(self.port, self.SPAN, self)
        self._cell = board.cell(self.port, self.SPAN, sink=self._sink)
        self._cell.value = PRESENT
        self._cell.kinds = READ_VALUE | WRITE_STREAM

    def write_BYTE(self, value: int) -> None:
        if self._full:
            self.DROPPED += 1
        else:
            self._full = not self._put(value)
            self._cell.kinds = READ_VALUE if self._full else READ_VALUE | WRITE_STREAM

    def drained(self) -> None:
        """The sink has room again; called with `lock` held."""
        self._full = False
        self._cell.kinds = READ_VALUE | WRITE_STREAM
