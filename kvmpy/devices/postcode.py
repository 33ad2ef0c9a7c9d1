"""The POST code port, which records when a guest first wrote each code.

Source: IBM AT BIOS (manufacturing test port 0x80); Cloud Hypervisor, docs/debug-port.md, for the codes. Linux also
writes here, whatever is in AL, just to wait: hence one record for each code, the first, and never more than 256.
The port reads back what was written, as the DMA page register does that has this address on a PC.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core.board import Board
from ..core.cell import READ_VALUE, WRITE_SEEN, Cell
from ..core.regs import Reg, RegisterDevice
from ..core.typed import Any

KERNEL_START, USER_START = 0x40, 0x41


class PostCodes(RegisterDevice, span=1):
    """One byte at `port`. `first` has the time of each code, in ns of `clock` since `start`.

    `start` is the time of `attach` until the machine sets it to the time of its first instruction.
    """

    CODE = Reg(0)

    def __init__(self, port: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.port = port
        self.start = clock()
        self.first: dict[int, int] = {}
        self._clock = clock
        self._cell = Cell()

    def attach(self, board: Board) -> None:
        self.start = self._clock()
        board.pio(self.port, self.SPAN, self)
        self._cell = board.cell(self.port, self.SPAN)
        self._cell.kinds = READ_VALUE | WRITE_SEEN

    def read_CODE(self) -> int:
        return self._cell.value

    def write_CODE(self, value: int) -> None:
        if value not in self.first:
            self.first[value] = self._clock() - self.start
            self._cell.seen[value // 8] |= 1 << value % 8
        self._cell.value = value

    def reset(self) -> None:
        super().reset()
        self._cell.value = self.CODE

    def state(self) -> dict[str, Any]:
        self.CODE = self._cell.value
        return super().state() | {"first": [[code, when] for code, when in self.first.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        first = state.get("first")
        if not isinstance(first, list) or len(first) > 1 << 8:
            raise ValueError(f"PostCodes: state has first={first!r}")
        super().restore(state)
        self.first = {int(code): int(when) for code, when in first}
        for at in range(len(self._cell.seen)):
            self._cell.seen[at] = sum(1 << bit for bit in range(8) if 8 * at + bit in self.first)
        self._cell.value = self.CODE
