"""One connection to the agent: whole frames out, whole frames in, each wait with a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from ..core.errors import AgentError, CommandError, GuestError, GuestFileError, GuestLost, TimedOut
from . import protocol
from .protocol import Frame, Hello, Kind, Parser, Stage

# A new connection to the agent's port. It may have a method `lost(what, remedy="")` that makes the GuestLost, and one
# `within(seconds)` that connects, or raises TimeoutError then.
Connect = Callable[[], socket.socket]

CHUNK = 256 << 10  # bytes of one read
COMMAND_STAGES = frozenset((Stage.USER, Stage.LIMIT, Stage.CWD, Stage.EXEC, Stage.LOADER))


def deadline_after(timeout: float | None) -> float | None:
    """The moment, on the monotonic clock, in `timeout` seconds; None: never."""
    return None if timeout is None else time.monotonic() + timeout


class Link:
    """Sends may come from any thread; one thread at a time may receive."""

    def __init__(self, connect: Connect, request: bytes, timeout: float | None = None) -> None:
        """Connect and send HELLO and `request`, a frame; raises TimedOut when the guest has not answered in `timeout`
        seconds, and GuestLost, or what `connect.lost` makes of that."""
        self._lost: Callable[..., GuestLost] = getattr(connect, "lost", GuestLost)
        self._socket = open_connection(connect, timeout)
        self._socket.setblocking(False)
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._parser = Parser()
        self._greeted = False
        self.closed = False
        self.send(protocol.frame(Kind.HELLO, protocol.HELLO) + request, time.monotonic())

    def send(self, data: bytes, deadline: float | None = None) -> bool:
        """Send `data`; whether all is on its way at `deadline`: if not, the rest goes with what comes next."""
        with self._sending:
            self._unsent += data
        while self._flush():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            # In slices: another thread may close the socket, and its number may then be another file's.
            self._wait(select.POLLOUT, now + 1 if deadline is None else min(deadline, now + 1))
        return True

    def receive(self, deadline: float | None = None) -> list[Frame]:
        """The next frames; none when there are not any at `deadline`. Raises GuestLost when there will not be any."""
        while True:
            events = self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), deadline)
            if not events:
                return []
            if events & select.POLLOUT:
                self._flush()
            if not events & ~select.POLLOUT:
                continue
            try:
                data = self._socket.recv(CHUNK)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise self._lost(f"the connection to the guest is lost: {error.strerror}") from None
            if not data:
                raise self._lost("the connection to the guest is lost: it has ended")
            try:
                frames = self._parser.feed(data)
                if frames and not self._greeted:
                    self._greet(frames)
            except GuestError as error:
                raise GuestLost(str(error)) from None
            if frames:
                return frames

    def close(self) -> None:
        with self._sending:
            self.closed = True
            self._unsent.clear()
            self._socket.close()

    def shut_down(self) -> None:
        """End the connection for whoever receives on it, who is then to close it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """To wait for what `receive` would give; -1 after `close`."""
        return self._socket.fileno()

    def _greet(self, frames: list[Frame]) -> None:
        kind, _, payload = frames[0]
        if kind == Kind.ERROR:
            return
        hello = protocol.parse(Hello, payload)
        if kind != Kind.HELLO or hello.magic != protocol.MAGIC or hello.oldest != protocol.VERSION:
            raise GuestError("what answers in the guest is not its agent")
        self._greeted = True
        del frames[0]

    def _flush(self) -> bool:
        """Send what goes at once; whether there is more."""
        with self._sending:
            while self._unsent:
                try:
                    sent = self._socket.send(self._unsent)
                except (BlockingIOError, InterruptedError):
                    return True
                except OSError:  # lost; but what the agent has said before that is still to be received
                    sent = len(self._unsent)
                del self._unsent[:sent]
        return False

    def _wait(self, events: int, deadline: float | None) -> int:
        """Which of `events` there are before the deadline; 0 when none."""
        poll = select.poll()
        try:
            poll.register(self._socket, events)
        except ValueError:  # closed by another thread
            return select.POLLNVAL
        left = None if deadline is None else max(0, deadline - time.monotonic()) * 1000
        return sum(event for _, event in poll.poll(left))


