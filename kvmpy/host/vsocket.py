"""A UNIX socket on the host for connections to ports of a guest, and UNIX sockets for those that the guest makes.

The way of Firecracker (docs/vsock.md there), which other monitors and tools have taken over. To reach port 52 of the
guest, a client connects to `path` and writes the line "CONNECT 52"; the answer is the line "OK 1073741824", which names
the host's port, and the stream begins behind it; without an answer there was nobody. A guest that connects to port 52
of the host reaches whoever listens at `path`_52.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..core.events import EventLoop
from .unix_socket import NO_ROOM_PERIOD, listen_at, remove

BACKLOG = 128  # clients that have connected and wait for their turn
LINE_LIMIT = 32  # bytes of a client's first line
REQUEST = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")

Called = Callable[[int, socket.socket], None]


def call(path: Path, port: int, timeout: float | None = None) -> socket.socket:
    """Connect to port `port` of the guest behind `path`, as a client; raises OSError, also when nobody answers there.

    `timeout` in seconds is for this, and stays that of the socket.
    """
    stream = socket.socket(socket.AF_UNIX)
    try:
        stream.settimeout(timeout)
        stream.connect(str(path))
        stream.sendall(b"CONNECT %d\n" % port)
        line = b""
        while len(line) < LINE_LIMIT and not line.endswith(b"\n"):
            byte = stream.recv(1)  # not more: the stream begins behind the line
            if not byte:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at port {port} of the guest")
            line += byte
        if not line.startswith(b"OK "):
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"what listens at {path} is no guest")
    except BaseException:
        stream.close()
        raise
    return stream


class VsockListener:
    """Listens at `path`. `called(port, client)` has a client that wants a port of the guest, with the owner's lock.

    `room()` says whether another one may be accepted.
    """

    def __init__(self, loop: EventLoop, path: Path, called: Called, room: Callable[[], bool], owner: Any) -> None:
        self._loop, self._path, self._called, self._room, self._owner = loop, path, called, room, owner
        self._lines: dict[socket.socket, bytes] = {}  # of clients that have not said yet what they want
        self._socket = listen_at(path, BACKLOG)
        self._closed = False
        self._listen()

    def __len__(self) -> int:
        """How many clients have yet to say what they want."""
        return len(self._lines)

    def close(self) -> None:
        for client in list(self._lines):
            self._forget(client)
            client.close()
        if not self._closed:
            self._closed = True
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            remove(self._path)

    def dial(self, port: int) -> socket.socket | None:
        """A connection to whoever listens for port `port` of the host; None: nobody, or nobody who has room."""
        try:
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # EMFILE
            return None
        try:
            stream.connect(f"{self._path}_{port}")
        except OSError:  # ENOENT, ECONNREFUSED, EAGAIN, or a path that is too long
            stream.close()
            return None
        return stream

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add(self._socket.fileno(), self._accept, owner=self._owner)

    def _accept(self) -> None:
        try:
            if not self._room():
                raise OSError
            client, _ = self._socket.accept()
        except BlockingIOError:  # gone again
            return
        except OSError:  # the listener would be ready again at once, and again
            self._loop.remove(self._socket.fileno())
            self._loop.after(NO_ROOM_PERIOD, self._listen, owner=self._owner)
            return
        client.setblocking(False)
        self._lines[client] = b""
        self._loop.add(client.fileno(), partial(self._hear, client), owner=self._owner)

    def _hear(self, client: socket.socket) -> None:
        """Its first line, and nothing behind it, which is for the guest."""
        if client not in self._lines:  # closed, while the loop waited for the lock
            return
        try:
            waiting = client.recv(LINE_LIMIT, socket.MSG_PEEK)
            size = waiting.find(b"\n") + 1 or len(waiting)
            self._lines[client] = line = self._lines[client] + client.recv(size)
        except BlockingIOError:
            return
        except OSError:  # ECONNRESET
            waiting = line = b""
        if waiting and len(line) < LINE_LIMIT and not line.endswith(b"\n"):
            return
        self._forget(client)
        found = REQUEST.fullmatch(line)
        if found is None:
            client.close()
        else:
            self._called(int(found[1]), client)

    def _forget(self, client: socket.socket) -> None:
        self._loop.remove(client.fileno())
        del self._lines[client]
