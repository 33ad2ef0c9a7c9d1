"""A TCP port of this host whose connections lead elsewhere: to a port of a guest."""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from ..core.errors import ConfigError, KvmpyError

LOOPBACK = "127.0.0.1"
MAX_CONNECTIONS = 256  # at once; further ones wait
BACKLOG = 128
CHUNK = 1 << 16
JOIN_SECONDS = 2.0

Dial = Callable[[], socket.socket]


class PublishedPort:
    """Listens from the moment it is made; clients wait until `start`. For each connection it calls `dial`; when that
    raises OSError or KvmpyError the connection is closed.

    `port` is the one that it has, if 0 was asked for. Raises ConfigError when it cannot be had. One thread waits for
    connections, one more carries each of them.
    """

    def __init__(self, dial: Dial, port: int, ip: str = LOOPBACK) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        try:
            self._listener = socket.create_server((ip, port), family=family, backlog=BACKLOG)
        except OSError as error:
            denied = error.errno == errno.EACCES
            remedy = "publish one from 1024 on" if denied else "publish another one"
            why = error.strerror.partition(" (")[0] if error.strerror else str(error)
            raise ConfigError(f"cannot publish tcp port {port} of {ip}: {why}", remedy) from None
        self.port: int = self._listener.getsockname()[1]
        self._dial = dial
        self._room = threading.Semaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="kvmpy-published", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more connections; those that there are end. Safe to call twice."""
        with self._lock:
            self._closed = True
            for stream in self._open:
                _shut_down(stream)
            threads = list(self._threads)
        self._room.release()
        _shut_down(self._listener)
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
        for thread in threads:
            thread.join(JOIN_SECONDS)
        self._listener.close()

    def _serve(self) -> None:
        while not self._closed:
            self._room.acquire()
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                self._room.release()
                if error.errno in (errno.EINVAL, errno.EBADF):  # shut down
                    return
                threading.Event().wait(0.1)  # no descriptor, for now
                continue
            thread = threading.Thread(target=self._carry, args=(client,), name="kvmpy-connection", daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _carry(self, client: socket.socket) -> None:
        try:
            with client:
                if self._note(client):
                    with suppress(OSError, KvmpyError), self._dial() as guest:
                        if self._note(guest):
                            carry(client, guest)
                        self._forget(guest)
                self._forget(client)
        finally:
            self._room.release()
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _note(self, stream: socket.socket) -> bool:
        """Have it end when the port is closed; False if that has happened."""
        with self._lock:
            if not self._closed:
                self._open.add(stream)
            return not self._closed

    def _forget(self, stream: socket.socket) -> None:
        with self._lock:
            self._open.discard(stream)


def carry(a: socket.socket, b: socket.socket) -> None:
    """Pass bytes on in both directions, each until its end, which is passed on as well; returns then, or raises
    OSError when a connection is lost."""
    a.setblocking(False)
    b.setblocking(False)
    ways = {a: b, b: a}  # those that have not ended
    waiting: dict[socket.socket, memoryview] = {}  # for whom there is something that it has not taken yet
    while ways or waiting:
        events: dict[socket.socket, int] = dict.fromkeys(waiting, select.POLLOUT)
        for source, target in ways.items():
            if target not in waiting:
                events[source] = events.get(source, 0) | select.POLLIN
        poll = select.poll()
        for stream, wanted in events.items():
            poll.register(stream, wanted)
        by_number = {stream.fileno(): stream for stream in events}
        for number, _ in poll.poll():
            stream = by_number[number]
            if stream in waiting:
                _give(stream, waiting)
            if stream in ways and ways[stream] not in waiting:
                _take(stream, ways, waiting)


def _take(
    source: socket.socket, ways: dict[socket.socket, socket.socket], waiting: dict[socket.socket, memoryview]
) -> None:
    try:
        data = source.recv(CHUNK)
    except BlockingIOError:
        return
    target = ways[source]
    if data:
        waiting[target] = memoryview(data)
        _give(target, waiting)
    else:
        del ways[source]
        with suppress(OSError):  # it has gone by itself
            target.shutdown(socket.SHUT_WR)


def _give(target: socket.socket, waiting: dict[socket.socket, memoryview]) -> None:
    try:
        left = waiting[target][target.send(waiting[target]) :]
    except BlockingIOError:
        return
    if left:
        waiting[target] = left
    else:
        del waiting[target]


def _shut_down(stream: socket.socket) -> None:
    with suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)
