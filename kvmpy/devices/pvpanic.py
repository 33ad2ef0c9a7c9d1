"""The port at which a guest kernel reports its panic.

Source: QEMU, docs/specs/pvpanic.rst. Linux: PVPANIC_MMIO, and a DSDT node with _HID QEMU0001.
A hostile guest can only stop itself, or log (rate-limited).
"""

from __future__ import annotations

from ..core.board import Board, Reason, Stop
from ..core.regs import Bits, Reg, RegisterDevice, bit


class EVENT(Bits):
    """Events; a read gives those that the device knows."""

    PANICKED = bit(0)  # for the host to handle
    CRASH_LOADED = bit(1)  # the guest handles it itself: the host takes note and lets it run


class Pvpanic(RegisterDevice, span=1):
    """One byte at `port`."""

    EVENT = Reg(0, reset=EVENT.PANICKED | EVENT.CRASH_LOADED, bits=EVENT)

    def __init__(self, port: int) -> None:
        self.port = port
        self._board: Board

    def attach(self, board: Board) -> None:
        self._board = board
        board.pio(self.port, self.SPAN, self)

    def write_EVENT(self, value: int) -> None:
        if value & EVENT.PANICKED:
            self._board.stop(Stop(Reason.PANIC, "reported by the guest kernel"))
        elif value & EVENT.CRASH_LOADED:
            self._board.log("guest kernel panicked and runs its crash kernel")
