"""Network cards on a stream socket and on a tap: what goes out is what the driver has sent, in that order."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.host.frames import ETH_HEADER, MAX_FRAME, VLAN_TAG, VNET_HEADER
from kvmpy.host.netsocket import FrameStream
from kvmpy.host.tap import Tap
from kvmpy.virtio.net import NET_F, Net
from kvmpy.virtio.spec import F

from .kind import Kind, Violation
from .oracle import Done, Image

if TYPE_CHECKING:
    from .generate import Generator
    from .rig import Rig

RX, TX = 0, 1
MAC = "02:00:00:00:00:01"
HEADER = struct.Struct("<BBHHHHH")  # virtio_net_hdr
FRAME = bytes(range(64))
READ = 70_000  # bytes at a time, more than a frame
ROOM = 1 << 18  # bytes that the socket holds


class Plugged(Net):
    """A network card at one end of a socket pair; `far` is the other one."""

    def open(self) -> FrameStream | Tap:
        near, self.far = socket.socketpair()
        self.far.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        return FrameStream(near, "the harness")


class Datagrams(Tap):
    """A tap whose other end the harness holds: here, too, each frame is one message."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._fd = end.detach()
        self.name = "the harness"
        self.buffer = memoryview(bytearray(VNET_HEADER + MAX_FRAME + VLAN_TAG))

    def set_offloads(self, flags: int) -> None:
        self.offloads = flags


