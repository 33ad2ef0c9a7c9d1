"""Interrupts of a device that do not arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.board import Board
from ..core.irq import IrqLine, Message
from .plan import Fault, Plan

INTERRUPT = "interrupt"


class LostInterrupt(Fault, frozen=True):
    """The device raises an interrupt, and the guest never hears of it. Of virtio devices, those for used buffers."""

    on: str = INTERRUPT


class FaultyLine:
    """An interrupt line on which rising edges get lost."""

    def __init__(self, line: IrqLine, plan: Plan) -> None:
        self._line = line
        self._plan = plan
        self._level = False

    def set(self, level: bool) -> None:
        rises = level and not self._level
        self._level = level
        if not (rises and lost(self._plan)):
            self._line.set(level)

    def pulse(self) -> None:
        if not lost(self._plan):
            self._line.pulse()


class FaultyMessage:
    """A message that gets lost."""

    def __init__(self, message: Message, plan: Plan) -> None:
        self.route = message.route
        self._message = message
        self._plan = plan

    def pulse(self) -> None:
        if not lost(self._plan):
            self._message.pulse()


class FaultyBoard:
    """`board`, whose interrupts are as `plan` says."""

    def __init__(self, board: Board, plan: Plan) -> None:
        self._board = board
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._board, name)

    def irq(self, gsi: int | None = None) -> IrqLine:
        return FaultyLine(self._board.irq(gsi), self._plan)

    def msi(self) -> Message:
        return FaultyMessage(self._board.msi(), self._plan)


def lost(plan: Plan) -> bool:
    """Whether the next interrupt gets lost."""
    return bool(list(plan.hits(INTERRUPT)))


def losing(interrupt: Callable[[Any], None], plan: Plan) -> Callable[[Any], None]:
    """A queue's way to the guest, as `plan` says."""

    def signal(queue: Any) -> None:
        if not lost(plan):
            interrupt(queue)

    return signal
