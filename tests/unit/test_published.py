"""Ports of the host that lead elsewhere: bytes both ways, ends of every kind, nothing left."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from kvmpy.core.errors import ConfigError, GuestLost
from kvmpy.host.published import PublishedPort

LIMIT = 20.0


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Where the port leads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT)
        yield server


@pytest.fixture
def published(server: socket.socket) -> Iterator[PublishedPort]:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    port = PublishedPort(lambda: socket.create_connection(server.getsockname()), 0)
    port.start()
    yield port
    port.close()
    port.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def client(port: PublishedPort) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port.port), LIMIT)


def all_of(stream: socket.socket) -> bytes:
    return b"".join(iter(lambda: stream.recv(1 << 20), b""))


def test_both_directions_end_by_themselves(server: socket.socket, published: PublishedPort) -> None:
    data = os.urandom(5_000_000)  # more than all buffers between the two
    with client(published) as near:
        far, _ = server.accept()
        sender = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
        sender.start()
        with far:
            received = all_of(far)
            sender.join(LIMIT)
            far.sendall(b"answer")
        answer = all_of(near)

    assert received == data
    assert answer == b"answer"


def test_many_at_once(server: socket.socket, published: PublishedPort) -> None:
    clients = [client(published) for _ in range(20)]
    others = [server.accept()[0] for _ in clients]
    for number, near in enumerate(clients):
        near.sendall(b"%d" % number)
        near.shutdown(socket.SHUT_WR)
    received = sorted(int(all_of(far)) for far in others)
    for stream in (*clients, *others):
        stream.close()

    assert received == list(range(20))


def test_a_connection_that_is_reset(server: socket.socket, published: PublishedPort) -> None:
    with client(published) as near:
        far, _ = server.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        assert near.recv(1) == b""


@pytest.mark.parametrize("error", [ConnectionRefusedError(), GuestLost("gone")])
def test_nobody_is_there(error: Exception) -> None:
    def dial() -> socket.socket:
        raise error

    with closing(PublishedPort(dial, 0)) as port:
        port.start()
        with client(port) as near:
            assert near.recv(1) == b""


def test_clients_wait_until_it_starts(server: socket.socket) -> None:
    with (
        closing(PublishedPort(lambda: socket.create_connection(server.getsockname()), 0)) as port,
        client(port) as near,
    ):
        near.sendall(b"early")
        near.shutdown(socket.SHUT_WR)
        port.start()
        far, _ = server.accept()
        with far:
            assert all_of(far) == b"early"


def test_connections_end_with_it(server: socket.socket) -> None:
    port = PublishedPort(lambda: socket.create_connection(server.getsockname()), 0)
    port.start()
    with client(port) as near:
        far, _ = server.accept()
        begin = time.monotonic()
        port.close()
        assert near.recv(1) == b""
        far.close()
    assert time.monotonic() - begin < LIMIT
    with pytest.raises(ConnectionRefusedError):
        client(port)


def test_a_port_that_is_taken(server: socket.socket) -> None:
    number = server.getsockname()[1]

    with pytest.raises(
        ConfigError, match=f"cannot publish tcp port {number} of 127.0.0.1: Address already in use; publish another one"
    ):
        PublishedPort(lambda: server, number)
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        PublishedPort(lambda: server, 0, "192.0.2.1")
