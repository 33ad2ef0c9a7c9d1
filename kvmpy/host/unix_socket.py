"""A UNIX socket on the host to which a stream of the guest's bytes is connected."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import HostError
from ..core.events import EventLoop
from .endpoint import Received, Sent
from .stream import Reader, Writer

NO_ROOM_PERIOD = 0.1  # seconds until the next client is accepted, when there was no descriptor for one
NAMES: set[Path] = set()  # of all sockets that listen


class UnixSocket:
    """A listening socket at `path`, one client at a time; without one, output goes nowhere.

    With an `owner`, callbacks have its lock, and calls must.
    """

    def __init__(self, loop: EventLoop, path: Path, received: Received, sent: Sent, owner: Any = None) -> None:
        self._loop, self._path, self._received, self._sent, self._owner = loop, path, received, sent, owner
        self._client: socket.socket | None = None
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._socket = listen_at(path)
        self._listen()

    def write(self, data: bytes) -> None:
        if self._writer is None:
            self._sent(len(data))
        else:
            self._writer.write(data)

    def pause(self) -> None:
        if self._reader is not None:
            self._reader.pause()

    def resume(self) -> None:
        if self._reader is not None:
            self._reader.resume()

    def close(self) -> None:
        self._hang_up()
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        remove(self._path)

    def _listen(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add(self._socket.fileno(), self._accept, owner=self._owner)

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except BlockingIOError:  # gone again
            return
        except OSError:
            self._wait_for_room()
            return
        if self._client is not None:
            client.close()
            return
        client.setblocking(False)
        try:
            writer = Writer(self._loop, client.fileno(), self._sent, self._owner)
        except OSError:
            client.close()
            self._wait_for_room()
            return
        self._client, self._writer = client, writer
        self._reader = Reader(self._loop, client.fileno(), self._typed, self._owner)

    def _wait_for_room(self) -> None:
        """There is no descriptor for a client now; the listener would be ready again at once, and again."""
        self._loop.remove(self._socket.fileno())
        self._loop.after(NO_ROOM_PERIOD, self._listen, owner=self._owner)

    def _typed(self, data: bytes) -> None:
        if data:
            self._received(data)
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._client is not None and self._writer is not None and self._reader is not None:
            self._reader.pause()
            self._writer.close()
            self._client.close()
            self._client = self._writer = self._reader = None


def listen_at(path: Path, backlog: int = 1) -> socket.socket:
    """A non-blocking socket that listens at `path`, for this user alone; raises HostError when that cannot be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and _nobody_listens(path):
            path.unlink()
        os.fchmod(listener.fileno(), 0o600)  # what bind makes has this mode: the name might be another's by then
        listener.bind(str(path))
        listener.listen(backlog)
        NAMES.add(path.absolute())
    except OSError as error:
        listener.close()
        raise HostError(f'cannot listen on "{path}": {error.strerror or error}', "name another path") from None
    return listener


def remove(path: Path) -> None:
    """Take away the name of a socket of `listen_at`; a process that is locked in leaves that to another one."""
    with suppress(PermissionError, FileNotFoundError):
        path.unlink()
        NAMES.discard(path.absolute())


def _nobody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        return False
