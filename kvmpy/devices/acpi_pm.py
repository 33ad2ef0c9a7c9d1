"""The sleep and reset registers of hardware-reduced ACPI.

Source: ACPI 6.4, 4.8.3.7 (sleep control and status registers), 4.8.3.6 (reset register). S5 is the only sleeping
state. Linux: ACPI. A hostile guest can only stop itself.
"""

from __future__ import annotations

from ..core.board import Board, Reason, Stop
from ..core.regs import Bits, Field, Reg, RegisterDevice, bit

S5 = 5  # SLP_TYP of the state "soft off", as _S5 in the DSDT gives it
RESET_VALUE = 1  # as the FADT gives it


class SLEEP_CONTROL(Bits):
    """Sleep control register (ACPI 6.4, 4.8.3.7)."""

    SLP_TYP = Field(4, 2)
    SLP_EN = bit(5)  # reads as 0


class SLEEP_STATUS(Bits):
    """Sleep status register (ACPI 6.4, 4.8.3.7)."""

    WAK_STS = bit(7)


class AcpiPm(RegisterDevice, span=3):
    """Three bytes from `port` on: sleep control, sleep status, reset."""

    SLEEP_CONTROL = Reg(0, write=SLEEP_CONTROL.SLP_TYP, bits=SLEEP_CONTROL)
    SLEEP_STATUS = Reg(1, write=0, w1c=SLEEP_STATUS.WAK_STS, bits=SLEEP_STATUS)
    RESET = Reg(2, read=False)

    def __init__(self, port: int) -> None:
        self.port = port
        self._board: Board

    def attach(self, board: Board) -> None:
        self._board = board
        board.pio(self.port, self.SPAN, self)

    def write_SLEEP_CONTROL(self, value: int) -> None:
        self.SLEEP_CONTROL = value & AcpiPm.SLEEP_CONTROL.write
        if value & SLEEP_CONTROL.SLP_EN and SLEEP_CONTROL.SLP_TYP.of(value) == S5:
            self._board.stop(Stop(Reason.POWEROFF, "ACPI S5"))

    def write_RESET(self, value: int) -> None:
        if value == RESET_VALUE:
            self._board.stop(Stop(Reason.RESET, "ACPI reset register"))
