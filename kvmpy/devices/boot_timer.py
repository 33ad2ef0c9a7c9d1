"""The register at which a guest's init tells that it has started.

Source: Firecracker, src/vmm/src/devices/pseudo/boot_timer.rs: byte 123 at guest-physical 0xC0000000, so that the
same guest image gives comparable figures. A hostile guest can only falsify its own figure, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core.board import Board
from ..core.regs import Reg, RegisterDevice

STARTED = 123


class BootTimer(RegisterDevice, span=8):
    """One byte at guest-physical `base`; wider writes count by their lowest byte.

    ELAPSED is the time of the first signal in ns of `clock` since `start`, -1 before it. `start` is the time of
    `attach` until the machine sets it to the time of its first instruction.
    """

    SIGNAL = Reg(0, read=False)
    ELAPSED = Reg(None, reset=-1)

    def __init__(self, base: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.base = base
        self.start = clock()
        self._clock = clock

    def attach(self, board: Board) -> None:
        self.start = self._clock()
        board.mmio(self.SPAN, self, self.base)

    def write_SIGNAL(self, value: int) -> None:
        if value == STARTED and self.ELAPSED < 0:
            self.ELAPSED = self._clock() - self.start
