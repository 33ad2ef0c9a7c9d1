"""The file system device (VIRTIO 1.2, 5.11): the FUSE server of test_fuse.py behind its queues."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from shares import Client

from kvmpy import catalogue
from kvmpy.core.errors import ConfigError
from kvmpy.host import fuse_wire as wire
from kvmpy.host.fuse_wire import ROOT_ID, Op
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.spec import F

HIPRIO, REQUEST = 0, 1
MIB = 1 << 20


@pytest.fixture
def share(tmp_path: Path, transport: str) -> Iterator[Fs]:
    (tmp_path / "file").write_text("text")
    device = Fs(path=tmp_path, tag="share")
    device.attach(FakeBoard(32 * MIB, transport))
    yield device
    device.close()


@pytest.fixture
def driver(share: Fs) -> RingDriver:
    driver = RingDriver(share.board)
    driver.start(F.VERSION_1 | F.INDIRECT_DESC)
    return driver


@pytest.fixture
def client(driver: RingDriver) -> Client:
    """Sends the parts of a request as Linux does: each in a buffer of its own, and the answer's header, too."""

    def serve(parts: Sequence[bytes], room: int) -> bytes:
        queue = REQUEST if room else HIPRIO
        writable = [wire.OUT_HEADER.size, room - wire.OUT_HEADER.size] if room else []
        head = driver.submit(
            queue, [part for part in parts if part], [size for size in writable if size], indirect=True
        )
        driver.kick(queue)
        ((answered, count),) = driver.used(queue)
        assert answered == head
        return driver.data(queue, head)[:count]

    client = Client(serve)
    client.init()
    return client


def test_configuration_space(driver: RingDriver) -> None:
    assert bytes(driver.config(at, 1) for at in range(36)) == b"share".ljust(36, b"\0")
    assert driver.config(36, 4) == 1


def test_reads_and_writes_of_a_mebibyte(client: Client, share: Fs) -> None:
    data = os.urandom(MIB)
    _, fh = client.create(b"big")

    assert client.write(fh, data) == MIB
    assert client.read(fh, size=MIB) == data
    assert (share.path / "big").read_bytes() == data


def test_forget_goes_through_the_other_queue(client: Client) -> None:
    node = client.walk("file")

    client.forget(node)

    with pytest.raises(OSError, match="Stale"):
        client.getattr(node)


def test_several_requests_at_once(client: Client, driver: RingDriver) -> None:
    request = wire.IN_HEADER.pack(56, Op.GETATTR, 2, ROOT_ID, 0, 0, 0, 0, 0) + wire.GETATTR_IN.pack(0, 0, 0)
    size = wire.OUT_HEADER.size + wire.ATTR_OUT.size + wire.ATTR.size
    heads = [driver.submit(REQUEST, [request], [size]) for _ in range(10)]

    driver.kick(REQUEST)

    assert driver.used(REQUEST) == [(head, size) for head in heads]


def test_reset_forgets_the_guest(client: Client, driver: RingDriver) -> None:
    node = client.walk("file")
    before = len(os.listdir("/proc/self/fd"))
    client.open(node)

    driver.start(F.VERSION_1 | F.INDIRECT_DESC)

    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError, match="Input/output"):
        client.getattr(ROOT_ID)
    client.init()
    with pytest.raises(OSError, match="Stale"):
        client.getattr(node)


def test_what_is_no_request_gets_no_answer(driver: RingDriver) -> None:
    assert driver.request(REQUEST, [b"too short"], [64]) == b""
    assert not driver.needs_reset


def test_no_room_for_an_answer_gets_none(client: Client, driver: RingDriver) -> None:
    request = wire.IN_HEADER.pack(40, Op.STATFS, 2, ROOT_ID, 0, 0, 0, 0, 0)

    assert driver.request(REQUEST, [request], [15]) == b""
    assert not driver.needs_reset


@pytest.mark.parametrize("tag", ["", "t" * 37, "ä" * 19, "a\0b"])
def test_tags_that_cannot_be(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ConfigError, match="use 1 to 36 bytes"):
        Fs(path=tmp_path, tag=tag)


def test_from_the_catalogue(tmp_path: Path) -> None:
    device = catalogue.make(f"virtio-fs,path={tmp_path},tag=t,ro,cache=always")

    assert (type(device), device.path, device.tag, device._ro, device._cache) == (Fs, tmp_path, "t", True, "always")


def test_state_only_while_it_is_not_mounted(client: Client, share: Fs) -> None:
    with pytest.raises(ConfigError, match="unmount it"):
        share.state()
    client.call(Op.DESTROY, 0)

    share.restore(share.state())

    with pytest.raises(ValueError, match="wants"):
        share.restore(share.state() | {"tag": "other"})
