"""The life of a virtio device that all transports share: status, features, queues, errors (VIRTIO 1.2, 2 and 3)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.board import Board
from ..core.errors import GuestError
from .device import VirtioDevice
from .queue import QueueError, VirtQueue
from .spec import STATUS, TRANSPORT_FEATURES, F

HALF = 0xFFFFFFFF  # features travel as two 32-bit halves
STEPS = (  # 3.1.1: each status bit, and the one that comes before it
    (STATUS.DRIVER, STATUS.ACKNOWLEDGE),
    (STATUS.FEATURES_OK, STATUS.DRIVER),
    (STATUS.DRIVER_OK, STATUS.FEATURES_OK),
)


class VirtioCore:
    """One device and its driver's progress. `used(queue)` and `changed()` are the transport's interrupts.

    Every method but `kick` is called with the device's lock held.
    """

    def __init__(
        self, device: VirtioDevice, board: Board, used: Callable[[VirtQueue], None], changed: Callable[[], None]
    ) -> None:
        self.device = device
        self.offered = device.features | TRANSPORT_FEATURES
        self.queues = [VirtQueue(n, size, board.mem, used) for n, size in enumerate(device.queue_sizes)]
        self.generation = 0  # of the configuration space
        self._board = board
        self._changed = changed
        self.status = 0
        self.accepted = 0
        self._kicked: set[int] = set()  # queues that the loop has yet to serve
        device._tell_config = self._config_changed
        device._serve = self.notify

    # Status.

    def write_status(self, value: int) -> None:
        """The driver writes the device status (2.1.1, 3.1.1): it may only add bits, in order; 0 resets."""
        if value == 0:
            self.reset()
            return
        old = self.status
        new = old | value & STATUS.WRITABLE
        for step, stands_on in STEPS:
            if not new & stands_on:
                new &= ~step
        if new & ~old & STATUS.FEATURES_OK and not self._acceptable():
            new &= ~(STATUS.FEATURES_OK | STATUS.DRIVER_OK)
        if new & ~old & STATUS.DRIVER_OK and new & STATUS.FAILED:
            new &= ~STATUS.DRIVER_OK
        self.status = new
        if new & ~old & STATUS.DRIVER_OK:
            self._activate()

    def reset(self) -> None:
        """As after power-on; on return the device uses no guest memory any more (2.4)."""
        live = self.running
        self.status = self.accepted = 0
        for queue in self.queues:
            queue.stop()
        if live:
            self.device.queues = ()
        self.device.reset()
        for queue in self.queues:
            queue.reset()

    @property
    def running(self) -> bool:
        """Whether the driver is up and the device works."""
        return bool(self.status & STATUS.DRIVER_OK) and not self.status & STATUS.DEVICE_NEEDS_RESET

    def fail(self, error: GuestError) -> None:
        """The driver broke the rules: stop, and say that a reset is needed (2.1.2)."""
        if self.status & STATUS.DEVICE_NEEDS_RESET:
            return
        self._board.log("virtio device needs a reset", device=type(self.device).__name__, why=str(error))
        self.status |= STATUS.DEVICE_NEEDS_RESET
        for queue in self.queues:
            queue.stop()
        if self.status & STATUS.DRIVER_OK:
            self._changed()

    # Features.

    def device_features(self, half: int) -> int:
        return self.offered >> 32 * half & HALF if half < 2 else 0

    def accepted_features(self, half: int) -> int:
        return self.accepted >> 32 * half & HALF if half < 2 else 0

    def accept_features(self, half: int, value: int) -> None:
        """The driver writes half of the features that it takes; later than FEATURES_OK nothing changes."""
        if half < 2 and not self.status & STATUS.FEATURES_OK:
            self.accepted = self.accepted & ~(HALF << 32 * half) | value << 32 * half

    def _acceptable(self) -> bool:
        accepted = self.accepted
        alone = any(accepted & one and not accepted & others for one, others in self.device.needs.items())
        return not accepted & ~self.offered and bool(accepted & F.VERSION_1) and not alone

    # Queues.

    def queue(self, index: int) -> VirtQueue | None:
        return self.queues[index] if index < len(self.queues) else None

    @property
    def configurable(self) -> bool:
        """Whether the driver may still set up queues."""
        return not self.status & STATUS.DRIVER_OK

    def settable(self, index: int) -> VirtQueue | None:
        """Queue `index` for the driver to give it a size and addresses, which comes before it is enabled (3.1.1)."""
        queue = self.queue(index)
        if queue is None or (self.configurable and not queue.enabled):
            return queue
        self._board.log("a queue is set up too late", device=type(self.device).__name__, queue=index)
        return None

    def kick(self, index: int) -> None:
        """Have queue `index` served on the event loop, once however often it is kicked until then.

        Any thread may call it without a lock: two at once may have it served twice, never not at all, since it leaves
        the set before it is served.
        """
        if index not in self._kicked:
            self._kicked.add(index)
            self.device.loop.call_soon(lambda: self._serve(index), owner=self.device)

    def _serve(self, index: int) -> None:
        self._kicked.discard(index)
        self.notify(index)

    def notify(self, index: int) -> None:
        """The driver has kicked queue `index`; on the event loop."""
        queue = self.queue(index)
        if queue is None or not self.running or not queue.ready:
            return
        queue.more = False
        try:
            self.device.notify(index, queue)
            queue.signal()
        except GuestError as error:
            self.fail(error)
            return
        if queue.more:
            self.kick(index)  # after the others' turn

    def _activate(self) -> None:
        try:
            for queue in self.queues:
                if queue.enabled:
                    queue.start(self.accepted)
            self._start_device()
        except GuestError as error:
            self.fail(error)

    def _start_device(self) -> None:
        """Let the device begin, and look at all queues once: a kick that came before it began was no kick."""
        self.device.queues = self.queues
        self.device.activate(self.accepted, self.queues)
        for queue in self.queues:
            if queue.ready:
                self.kick(queue.index)

    # Configuration space.

    def read_config(self, offset: int, size: int) -> int:
        """Little-endian value of `size` bytes; 0 beyond the end."""
        return int.from_bytes(bytes(self.device.config[offset : offset + size]), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        if offset + size <= len(self.device.config):
            self.device.write_config(offset, value.to_bytes(size, "little"))

    def _config_changed(self) -> None:
        self.generation = self.generation + 1 & 0xFF
        if self.running:
            self._changed()

    # State.

    def state(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "accepted": self.accepted,
            "generation": self.generation,
            "queues": [queue.state() for queue in self.queues],
            "device": self.device.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; raises ValueError when it is another device's."""
        queues = state.get("queues")
        if not isinstance(queues, list) or len(queues) != len(self.queues):
            raise ValueError(f"{type(self.device).__name__}: state has not its {len(self.queues)} queues")
        status, accepted, generation = int(state["status"]), int(state["accepted"]), int(state["generation"])
        if not 0 <= status < 1 << 8 or accepted & ~self.offered or not 0 <= generation < 1 << 8:
            raise ValueError(f"{type(self.device).__name__}: state has {status=:#x} {accepted=:#x} {generation=}")
        self.reset()
        self.status, self.accepted, self.generation = status, accepted, generation
        self.device.restore(state["device"])
        try:
            for queue, saved in zip(self.queues, queues, strict=True):
                queue.restore(saved, self.accepted)
        except QueueError as error:
            raise ValueError(str(error)) from None
        if self.running:
            self._start_device()


@contextmanager
def usable(device: VirtioDevice) -> Iterator[None]:
    """Whatever a state lacks, or has of another kind, is a ValueError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"{type(device).__name__}: state has no usable {error}") from None


def low(address: int, value: int) -> int:
    """`address` with the lower word replaced."""
    return address & ~0xFFFFFFFF | value


def high(address: int, value: int) -> int:
    """`address` with the upper word replaced."""
    return address & 0xFFFFFFFF | value << 32
