"""Tells people at a terminal what takes so long: one line on standard error, which is gone when the work is done."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 0.5  # seconds of work that nobody has to be told of
PERIOD = 1.0
CLEAR = "\r\x1b[K"
BAR = 24  # characters
MIB = 1 << 20

_at_work = threading.Lock()  # held while something is told: what is done within says nothing of its own
_shown = False
_telling: tuple[threading.Event, threading.Thread] | None = None


class Work:
    """What is being done, and how many bytes of it: `total` is 0 where that is not known."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.done = self.total = 0

    def add(self, size: int) -> None:
        """Some more bytes are done."""
        self.done += size

    def __str__(self) -> str:
        if not self.done:
            return self.title
        if not self.total:
            return f"{self.title}, {self.done // MIB} MiB"
        filled = min(BAR, BAR * self.done // self.total)
        return f"{self.title} [{'#' * filled:<{BAR}}] {self.done // MIB} of {self.total // MIB} MiB"


def show() -> None:
    """Tell from now on, where standard error is a terminal; for the command line, whose standard error it is."""
    global _shown
    quiet = "CI" in os.environ or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    _shown = sys.stderr is not None and sys.stderr.isatty() and not quiet


@contextmanager
def working(title: str) -> Iterator[Work]:
    """While the block runs, tell `title`, what the work says of itself, and for how many seconds. The thread that does
    so is there since the work may be one long call."""
    global _telling
    work = Work(title)
    if not _shown or not _at_work.acquire(blocking=False):
        yield work
        return
    done = threading.Event()
    thread = threading.Thread(target=_tell, args=(work, done), name="kvmpy-progress", daemon=True)
    thread.start()
    _telling = done, thread
    try:
        yield work
    finally:
        hush()
        _at_work.release()


def hush() -> None:
    """No more is told of the work at hand: there is no thread of ours any more. For a process that locks itself in."""
    global _telling
    if _telling is not None:
        done, thread = _telling
        _telling = None
        done.set()
        thread.join()


def _tell(work: Work, done: threading.Event) -> None:
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    begin = time.monotonic()
    wait = PATIENCE
    while not done.wait(wait):
        line = f"kvmpy: {work} ({time.monotonic() - begin:.0f} s)"
        _write(CLEAR + line[: _columns() - 1])
        wait = PERIOD
    if wait == PERIOD:
        _write(CLEAR)


def _columns() -> int:
    with suppress(OSError):
        return os.get_terminal_size(2).columns or 80
    return 80


def _write(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode(errors="replace"))
