"""Connections to TCP ports of the guest, through its agent: it needs no network card for that."""

from __future__ import annotations

import socket

from ..core.errors import GuestError, GuestLost, TimedOut
from . import protocol
from .link import Connect, failure, open_connection, unexpected
from .protocol import MAX_DATA, Header, Hello, Kind, Number


def dial(connect: Connect, port: int, timeout: float | None = None) -> socket.socket:
    """A connection to port `port` of the guest's loopback interface, which then is the stream itself.

    Raises AgentError (stage "port") when nobody listens there, TimedOut when the guest says nothing for `timeout`
    seconds, and GuestLost.
    """
    lost = getattr(connect, "lost", GuestLost)
    stream = open_connection(connect, timeout)
    try:
        stream.settimeout(timeout)
        hello = protocol.frame(Kind.HELLO, protocol.HELLO)
        stream.sendall(hello + protocol.frame(Kind.DIAL, bytes(Number(port))))
        _expect(stream, Kind.HELLO)
        _expect(stream, Kind.END)
        stream.settimeout(None)
    except BaseException as error:
        stream.close()
        if isinstance(error, TimeoutError):
            raise TimedOut(f"port {port}: the guest has not answered in {timeout:g} s") from None
        if isinstance(error, OSError):
            raise lost(f"the connection to the guest is lost: {error.strerror}") from None
        if isinstance(error, GuestError):
            raise GuestLost(str(error)) from None
        raise
    return stream


def _expect(stream: socket.socket, wanted: Kind) -> None:
    """Receive one frame of that kind, and nothing behind it."""
    length, number, _, zero = Header.LAYOUT.unpack(_exactly(stream, Header.SIZE))
    if length > MAX_DATA or number not in protocol.KINDS or zero:
        raise GuestError("the guest's agent sent a bad frame")
    payload = _exactly(stream, length)
    kind = Kind(number)
    if kind == Kind.ERROR:
        raise failure(payload)
    if kind != wanted:
        raise unexpected(kind)
    if kind == Kind.HELLO and protocol.parse(Hello, payload).magic != protocol.MAGIC:
        raise GuestError("what answers in the guest is not its agent")


def _exactly(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            raise ConnectionResetError(104, "it has ended")
        data += part
    return data
