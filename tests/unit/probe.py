"""Virtio devices for tests of transports and rings: one remembers what it was told, one answers what it reads."""

from __future__ import annotations

from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.queue import VirtQueue
from kvmpy.virtio.spec import STATUS, F, Type

ALL = F.VERSION_1 | F.EVENT_IDX | F.INDIRECT_DESC
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


class Echo(VirtioDevice):
    """Writes back what it reads; while `busy` it leaves everything where it is."""

    type_id = Type.ENTROPY
    queue_sizes = (8, 8)
    busy = False
    served = 0

    def notify(self, index: int, queue: VirtQueue) -> None:
        for chain in queue.available() if not self.busy else ():
            self.served += 1
            chain.write(chain.read())
            queue.push(chain)
