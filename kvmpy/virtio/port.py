"""A named port of a console device that ends in a UNIX socket, for a program in the guest that serves the host.

Linux: VIRTIO_CONSOLE. The guest sees /dev/vport0p1, which udev links to as /dev/virtio-ports/NAME. Nothing waits
without bound: what the guest does not read stays with the socket's client, what the client does not read stays in the
guest. A hostile guest has what virtio/console.py says, and a program on the host that must not trust it.
"""

from __future__ import annotations

from pathlib import Path

from ..core.board import Board
from ..host.unix_socket import UnixSocket
from .console import VirtioConsole

OUTPUT_LIMIT = 1 << 18  # bytes under way to the client; beyond, the guest waits


class PortSocket(VirtioConsole):
    """A console device without a console (5.3.6.2): its only port is a stream to whoever connects to `path`.

    port  the port's name in the guest
    path  the socket, which is made; one client at a time. Without one, what the guest writes is lost
    """

    has_console = False

    def __init__(self, *, port: str, path: Path) -> None:
        super().__init__(ports=2)
        self.path = path
        self.port = self.add_port(port, self._said)
        self.port.on_room = lambda: self.board.loop.call_soon(self._feed, owner=self)
        self._socket: UnixSocket | None = None
        self._input = b""  # from the client, not yet taken by the port
        self._under_way = 0  # bytes to the client
        self._full = False

    def attach(self, board: Board) -> None:
        """Listen at `path`; raises HostError when that cannot be."""
        self._socket = UnixSocket(board.loop, self.path, self._received, self._sent, owner=self)
        try:
            super().attach(board)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # With the lock held, as everything: the socket's callbacks have it for their owner.

    def _said(self, data: bytes) -> bool:
        if self._socket is not None:
            self._under_way += len(data)
            self._socket.write(data)
        self._full = self._under_way >= OUTPUT_LIMIT
        return not self._full

    def _sent(self, count: int) -> None:
        self._under_way -= count
        if self._full and self._under_way <= OUTPUT_LIMIT // 2:
            self._full = False
            self.port.drained()

    def _received(self, data: bytes) -> None:
        self._input += data
        self._feed()

    def _feed(self) -> None:
        self._input = self._input[self.port.write(self._input) :]
        if self._socket is not None:
            (self._socket.pause if self._input else self._socket.resume)()