class Tapped(Plugged):
    """A network card on a tap."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.features |= NET_F.OFFLOADS

    def open(self) -> Tap:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far.setblocking(False)
        return Datagrams(near)


class StreamNet(Kind):
    """On a stream socket, as passt's."""

    NAME = "net"
    TWIN = True
    FEATURES = Kind.FEATURES | NET_F.MAC | NET_F.STATUS | NET_F.MRG_RXBUF | NET_F.MTU
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX, NET_F.MRG_RXBUF, NET_F.MTU)
    SIZES = (32, 32)
    KIND: type[Plugged] = Plugged

    def open(self, folder: Path) -> Plugged:
        self.device = self.KIND(backend="none", mac=MAC, mtu=1500)
        self.sent: list[bytes] = []  # frames of the chains that came back, since the wire was looked at
        self.wire = bytearray()
        self.total = bytearray()
        self.unsure = False
        self.garbled = False  # frames have no beginnings any more
        return self.device

    # Requests.

    def request(self, make: Generator) -> None:
        pick, chance = make.random, make.random.random()
        if chance < 0.45:
            size = pick.choice(
                [14, 60, 60, 64, 1514, 1514, 0, 13, pick.randrange(2000), pick.choice([65549, 65550, 4000])]
            )
            make.chain(TX, [self.header(make, size), pick.randbytes(16) * (size // 16) + bytes(size % 16)], [])
        elif chance < 0.8:
            for _ in range(pick.choice((1, 1, 4))):
                make.chain(RX, [], [pick.choice([1526, 1526, 2048, 12, 13, 26, 11, 0, 65562, pick.randrange(300)])])
        elif chance < 0.97:
            size = pick.choice([14, 60, 60, 1514, 1518, 1519, 13, 9000, 65549, pick.randrange(1, 2000)])
            make.host("frame", self.from_host(make, pick.randbytes(8).hex(), size))
        else:
            make.host("raw", pick.choice(["00000000", "ffffffff", "0001", "0001000e", "00"]))

    def header(self, make: Generator, size: int) -> bytes:
        pick = make.random
        if pick.random() < 0.6:
            return bytes(VNET_HEADER)
        fields = [make.word(16) if pick.random() < 0.3 else pick.choice([0, 14, 34, 54, 1448]) for _ in range(5)]
        return HEADER.pack(pick.choice([0, 1, 1, 3, 0xFF]), pick.choice([0, 1, 4, 3, 0x81, 0xFF]), *fields)

    def from_host(self, make: Generator, seed: str, size: int) -> list[Any]:
        return ["", seed, size]

    # The other end.

    def host(self, rig: Rig, name: str, *arguments: Any) -> None:
        with suppress(OSError):
            if name == "raw":
                self.garbled = True
                self.device.far.send(bytes.fromhex(arguments[0]))
                return
            head, seed, size = arguments[0]
            data = (bytes.fromhex(seed) * (size // 8 + 1))[:size]
            self.device.far.send(self.packet(bytes.fromhex(head), data))

    def packet(self, head: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    def settle(self) -> None:
        with suppress(OSError):
            while data := self.device.far.recv(READ):
                self.arrived(data)

    def arrived(self, data: bytes) -> None:
        self.wire += data

    def rested(self) -> None:
        self.settle()
        expected = b"".join(len(frame).to_bytes(4, "big") + frame for frame in self.sent)
        rest = getattr(self.device.backend, "rest", b"")
        if self.device.link and not self.unsure and expected != bytes(self.wire) + bytes(rest):
            raise Violation("wire", f"{len(self.wire)} bytes went out, expected {len(expected)} others")
        self.forget()

    def forget(self) -> None:
        self.total += self.wire
        rest = bytes(getattr(self.device.backend, "rest", b""))
        self.sent, self.wire, self.unsure = [], bytearray(), bool(rest)

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        for one in chains:
            if one.queue == TX:
                if one.written:
                    raise Violation("used.len", f"{one.written} bytes written for a frame that was sent")
                frame = before.gather(one.readable)[VNET_HEADER:]
                if ETH_HEADER <= len(frame) <= MAX_FRAME:
                    self.sent.append(frame)

    def tangled(self) -> None:
        self.unsure = True

    def observe(self) -> Any:
        counts = self.device.tx_dropped, self.device.rx_dropped, self.device.link
        return bytes(self.total), counts, [*self.device.board.steps.watched.values()]

    def works(self, rig: Rig) -> None:
        assert rig.driver is not None
        rig.request(TX, [bytes(VNET_HEADER) + FRAME], [])
        if self.device.link and not self.total.endswith(FRAME):
            raise Violation("recovery", "a normal frame does not go out")
        heads = [rig.driver.submit(RX, writable=[3000]) for _ in range(30)]
        while heads:  # what still waits from before comes first, and the buffers go back
            rig.oracle.stale = True
            rig.op_kick(RX)
            heads = [head for head, _ in rig.driver.used(RX)]
            for head in heads:
                rig.driver.publish(RX, head)
        rig.op_host("frame", ["00" * VNET_HEADER, "0203040506070809", 64])
        if self.device.link and not self.garbled and not rig.driver.used(RX):
            raise Violation("recovery", "a normal frame does not come in")

    def close(self) -> None:
        self.device.far.close()


class TapNet(StreamNet):
    """On a tap, with offloads."""

    NAME = "net-tap"
    FEATURES = StreamNet.FEATURES | NET_F.OFFLOADS
    OPTIONAL = (*StreamNet.OPTIONAL, NET_F.GUEST_TSO4, NET_F.HOST_TSO4)
    KIND = Tapped

    def from_host(self, make: Generator, seed: str, size: int) -> list[Any]:
        return [self.header(make, size).hex(), seed, size]

    def packet(self, head: bytes, data: bytes) -> bytes:
        return head + data

    def arrived(self, data: bytes) -> None:
        self.messages.append(data[VNET_HEADER:])
        self.wire += data

    def open(self, folder: Path) -> Plugged:
        self.messages: list[bytes] = []
        return super().open(folder)

    def rested(self) -> None:
        """Some may have been dropped; the others are there, in their order."""
        self.settle()
        frames = iter(self.sent)
        if not self.unsure and not all(message in frames for message in self.messages):
            raise Violation("wire", f"a frame went out that nobody had sent: {[m[:32] for m in self.messages]}")
        self.messages = []
        self.forget()
