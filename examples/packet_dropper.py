"""A network card on a bad line, which loses a share of the frames in both directions.

    kvmpy boot --device ./examples/packet_dropper.py:PacketDropper,share=0.2

`arping` in the guest shows the loss, for requests and for answers, and TCP how it copes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import kvmpy
from kvmpy.host.frames import Frame, NetBackend
from kvmpy.virtio.net import Net


class LossyLine:
    """A NetBackend in front of another one: what it loses, neither end gets to know."""

    def __init__(self, line: NetBackend, share: float, seed: int | None) -> None:
        self.vnet_header = line.vnet_header
        self.fileno, self.flush, self.close = line.fileno, line.flush, line.close
        self._line = line
        self._share = share
        self._random = random.Random(seed)

    def send(self, frame: Sequence[Frame]) -> bool:
        return self._loses() or self._line.send(frame)

    def receive(self) -> Frame | None:
        while (frame := self._line.receive()) is not None and self._loses():
            pass
        return frame

    def _loses(self) -> bool:
        return self._random.random() < self._share


class PacketDropper(Net):
    """A virtio-net device that loses frames.

    share     the share of frames that are lost, 0 to less than 1
    backend   what it is plugged into: user or socket
    path      of the UNIX socket to connect to
    seed      of the random numbers that choose the frames; another one in each run by default
    """

    def __init__(
        self, share: float = 0.1, backend: str = "user", path: Path | None = None, seed: int | None = None
    ) -> None:
        if not 0 <= share < 1:
            raise kvmpy.ConfigError(f"invalid share {share}", "use a number from 0 to less than 1")
        super().__init__(backend, path=path)
        self._share = share
        self._seed = seed

    def open(self) -> NetBackend | None:
        line = super().open()
        return None if line is None else LossyLine(line, self._share, self._seed)
