"""The `signal` module without the enumerations of its numbers, which take as long to load as half of all devices."""

from __future__ import annotations

from .typed import TYPE_CHECKING

if TYPE_CHECKING:
    import signal as signal
else:
    signal = __import__("_signal")
