"""A disk on a FakeBoard with a driver that is up, for all tests of the block device."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.blk import BLK_F, HEADER, SEGMENT, Blk, Config, S, T
from kvmpy.virtio.spec import F

SECTORS = 256
SIZE = SECTORS * 512
CONTENT = b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS))  # sector n holds n, over and over
FEATURES = F.VERSION_1 | F.INDIRECT_DESC | BLK_F.FLUSH | BLK_F.DISCARD | BLK_F.WRITE_ZEROES
READ_ONLY = F.VERSION_1 | BLK_F.FLUSH


class Disk:
    """A Blk on a FakeBoard, with a driver that is up."""

    def __init__(self, path: Path, features: int = FEATURES, transport: str = "mmio", **options: Any) -> None:
        self.board = FakeBoard(16 << 20, transport)
        self.device = Blk(path=path, **options)
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        self.driver.start(features)

    def submit(
        self, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = (), queue: int = 0
    ) -> int:
        return self.driver.submit(queue, [HEADER.pack(kind, 0, sector), *data], [*room, 1])

    def request(
        self, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = ()
    ) -> tuple[int, bytes, int]:
        """Status, what is in the room for data, and the number of bytes that the device says it has written."""
        head = self.submit(kind, sector, data, room)
        return self.finish(head)

    def finish(self, head: int) -> tuple[int, bytes, int]:
        self.driver.kick(0)
        ((answered, count),) = self.driver.used(0)
        assert answered == head
        answer = self.driver.data(0, head)
        return answer[-1], answer[:-1], count

    def read(self, sector: int, count: int) -> bytes:
        status, data, written = self.request(T.IN, sector, room=[512 * count])
        assert (status, written) == (S.OK, 512 * count + 1)
        return data

    def write(self, sector: int, data: bytes) -> int:
        return self.request(T.OUT, sector, [data])[0]

    def segments(self, kind: int, *segments: tuple[int, int, int]) -> int:
        return self.request(kind, 0, [b"".join(SEGMENT.pack(*segment) for segment in segments)])[0]

    @property
    def config(self) -> Config:
        return Config(bytearray(self.driver.config(offset, 1) for offset in range(Config.SIZE)))

    @property
    def works(self) -> bool:
        return not self.driver.needs_reset and self.read(7, 1) == CONTENT[7 * 512 : 8 * 512]


Connect = Callable[..., Disk]


def failing(number: int) -> Callable[..., None]:
    """A system call that fails with errno `number`."""

    def call(*arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A raw image with CONTENT."""
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["twin", "python"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who serves ordinary requests of disks; tests that put faults into `os` want "python"."""
    monkeypatch.setattr("kvmpy.virtio.blk.PURE", request.param == "python")
    return str(request.param)


@pytest.fixture
def connect(path: Path, transport: str, engine: str, request: pytest.FixtureRequest) -> Connect:
    """Makes a Disk on the image at `path`."""

    def connect(features: int = FEATURES, **options: Any) -> Disk:
        disk = Disk(**{"path": path, "features": features, "transport": transport} | options)
        request.addfinalizer(disk.device.close)
        return disk

    return connect


@pytest.fixture
def disk(connect: Connect) -> Disk:
    return connect()


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of fdatasync, which still happen."""
    calls: list[int] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return calls
