"""System control port A of the PS/2, with its fast way to reset the processor.

Source: IBM PS/2 Hardware Interface Technical Reference (1990), "System Control Port A"; Intel I/O Controller Hub 9
data sheet (316972), 13.7.3 PORT92. The A20 gate reads back
what was written and does nothing else. A hostile guest can only stop itself.
"""

from __future__ import annotations

from ..core.board import Board, Reason, Stop
from ..core.regs import Bits, Reg, RegisterDevice, bit


class CONTROL(Bits):
    """System control port A."""

    RESET = bit(0)  # going high resets the processor
    A20 = bit(1)


class Port92(RegisterDevice, span=1):
    """One byte at `port`."""

    CONTROL = Reg(0, reset=CONTROL.A20, write=CONTROL.RESET | CONTROL.A20, bits=CONTROL)

    def __init__(self, port: int) -> None:
        self.port = port
        self._board: Board

    def attach(self, board: Board) -> None:
        self._board = board
        board.pio(self.port, self.SPAN, self)

    def write_CONTROL(self, value: int) -> None:
        was, self.CONTROL = self.CONTROL, value & Port92.CONTROL.write
        if self.CONTROL & ~was & CONTROL.RESET:
            self._board.stop(Stop(Reason.RESET, "fast reset by port 92h"))
