"""Where a device's bytes go."""

from __future__ import annotations

from .typed import Protocol


class Sink(Protocol):
    """Takes bytes from a device on a vCPU's thread, so it must not block and must not call the device.

    A sink that has said False gets nothing more until its owner has called the device's `drained`, with the
    device's lock held. One that has an attribute `stream` takes bytes from the compiled run loop as well
    (kvm/fast.py).
    """

    def put(self, byte: int) -> bool:
        """Take one byte; False when that was the last one that fits for now."""
