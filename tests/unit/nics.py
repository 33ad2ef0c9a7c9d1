"""A network device between a driver and a wire that the test holds, for all tests of the network device."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvmpy.host.frames import Frame
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.net import NET_F, RX, TX, Net
from kvmpy.virtio.spec import F

MAC = "02:00:00:00:00:01"
PLAIN = bytes(12)  # a header that says nothing
FRAME = bytes(range(60))
BASIC = F.VERSION_1 | F.EVENT_IDX | F.INDIRECT_DESC | NET_F.MAC | NET_F.STATUS
MERGE = BASIC | NET_F.MRG_RXBUF
OFFLOADS = MERGE | NET_F.OFFLOADS


class Wire:
    """The far end of a `socket` network."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._peer: socket.socket | None = None
        self._got = b""

    @property
    def peer(self) -> socket.socket:
        if self._peer is None:
            self._peer, _ = self._listener.accept()
            self._peer.setblocking(False)
        return self._peer

    def send(self, *frames: bytes) -> None:
        self.peer.setblocking(True)
        self.peer.sendall(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))
        self.peer.setblocking(False)

    def frames(self) -> list[bytes]:
        """All whole frames that have come."""
        found = []
        while data := self._data():
            self._got += data
        while len(self._got) >= 4 and len(self._got) >= 4 + (size := int.from_bytes(self._got[:4], "big")):
            found.append(self._got[4 : 4 + size])
            self._got = self._got[4 + size :]
        return found

    def _data(self) -> bytes:
        try:
            return self.peer.recv(1 << 20)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.peer.close()
        self._listener.close()


class FakeTap:
    """A backend whose frames have headers, with `incoming` to be read; it keeps what is `sent`."""

    vnet_header = True

    def __init__(self) -> None:
        self.incoming: list[bytes] = []
        self.sent: list[bytes] = []
        self._end, self._other = socket.socketpair()

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, frame: Sequence[Frame]) -> bool:
        self.sent.append(b"".join(frame))
        return True

    def flush(self) -> bool:
        return True

    def receive(self) -> Frame | None:
        return self.incoming.pop(0) if self.incoming else None

    def close(self) -> None:
        self._end.close()
        self._other.close()


class TapNet(Net):
    """A network device on a FakeTap."""

    def open(self) -> FakeTap:
        self.tap = FakeTap()
        return self.tap


class Rig:
    """A device, its driver, and the wire between the device and the test."""

    def __init__(self, net: Net, wire: Wire | None, transport: str = "mmio") -> None:
        self.board = FakeBoard(8 << 20, transport)
        self.net = net
        net.attach(self.board)
        self.wire = wire  # type: ignore[assignment]
        self.driver = RingDriver(self.board)
        self.steps = self.board.steps

    wire: Wire

    @property
    def fd(self) -> int:
        """The descriptor that the loop watches."""
        (fd,) = self.steps.watched
        return fd

    @property
    def waits_for(self) -> int:
        return self.steps.watched[self.fd]

    def turn(self) -> None:
        """One turn of the loop, in which the backend is ready."""
        for fd in list(self.steps.watched):
            self.steps.ready(fd)
        self.steps.turn()

    def start(self, features: int = MERGE) -> None:
        """A driver with `features`, and all that follows from its start."""
        self.driver.start(features)
        self.turn()
        self.driver.interrupts()

    def send(self, *readable: bytes) -> int:
        """The guest sends; returns the head."""
        head = self.driver.submit(TX, readable)
        self.driver.kick(TX)
        return head

    def offer(self, *sizes: int) -> list[int]:
        """The guest offers a buffer of each size; returns their heads."""
        heads = [self.driver.submit(RX, writable=[size]) for size in sizes]
        self.driver.kick(RX)
        return heads

    def received(self) -> list[bytes]:
        """What the guest finds in the buffers that came back, headers included."""
        return [self.driver.data(RX, head)[:count] for head, count in self.driver.used(RX)]


def header(buffers: int = 1) -> bytes:
    return bytes(10) + struct.pack("<H", buffers)


@pytest.fixture
def plugged(tmp_path: Path, transport: str) -> Iterator[Callable[..., Rig]]:
    """Makes a Rig with a `socket` network, of which the driver is not yet up."""
    rigs: list[Rig] = []

    def plugged(**options: object) -> Rig:
        path = tmp_path / "wire"
        wire = Wire(path)
        net = Net("socket", path=path, **{"mac": MAC, **options})  # type: ignore[arg-type]
        rigs.append(Rig(net, wire, transport))
        return rigs[-1]

    yield plugged
    for rig in rigs:
        rig.net.close()
        rig.wire.close()
        assert rig.steps.watched == {}


@pytest.fixture
def rig(plugged: Callable[..., Rig]) -> Rig:
    rig = plugged()
    rig.start()
    return rig


@pytest.fixture
def tap(transport: str) -> Iterator[Rig]:
    rig = Rig(TapNet("tap", mac=MAC), None, transport)
    rig.start(OFFLOADS)
    yield rig
    rig.net.close()
