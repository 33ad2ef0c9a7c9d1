"""An interrupt line as a device sees it."""

from __future__ import annotations

from typing import Protocol


class IrqLine(Protocol):
    """One wire to an interrupt controller; both verbs are leaves (they never call back into a device)."""

    def set(self, level: bool) -> None:
        """Drive the line; repeating the current level does nothing."""

    def pulse(self) -> None:
        """Assert and release: one edge."""
