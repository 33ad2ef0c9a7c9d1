"""A disk on which some requests fail, to see what a guest makes of it.

    kvmpy boot --device ./examples/flaky_disk.py:FlakyDisk,path=disk.img,rate=0.1

The guest gets an I/O error for one request in ten, and the image is left alone by these. With `seed`, a guest that
makes the same requests sees the same ones fail.
"""

from __future__ import annotations

import random
from pathlib import Path

import kvmpy
from kvmpy.host.disk import Image
from kvmpy.virtio.blk import Blk, S
from kvmpy.virtio.queue import Chain


class FlakyDisk(Blk):
    """A virtio-blk device of which a share of the requests ends with IOERR.

    path   the image: a file or a block device
    ro     the guest can only read it
    rate   the share of requests that fail, 0 to 1
    seed   of the random numbers that choose them; another one in each run by default
    """

    def __init__(self, *, path: Path, ro: bool = False, rate: float = 0.1, seed: int | None = None) -> None:
        if not 0 <= rate <= 1:
            raise kvmpy.ConfigError(f"invalid rate {rate}", "use a number from 0 to 1")
        super().__init__(path=path, ro=ro)
        self._rate = rate
        self._random = random.Random(seed)

    def answer(self, image: Image, chain: Chain) -> None:
        if self._random.random() >= self._rate:
            super().answer(image, chain)
        elif chain.capacity:
            chain.write(bytes([S.IOERR]), at=chain.capacity - 1)  # VIRTIO 1.2, 5.2.6: the status is the last byte
