"""Ethernet frames over a stream socket, each behind its length: the way of QEMU's `-netdev stream` and of passt."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import HostError, NotFoundError
from .frames import MAX_FRAME, Frame

LENGTH = 4  # bytes in front of a frame, big-endian
BUFFER = 2 * (LENGTH + MAX_FRAME)  # bytes that are read ahead at most
FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class FrameStream:
    """A NetBackend on a connected stream socket, which it owns; `peer` names the other side in errors.

    Who sends and receives without its methods leaves `rest` and the positions in `buffer` as they would.
    """

    vnet_header = False

    def __init__(self, stream: socket.socket, peer: str) -> None:
        self._socket = stream
        self._peer = peer
        self.rest = memoryview(b"")  # of a frame that the socket took in part
        self.buffer = memoryview(bytearray(BUFFER))
        self.start = self.end = 0  # of what was read and not yet given out

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: Sequence[Frame]) -> bool:
        if not self.flush():
            return False
        size = sum(map(len, frame))
        parts = [size.to_bytes(LENGTH, "big"), *frame]
        sent = self._sent(parts)
        if sent == 0:
            return False
        if sent < LENGTH + size:
            self.rest = memoryview(b"".join(parts))[sent:]  # a copy: the pieces are the guest's again
        return True

    def flush(self) -> bool:
        if self.rest:
            self.rest = self.rest[self._sent([self.rest]) :]
        return not self.rest

    def receive(self) -> Frame | None:
        while True:  # at most until the buffer is full, which is more than a frame
            have = self.end - self.start
            if have >= LENGTH:
                body = self.start + LENGTH
                size = int.from_bytes(self.buffer[self.start : body], "big")
                if not 0 < size <= MAX_FRAME:
                    raise self._broken(f"sent a frame of {size} bytes")
                if have >= LENGTH + size:
                    self.start = body + size
                    return self.buffer[body : body + size]
            if self.start:
                self.buffer[:have] = bytes(self.buffer[self.start : self.end])
                self.start, self.end = 0, have
            try:
                count = self._socket.recv_into(self.buffer[self.end :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._broken(f"has gone: {error.strerror}") from None
            if not count:
                raise self._broken("has hung up")
            self.end += count

    def close(self) -> None:
        self._socket.close()

    def _sent(self, parts: Sequence[Frame]) -> int:
        """How many bytes the socket took."""
        try:
            return self._socket.sendmsg(parts, (), FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(f"has gone: {error.strerror}") from None

    def _broken(self, why: str) -> HostError:
        return HostError(f"{self._peer} {why}")


def connect(path: Path) -> FrameStream:
    """Connect to whoever listens on the UNIX socket `path`; raises NotFoundError or HostError."""
    what = f'cannot connect the network to "{path}"'
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(path))
    except FileNotFoundError:
        stream.close()
        raise NotFoundError(f"{what}: no such socket", "start what listens there first") from None
    except OSError as error:
        stream.close()
        if path.exists() and not path.is_socket():
            raise HostError(f"{what}: it is no socket", "name the UNIX socket where a network listens") from None
        raise HostError(f"{what}: {error.strerror or error}", "start what listens there first") from None
    return FrameStream(stream, f'the network at "{path}"')
