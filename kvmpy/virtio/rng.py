"""Entropy device: random bytes from the host (VIRTIO 1.2, 5.4).

Linux: HW_RANDOM_VIRTIO. A hostile guest may ask without end, or for more than it has RAM, by naming the same page many
times: one answer is short, which the specification allows.
"""

from __future__ import annotations

import os

from .device import VirtioDevice
from .queue import VirtQueue
from .spec import Type

MAX_REQUEST = 64 * 1024  # bytes for one buffer


class Rng(VirtioDevice):
    """One queue; every buffer in it is filled."""

    type_id = Type.ENTROPY
    queue_sizes = (64,)
    modules = ("virtio-rng",)

    def notify(self, index: int, queue: VirtQueue) -> None:
        for chain in queue.available():
            chain.write(os.urandom(min(chain.capacity, MAX_REQUEST)))
            queue.push(chain)
