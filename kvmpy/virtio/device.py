"""What differs between virtio devices: constants and three verbs; all else is the transport's.

    class Rng(VirtioDevice):
        type_id = Type.ENTROPY
        queue_sizes = (64,)

        def notify(self, index: int, queue: VirtQueue) -> None:
            for chain in queue.available():
                chain.write(os.urandom(min(chain.capacity, MAX_REQUEST)))
                queue.push(chain)

A chain that breaks the device's own protocol: raise GuestError, and the transport sets DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..core.board import Board
from ..core.events import EventLoop
from ..core.regs import Device
from .queue import VirtQueue


class VirtioDevice(Device):
    """Base of all virtio devices. Every method is called with `lock` held, on `loop` or a vCPU's thread."""

    type_id: ClassVar[int]
    queue_sizes: Sequence[int] = ()  # the most entries of each queue: powers of two
    features: int = 0  # what the device offers, of its own type's bits
    needs: ClassVar[Mapping[int, int]] = {}  # features that are taken only with one of those others (2.2.1)
    config: bytes | bytearray = b""  # the configuration space, as it reads
    modules: ClassVar[Sequence[str]] = ()  # the driver in the guest, where it is no part of the kernel
    # For a process that is locked in: whether the device opens files or UNIX sockets while the guest runs; the folders
    # in which it opens files, each with whether it changes them; how long a file may become by its work, in bytes.
    reaches: bool = False
    folders: Sequence[tuple[Path, bool]] = ()
    longest_file: int = 0
    own_thread: ClassVar[bool] = False  # for devices that wait long enough to hold up others

    board: Board
    loop: EventLoop  # the board's, or one that serves this device alone
    queues: Sequence[VirtQueue] = ()  # while the driver is up
    _tell_config: Callable[[], None] | None = None
    _serve: Callable[[int], None] | None = None

    def attach(self, board: Board) -> None:
        """Put the device on the board, which brings the transport."""
        self.board = board
        self.loop = board.new_loop(type(self).__name__.lower()) if self.own_thread else board.loop
        board.virtio(self)

    def activate(self, features: int, queues: Sequence[VirtQueue]) -> None:
        """The driver is up and has accepted `features`; `queues` may hold chains already, `notify` follows."""

    def notify(self, index: int, queue: VirtQueue) -> None:
        """The driver has put something into queue `index`; what is pushed meanwhile is signalled afterwards."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the driver. On return nothing of the device touches guest memory or pushes a chain."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space; most devices have nothing there that it could change."""

    def config_changed(self) -> None:
        """Tell the driver to read `config` again (for the device itself, with `lock` held)."""
        if self._tell_config is not None:
            self._tell_config()

    def serve(self, index: int) -> None:
        """Have `notify` called for queue `index`, as if the driver had kicked it: the host is ready for what waits
        there (for the device itself, on the event loop, with `lock` held)."""
        if self._serve is not None:
            self._serve(index)

    def close(self) -> None:
        """Give back what the host lent; called once, after the last `reset`."""

    def state(self) -> dict[str, Any]:
        """What the device knows besides its queues, as plain values, with its version."""
        return {"version": self.VERSION}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; raises ValueError for another version."""
        if state.get("version") != self.VERSION:
            raise ValueError(f"{type(self).__name__}: state version {state.get('version')}, expected {self.VERSION}")
