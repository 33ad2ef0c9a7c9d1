"""Where a console ends on the host: standard input and output, a file, a UNIX socket, a pseudo-terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..core.errors import HostError
from ..core.events import EventLoop
from .stream import Reader, Writer
from .tty import HELP, EscapeKeys, Key, RawTerminal, is_ours

Received = Callable[[bytes], None]
Sent = Callable[[int], None]

END_PERIOD = 1.0  # seconds


class Stdio:
    """Standard input and output; with a terminal to type at, raw mode and the Ctrl-a keys.

    At the end of its input the guest gets `at_end`, again and again, since a program that changes the terminal's modes
    may throw it away. With `received` None, input is left alone, raw mode included.
    """

    def __init__(
        self,
        loop: EventLoop,
        received: Received | None,
        sent: Sent,
        command: Callable[[Key], None],
        *,
        at_end: bytes = b"",
    ) -> None:
        self._loop = loop
        self._command = command
        self._at_end = at_end
        self.interactive = False
        self._reader: Reader | None = None
        self._terminal = RawTerminal(sys.__stdin__.fileno() if sys.__stdin__ else 0)
        self._writer = Writer(loop, 1, sent)
        if received is not None and (not os.isatty(0) or is_ours(0)):
            self._received = received
            self._keys = EscapeKeys(received, self._key)
            self.interactive = self._terminal.enter()
            self._reader = Reader(loop, 0, self._typed)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def pause(self) -> None:
        """Leave input with the host. Not on a terminal: its keys must reach kvmpy when the guest is deaf."""
        if self._reader is not None and not self.interactive:
            self._reader.pause()

    def resume(self) -> None:
        if self._reader is not None:
            self._reader.resume()

    def close(self) -> None:
        self._terminal.leave()
        self._writer.close()

    def _typed(self, data: bytes) -> None:
        if not data:
            self._tell_end()
        elif self.interactive:
            self._keys.feed(data)
        else:
            self._received(data)

    def _tell_end(self) -> None:
        if self._at_end:
            self._received(self._at_end)
            self._loop.after(END_PERIOD, self._tell_end)

    def _key(self, key: Key) -> None:
        if key is Key.HELP:
            sys.stderr.write(HELP)
            sys.stderr.flush()
        else:
            self._command(key)


class File:
    """Output only, into a file that is made or emptied; of more than `limit` bytes the rest is lost."""

    def __init__(self, loop: EventLoop, path: str, sent: Sent, limit: int | None = None) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY, 0o644)
        except OSError as error:
            raise HostError(f'cannot write console output to "{path}": {error.strerror}', "name another file") from None
        self._writer = Writer(loop, fd, sent)
        self._sent = sent
        self._room = limit
        os.close(fd)

    def write(self, data: bytes) -> None:
        if self._room is not None:
            kept = data[: self._room]
            self._room -= len(kept)
            if len(kept) < len(data):
                self._sent(len(data) - len(kept))
            data = kept
        if data:
            self._writer.write(data)

    def pause(self) -> None:
        return

    def resume(self) -> None:
        return

    def close(self) -> None:
        self._writer.close()


class Pty:
    """A new pseudo-terminal; `path` is the end for a terminal program to open."""

    def __init__(self, loop: EventLoop, received: Received, sent: Sent) -> None:
        self._master, self._slave = os.openpty()  # the slave stays open, or the master reads EIO between clients
        self.path = os.ttyname(self._slave)
        terminal = RawTerminal(self._slave)
        terminal.make_raw()
        self._sent = sent
        os.set_blocking(self._master, False)
        self._reader = Reader(loop, self._master, received)

    def write(self, data: bytes) -> None:
        """Nobody may be reading: what does not fit is dropped, as on a line with nothing plugged in."""
        try:
            os.write(self._master, data)
        except OSError:
            self._sent(len(data))
        else:
            self._sent(len(data))

    def pause(self) -> None:
        self._reader.pause()

    def resume(self) -> None:
        self._reader.resume()

    def close(self) -> None:
        self._reader.pause()
        os.close(self._master)
        os.close(self._slave)
