"""Structured log lines, made by structlog, which is loaded when the first line is written.

A guest can make devices log as often as it likes: each event gets BURST lines in PERIOD seconds, the rest are
counted and the count is told with the next line that passes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress

from .typed import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
BURST, PERIOD = 10, 5.0
MAX_EVENTS = 256  # distinct events that are counted; a guest cannot make up more than the code has, but be sure


class Log:
    """Writes `LEVEL event key=value` lines to standard error, from `threshold` up."""

    def __init__(self, threshold: str = "warning") -> None:
        self.threshold = LEVELS[threshold]
        self._logger: Any = None
        self._windows: dict[str, tuple[float, int]] = {}  # event: start of its period, lines asked for since

    def need_no_imports(self) -> None:
        """Write the same lines without structlog from now on: nothing can be loaded any more."""
        self._logger = _Plain()

    def debug(self, event: str, **fields: object) -> None:
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._emit("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._emit("error", event, fields)

    def _emit(self, level: str, event: str, fields: dict[str, object]) -> None:
        if LEVELS[level] < self.threshold:
            return
        now = time.monotonic()
        start, count = self._windows.get(event, (now, 0))
        if now - start >= PERIOD:
            if count > BURST:
                fields["suppressed"] = count - BURST
            start, count = now, 0
        if event in self._windows or len(self._windows) < MAX_EVENTS:
            self._windows[event] = (start, count + 1)
        if count < BURST:
            with suppress(OSError, ValueError):  # it is full, or has gone: that must not stop a guest
                if self._logger is None:
                    self._logger = _make_logger()
                getattr(self._logger, level)(event, **fields)


class _Plain:
    """What structlog makes of them, for processes that are locked in."""

    def __getattr__(self, level: str) -> Callable[..., None]:
        def write(event: str, **fields: object) -> None:
            if sys.stderr is not None:
                print(_line(None, level, {"level": level, "event": event} | fields), file=sys.stderr, flush=True)

        return write


def _make_logger() -> Any:
    import structlog

    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr) if sys.stderr is not None else structlog.ReturnLogger(),
        processors=[structlog.processors.add_log_level, _line],
    )


def _line(logger: object, method: str, fields: MutableMapping[str, Any]) -> str:
    """`kvmpy: warning: event key=value ...`"""
    head = f"kvmpy: {fields.pop('level')}: {fields.pop('event')}"
    return " ".join([head, *(f"{key}={value}" for key, value in fields.items())])


log = Log()
