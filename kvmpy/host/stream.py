"""Byte streams to and from the host that never block: descriptors watched by an event loop.

With an `owner`, callbacks have its lock.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from ..core.events import READ, WRITE, EventLoop
from ..core.typed import TYPE_CHECKING, Any

CHUNK = 4096  # read at a time; input that the guest is slow to take stays with the host

if TYPE_CHECKING:
    import socket


class Writer:
    """Sends to `fd` what it takes at once, keeps the rest, and says through `sent(count)` how much has gone.

    Owns a descriptor of its own: `fd` itself is left as it is, above all not switched to non-blocking, since a
    terminal or a pipe is shared with other processes. When the other side has gone, bytes are counted as sent.
    """

    def __init__(self, loop: EventLoop, fd: int, sent: Callable[[int], None], owner: Any = None) -> None:
        self._loop = loop
        self._owner = owner
        self._sent = sent
        self._backlog = bytearray()
        self._gone = False
        self._waiting = False
        self._blocks = True  # a regular file does not, and cannot be watched
        self._socket: socket.socket | None = None
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            import socket  # takes milliseconds to load

            self._flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._socket = socket.socket(fileno=os.dup(fd))
            self._fd = self._socket.fileno()
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            self._fd = _reopen(fd)
        else:
            self._fd = os.dup(fd)  # its offset must stay shared
            self._blocks = False

    def write(self, data: bytes | bytearray) -> None:
        """Send `data` after what is still waiting; on the loop's thread."""
        self._backlog += data
        if not self._waiting:
            self._flush()

    def close(self) -> None:
        """Stop watching; what the host has not taken is lost, and counted as sent."""
        if self._waiting:
            self._loop.remove(self._fd)
            self._waiting = False
        if self._socket is not None:
            self._socket.close()
        elif self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        lost = len(self._backlog)
        self._backlog.clear()
        self._sent(lost)

    def _flush(self) -> None:
        if not self._blocks:
            self._write_file()
            return
        count = len(self._backlog)
        if not self._gone:
            try:
                if self._socket is not None:
                    count = self._socket.send(self._backlog, self._flags)
                else:
                    count = os.write(self._fd, self._backlog)
            except BlockingIOError:
                count = 0
            except OSError:  # EPIPE, EIO, ENOSPC ...: nobody reads any more; the guest must not wait for them
                self._gone = True
        del self._backlog[:count]
        self._sent(count)
        if self._backlog and not self._waiting:
            self._loop.add(self._fd, self._flush, events=WRITE, owner=self._owner)
        elif not self._backlog and self._waiting:
            self._loop.remove(self._fd)
        self._waiting = bool(self._backlog)

    def _write_file(self) -> None:
        """What there is no room for is lost; later output may find room again."""
        count = len(self._backlog)
        try:
            while self._backlog:
                del self._backlog[: os.write(self._fd, self._backlog)]
        except OSError:
            self._backlog.clear()
        self._sent(count)


class Reader:
    """Calls `received(data)` with what arrives at `fd`, and with b"" once, at its end; `pause` leaves it with the host.

    Methods are for the loop's thread. A regular file cannot be watched by epoll and is read turn by turn instead.
    """

    def __init__(self, loop: EventLoop, fd: int, received: Callable[[bytes], None], owner: Any = None) -> None:
        self._loop = loop
        self._owner = owner
        self._fd = fd
        self._received = received
        self._running = False
        self._ended = False
        self._watchable = True
        self.resume()

    def pause(self) -> None:
        if self._running and self._watchable:
            self._loop.remove(self._fd)
        self._running = False

    def resume(self) -> None:
        if self._running or self._ended:
            return
        self._running = True
        try:
            self._loop.add(self._fd, self._read, events=READ, owner=self._owner)
        except PermissionError:  # epoll_ctl: EPERM for files that are always ready
            self._watchable = False
            self._loop.call_soon(self._read, owner=self._owner)

    def _read(self) -> None:
        if not self._running:
            return
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: the terminal has gone
            data = b""
        if not data:
            self.pause()
            self._ended = True
        elif not self._watchable:
            self._loop.call_soon(self._read, owner=self._owner)
        self._received(data)


def _reopen(fd: int) -> int:
    """A non-blocking descriptor of the same pipe or device; the given one where the host does not allow it."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)
