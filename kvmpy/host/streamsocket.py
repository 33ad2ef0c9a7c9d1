"""A connected stream socket that a device serves: nothing blocks, and each of its two halves ends by itself."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ..core.buffers import behind, total
from ..core.events import WRITE, EventLoop

FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class StreamSocket:
    """Owns `stream`. Methods are called with the lock of `owner` held; so is `woken`, on the loop, when something that
    `watch` waits for may have happened: output has room, there is input, the other side has gone.
    """

    def __init__(self, loop: EventLoop, stream: socket.socket, woken: Callable[[], None], owner: Any) -> None:
        stream.setblocking(False)
        self._loop, self._socket, self._woken, self._owner = loop, stream, woken, owner
        self._backlog = bytearray()  # output that the host has not taken
        self._events = -1  # what the loop watches for; -1: nothing, not even the end
        self._finishing = False
        self._retired: Callable[[], None] | None = None
        self.deaf = False  # nobody reads what is written

    # Output.

    @property
    def held(self) -> int:
        """Bytes of output that the host has not taken; the caller sees to it that they have a bound."""
        return len(self._backlog)

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Send what the host takes at once, and keep a copy of the rest; all is lost when nobody reads."""
        if self._backlog or self.deaf:
            taken = total(buffers) if self.deaf else 0
        else:
            taken = self._send(buffers, total(buffers))
        for rest in behind(buffers, taken):
            self._backlog += rest

    def flush(self) -> None:
        """Send what was kept, as far as the host takes it."""
        if self._backlog:
            with memoryview(self._backlog) as waiting:
                taken = self._send([waiting], len(waiting))
            del self._backlog[:taken]
        if self._finishing and not self._backlog:
            self._shut(socket.SHUT_WR)

    def finish(self) -> None:
        """There will be no more output: the other side reads the end, behind all that was written."""
        self._finishing = True
        self.flush()

    # Input.

    def read_into(self, buffers: Sequence[memoryview]) -> int:
        """Fill `buffers`, as far as there is input; how many bytes, 0 at its end. Raises BlockingIOError for none."""
        try:
            return self._socket.recvmsg_into(buffers, 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            raise
        except OSError:  # ECONNRESET: the other side has left without reading all
            return 0

    def refuse(self) -> None:
        """Take no more input: the other side cannot write any more."""
        self._shut(socket.SHUT_RD)

    # Both.

    def watch(self, events: int) -> None:
        """Wait for `events`, READ or WRITE or both, or with 0 for the other side to go; with -1 for nothing."""
        if events != self._events:
            if self._events >= 0:
                self._loop.remove(self._socket.fileno())
            self._events = events
            if events >= 0:
                self._loop.add(self._socket.fileno(), self._woken, events=events, owner=self._owner)

    @property
    def hung_up(self) -> bool:
        """Whether nothing can go either way any more, but for input that has come already."""
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))

    def retire(self, done: Callable[[], None]) -> None:
        """Close when all output is where it should go, or nobody is there to take it; then call `done`."""
        self._retired, self._woken = done, self._retire
        self.watch(-1)
        self.refuse()
        self._retire()

    def close(self) -> None:
        """Close now; output that was kept is lost."""
        self.watch(-1)
        self._socket.close()
        self._backlog.clear()
        self.deaf = True

    # Inside.

    def _retire(self) -> None:
        self.flush()
        if self._backlog:
            self.watch(WRITE)
            return
        self.close()
        if self._retired is not None:
            self._retired()

    def _send(self, buffers: Sequence[memoryview], size: int) -> int:
        """How many of the `size` bytes need not be kept."""
        if not size:
            return 0
        try:
            return self._socket.sendmsg(buffers, (), FLAGS)
        except BlockingIOError:
            return 0
        except OSError:  # EPIPE, ECONNRESET: nobody reads any more
            self.deaf = True
            return size

    def _shut(self, half: int) -> None:
        try:
            self._socket.shutdown(half)
        except OSError:  # ENOTCONN: the other side has gone
            self.deaf = True
