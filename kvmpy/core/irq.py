"""Interrupts as a device sees them: lines, and messages."""

from __future__ import annotations

from .typed import Protocol


class IrqLine(Protocol):
    """One wire to an interrupt controller; both verbs are leaves (they never call back into a device)."""

    def set(self, level: bool) -> None:
        """Drive the line; repeating the current level does nothing."""

    def pulse(self) -> None:
        """Assert and release: one edge."""


class Message(Protocol):
    """An interrupt that is a memory write of the device's own (PCI Local Bus 3.0, 6.8); both verbs are leaves."""

    def route(self, address: int, data: int) -> None:
        """What `pulse` is to write from now on; repeating the current message costs nothing."""

    def pulse(self) -> None:
        """Send the message; nothing happens before the first `route`."""
