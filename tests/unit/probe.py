"""A virtio device for tests of the transports: it remembers what it was told."""

from __future__ import annotations

from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.queue import VirtQueue
from kvmpy.virtio.spec import STATUS, Type

READY = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK | STATUS.DRIVER_OK


class Probe(VirtioDevice):
    """Remembers what the transport told it."""

    type_id = Type.BLOCK
    queue_sizes = (256, 4)
    features = 1 << 9 | 1 << 40
    config = bytes(range(1, 13))

    def __init__(self) -> None:
        self.told: list[object] = []

    def activate(self, features: int, queues: object) -> None:
        self.told.append(features)

    def notify(self, index: int, queue: VirtQueue) -> None:
        self.told.append(index)

    def reset(self) -> None:
        self.told.append("reset")


class Turnstile:
    """A lock that counts how often it is taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *error: object) -> None: ...
