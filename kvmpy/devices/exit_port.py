"""The port at which a guest gives the exit status of its job.

The guest's init writes one byte here when the job has ended; the machine stops with it. Ours, as no standard has
such a port. A hostile guest can only stop itself: the first byte counts, later ones are ignored.
"""

from __future__ import annotations

from ..core.board import Board, Reason, Stop
from ..core.regs import Reg, RegisterDevice


class ExitPort(RegisterDevice, span=1):
    """One byte at `port`, write-only."""

    STATUS = Reg(0, read=False)
    GIVEN = Reg(None)  # 1 once a status has been written

    def __init__(self, port: int) -> None:
        self.port = port
        self._board: Board

    def attach(self, board: Board) -> None:
        self._board = board
        board.pio(self.port, self.SPAN, self)

    def write_STATUS(self, value: int) -> None:
        if not self.GIVEN:
            self.STATUS, self.GIVEN = value, 1
            self._board.stop(Stop(Reason.EXIT, f"status {value}", status=value))
