"""The event register behind ACPI's generic event device, and the power button that uses it.

Source: ACPI 6.4, 5.6.9 (interrupt-signaled events). The register's layout is ours: the DSDT's _EVT method reads
it and notifies the device of every bit that is set. The interrupt is an edge. Linux: ACPI, ACPI_BUTTON.
A hostile guest can only read it, which loses its own events.
"""

from __future__ import annotations

from ..core.board import Board
from ..core.irq import IrqLine
from ..core.regs import Bits, Reg, RegisterDevice, bit


class EVENT(Bits):
    """Events that the guest has not seen yet."""

    POWER_BUTTON = bit(0)


class AcpiGed(RegisterDevice, span=1):
    """One byte at `port`, interrupting on `gsi`."""

    EVENT = Reg(0, write=0, rc=EVENT.POWER_BUTTON, bits=EVENT)

    def __init__(self, port: int, gsi: int) -> None:
        self.port = port
        self.gsi = gsi
        self._irq: IrqLine

    def attach(self, board: Board) -> None:
        self._irq = board.irq(self.gsi)
        board.pio(self.port, self.SPAN, self)

    def press_power_button(self) -> None:
        """Ask the guest to shut down; called with `lock` held."""
        self.EVENT |= EVENT.POWER_BUTTON
        self._irq.pulse()
