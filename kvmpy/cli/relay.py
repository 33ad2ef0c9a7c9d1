"""Carries a command in a guest: this process's standard streams and signals to it, its output and status back."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from types import FrameType

from ..core.errors import GuestLost, HostError, KvmpyError, TimedOut
from ..guest.process import Process
from ..host.tty import RawTerminal, is_ours

CHUNK = 1 << 16
LINGER = (
    0.5  # seconds without output, after which a command that has ended leaves nothing: others hold its streams open
)
COLLECT = 5.0  # seconds for a command that was killed to end
BROKEN_PIPE = 128 + signal.SIGPIPE
FORWARDED = (signal.SIGINT, signal.SIGQUIT)  # to the command, which decides
ENDING = (signal.SIGTERM, signal.SIGHUP)  # for us: the machine ends

News = signal.Signals | Exception | None  # a signal, what went wrong, or None: the command has ended


def starting() -> None:
    """Until a command runs, signals end this process in an orderly way; an interrupt does so anyway."""
    for number in ENDING:
        signal.signal(number, _exit)


def terminal_size() -> tuple[int, int]:
    """(rows, columns) of the user's terminal; of a usual one where there is none."""
    for fd in (1, 0, 2):
        with suppress(OSError):
            size = os.get_terminal_size(fd)
            return size.lines or 24, size.columns or 80
    return 24, 80


class Relay:
    """One command; `run` carries it to its end and returns the exit status for this process.

    Input, where the command has any, is this process's, and so is where output goes, unless a subclass sees to that.
    """

    def __init__(self, process: Process, *, tty: bool) -> None:
        self._process = process
        self._tty = tty
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()  # its `put` may be called by a signal handler
        self._waiting: dict[int, float] = {}  # since when there has been no output for a descriptor of ours

    def run(self, timeout: float | None) -> int:
        """Raises TimedOut after `timeout` seconds, when the command has been killed, GuestLost, and HostError for
        output that cannot be written."""
        process = self._process
        self._waiting = dict.fromkeys((1, 2), time.monotonic())
        outputs = [
            threading.Thread(target=self._pass_out, args=ends, name="kvmpy-output", daemon=True)
            for ends in ((process.stdout, 1), (process.stderr, 2))
            if ends[0] is not None
        ]
        jobs = (self._pass_in, self._await_end) if process.stdin is not None else (self._await_end,)
        others = [threading.Thread(target=job, daemon=True) for job in jobs]
        with self._signals(), self._raw_terminal():
            for thread in (*outputs, *others):
                thread.start()
            try:
                status = self._attend(timeout)
            except TimedOut:
                process.kill_all()
                with suppress(KvmpyError):
                    process.wait(COLLECT)
                self._drain(outputs)
                raise
            self._drain(outputs)
            return status

    # The main thread.

    def _attend(self, timeout: float | None) -> int:
        """Act on news until the command has ended; its exit status."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            try:
                news = self._news.get(timeout=left)
            except queue.Empty:
                name = self._process.args[0]
                shown = name if isinstance(name, str) else os.fsdecode(name)
                raise TimedOut(f'"{shown}" was killed after {timeout:g} s', "give it more with --timeout") from None
            if news is None:
                code = self._process.returncode
                assert code is not None
                return code if code >= 0 else 128 - code
            if isinstance(news, BrokenPipeError):
                return BROKEN_PIPE  # as a command of the host, which would have had SIGPIPE
            if isinstance(news, OSError):
                raise HostError(f"cannot write the output of the command: {news.strerror}", "make room for it")
            if isinstance(news, Exception):
                raise news
            if news in ENDING:
                status = self._asked_to_end(news)
                if status is not None:
                    return status
            elif news == signal.SIGWINCH:
                self._process.resize(*terminal_size())
            else:
                self._process.send_signal(news, group=True)

    def _asked_to_end(self, number: signal.Signals) -> int | None:
        """The status to end with now; None: the command will end."""
        return 128 + number

    def _drain(self, outputs: list[threading.Thread]) -> None:
        """Let all output of a command that has ended pass; a slow reader of ours gets the time that it needs."""
        begin = time.monotonic()
        while any(thread.is_alive() for thread in outputs):
            quiet = time.monotonic() - LINGER
            if all(max(since, begin) < quiet for since in list(self._waiting.values())):
                return
            for thread in outputs:
                thread.join(0.01)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (*FORWARDED, *ENDING, *((signal.SIGWINCH,) if self._tty else ()))
        previous = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._news.put(signal.Signals(number))

    @contextmanager
    def _raw_terminal(self) -> Iterator[None]:
        terminal = RawTerminal(0, output=True)
        if self._tty:
            terminal.enter()
        try:
            yield
        finally:
            terminal.leave()

    # Threads of their own.

    def _await_end(self) -> None:
        try:
            self._process.wait()
            self._news.put(None)
        except Exception as error:  # GuestLost, or a mistake of ours: without news, nobody would go on
            self._news.put(error)

    def _pass_out(self, stream: BufferedReader, fd: int) -> None:
        try:
            while data := stream.read1(CHUNK):
                self._waiting[fd] = float("inf")
                self._put(fd, data)
                self._waiting[fd] = time.monotonic()
        except GuestLost:
            pass  # who waits for the end of the command tells
        except Exception as error:
            self._news.put(error)
        self._waiting.pop(fd, None)

    def _put(self, fd: int, data: bytes) -> None:
        """Write output of the command to where it belongs; raises OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def _pass_in(self) -> None:
        process = self._process
        try:
            if not os.isatty(0) or is_ours(0):  # to read from another job's terminal would stop us
                while data := os.read(0, CHUNK):
                    view = memoryview(data)
                    while view:
                        view = view[process.write_input(view) :]
            process.end_input()
        except (OSError, GuestLost):  # nobody reads it, or the terminal has gone: both are its end
            with suppress(OSError, GuestLost):
                process.end_input()
        except Exception as error:
            self._news.put(error)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
