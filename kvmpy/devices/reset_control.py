"""The chipset's reset control register, which Linux uses with `reboot=p`.

Source: Intel I/O Controller Hub 9 data sheet (316972), 13.7.5 RST_CNT. Hard, soft and full resets are one and the
same here. A hostile guest can only stop itself.
"""

from __future__ import annotations

from ..core.board import Board, Reason, Stop
from ..core.regs import Bits, Reg, RegisterDevice, bit


class RST_CNT(Bits):
    """Reset control."""

    SYS_RST = bit(1)  # hard rather than soft
    RST_CPU = bit(2)  # going high does it
    FULL_RST = bit(3)  # power cycle


class ResetControl(RegisterDevice, span=1):
    """One byte at `port`; wider accesses, PCI configuration addresses among them, are not for it."""

    RST_CNT = Reg(0, write=RST_CNT.SYS_RST | RST_CNT.RST_CPU | RST_CNT.FULL_RST, bits=RST_CNT)

    def __init__(self, port: int) -> None:
        self.port = port
        self._board: Board

    def attach(self, board: Board) -> None:
        self._board = board
        board.pio(self.port, self.SPAN, self)

    def write_RST_CNT(self, value: int) -> None:
        was, self.RST_CNT = self.RST_CNT, value & ResetControl.RST_CNT.write
        if self.RST_CNT & ~was & RST_CNT.RST_CPU:
            self._board.stop(Stop(Reason.RESET, "reset control register"))