def open_connection(connect: Connect, timeout: float | None) -> socket.socket:
    """Raises TimedOut after `timeout` seconds, where `connect` can tell, and GuestLost."""
    within = getattr(connect, "within", None)
    try:
        return connect() if timeout is None or within is None else within(timeout)
    except TimeoutError as error:
        if timeout is not None and within is not None:
            raise TimedOut(f"the guest has not answered in {timeout:g} s") from None
        why = str(error)
    except OSError as error:
        why = str(error)
    lost: Callable[..., GuestLost] = getattr(connect, "lost", GuestLost)
    raise lost(f"cannot reach the guest's agent: {why}", "the guest must run, with its agent")


class Inbox:
    """The frames of a link one by one, for requests that are served in order."""

    def __init__(self, link: Link, what: str, timeout: float | None) -> None:
        self._link, self._what, self._timeout = link, what, timeout
        self._frames: deque[Frame] = deque()

    def next(self) -> Frame:
        """The next frame; raises GuestLost, TimedOut when the guest is silent too long, and what an ERROR says."""
        if not self._frames:
            self._frames.extend(self._link.receive(deadline_after(self._timeout)))
            if not self._frames:
                raise TimedOut(f"{self._what}: the guest has not answered in {self._timeout:g} s")
        kind, stream, payload = self._frames.popleft()
        if kind == Kind.ERROR:
            raise failure(payload)
        return kind, stream, payload

    def send(self, data: bytes, last: bool = False) -> None:
        """Send, with an ear for an ERROR, but for the `last` one; raises as `next`."""
        if not self._link.send(data, deadline_after(self._timeout)):
            raise TimedOut(f"{self._what}: the guest has not taken anything in {self._timeout:g} s")
        if not last:
            self._frames.extend(self._link.receive(time.monotonic()))
        if self._frames:
            kind, _, payload = self._frames[0]
            raise failure(payload) if kind == Kind.ERROR else unexpected(kind)

    def end(self) -> None:
        """Take the END that is to come now."""
        kind, _, _ = self.next()
        if kind != Kind.END:
            raise unexpected(kind)


def unexpected(kind: Kind) -> GuestLost:
    return GuestLost(f"the guest's agent sent {kind.name} where it may not")


def failure(payload: bytes) -> AgentError | GuestLost:
    """The exception for an ERROR."""
    try:
        stage, number, text = protocol.parse_error(payload)
    except GuestError as error:
        return GuestLost(str(error))
    name = Stage(stage).name.lower() if stage in Stage.__members__.values() else str(stage)
    if number not in errno.errorcode:
        return GuestLost(f"the guest's agent sent ERROR {stage} with errno {number}")
    why = os.strerror(number)
    if stage == Stage.FILE:
        return GuestFileError(name, number, f"in the guest: {text}: {why}")
    if stage == Stage.PORT:
        remedy = "a program there must listen at it" if number == errno.ECONNREFUSED else ""
        return AgentError(name, number, f"port {text} of the guest: {why}", remedy)
    if stage in COMMAND_STAGES:
        return _command_error(Stage(stage), name, number, text, why)
    remedy = "the guest needs more memory, or has too much running" if stage == Stage.SYSTEM else ""
    return AgentError(name, number, f"the guest's agent: {text}: {why}", remedy)


def _command_error(stage: Stage, name: str, number: int, text: str, why: str) -> CommandError:
    is_missing = number in (errno.ENOENT, errno.ENOTDIR)
    if stage == Stage.USER:
        if is_missing:
            return CommandError(name, number, f'no user "{text}" in the guest', "it has to be in its /etc/passwd")
        return CommandError(name, number, f'cannot become user "{text}" in the guest: {why}')
    if stage == Stage.LIMIT:
        return CommandError(name, number, f"resource limit {text} in the guest: {why}")
    if stage == Stage.CWD:
        return CommandError(name, number, f'working directory "{text}" in the guest: {why}', "make it first")
    if stage == Stage.LOADER:
        return CommandError(name, number, f'what must load or interpret "{text}" is not in the guest', status=127)
    if is_missing:
        return CommandError(name, number, f'command "{text}" not found in the guest', status=127)
    return CommandError(name, number, f'cannot execute "{text}" in the guest: {why}', status=126)


def fs_bytes(text: str | bytes | os.PathLike[str]) -> bytes:
    """As it goes over the connection; raises ValueError when it has a NUL."""
    data = os.fsencode(text)
    if b"\0" in data:
        raise ValueError("embedded null byte")
    return data
