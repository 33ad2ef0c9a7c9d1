"""Devices of bytes: entropy, console with ports, sockets."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.virtio.console import CONSOLE_F, VirtioConsole
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.spec import F
from kvmpy.virtio.vsock import VSOCK_F, Vsock

from .kind import Kind, Violation
from .oracle import Done, Image

if TYPE_CHECKING:
    from .generate import Generator
    from .rig import Rig


class Entropy(Kind):
    """The entropy device."""

    NAME = "rng"
    SIZES = (16,)

    def open(self, folder: Path) -> Rng:
        return Rng()

    def request(self, make: Generator) -> None:
        pick = make.random
        readable = [b"x" * 16] if pick.random() < 0.05 else []
        make.chain(0, readable, [pick.choice([1, 8, 64, 512, 4096, pick.randrange(5000), 0x9000])])

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        for one in chains:
            if one.written != min(one.capacity, 1 << 16):
                raise Violation("used.len", f"{one.written} random bytes for {one.capacity}")

    def works(self, rig: Rig) -> None:
        if len(rig.request(0, [], [32])) != 32:
            raise Violation("recovery", "no random bytes come")


CONTROL = struct.Struct("<IHH")  # id, event, value
RECEIVE, TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT = range(4)
PORTS = 3
INPUT = (RECEIVE, 4, 6)
OUTPUT = (TRANSMIT, 5, 7)


class Console(Kind):
    """A console with two named ports, whose owners are slow at times."""

    NAME = "console"
    FEATURES = Kind.FEATURES | CONSOLE_F.SIZE | CONSOLE_F.MULTIPORT
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX, CONSOLE_F.SIZE, CONSOLE_F.MULTIPORT)
    SIZES = (8,) * (2 * PORTS + 2)
    DEFECT = 0.05

    def open(self, folder: Path) -> VirtioConsole:
        self.device = device = VirtioConsole(ports=PORTS)
        self.got = [bytearray() for _ in range(PORTS)]
        self.sent = [bytearray() for _ in range(PORTS)]
        self.full = self.unsure = False
        for number in range(1, PORTS):
            device.add_port(f"port{number}")
        for number, port in enumerate(device.ports):
            port.on_data = lambda data, number=number: self._take(number, data)
        return device

    def _take(self, number: int, data: bytes) -> bool:
        self.got[number] += data
        return not self.full

    def begin(self, make: Generator) -> None:
        for number in range(PORTS if make.random.random() < 0.8 else 0):
            for event in (0, 3, 6):  # DEVICE_READY, PORT_READY, PORT_OPEN
                make.chain(CONTROL_TRANSMIT, [CONTROL.pack(number, event, 1)], [])

    def request(self, make: Generator) -> None:
        pick, chance = make.random, make.random.random()
        if chance < 0.4:
            size = pick.choice([1, 1, 16, 100, 4096, 20000, 0, pick.randrange(300)])
            make.chain(pick.choice(OUTPUT), [pick.randbytes(16) * (size // 16) + b"y" * (size % 16)], [])
        elif chance < 0.65:
            make.chain(pick.choice((*INPUT, CONTROL_RECEIVE)), [], [pick.choice([1, 4, 8, 64, 64, 4096, 0])])
        elif chance < 0.8:
            message = CONTROL.pack(
                pick.choice([0, 1, 2, 3, make.word(32)]), pick.randrange(10), pick.choice([0, 1, 1, 0xFFFF])
            )
            make.chain(
                CONTROL_TRANSMIT, [message[: pick.choice([8, 8, 8, 7, 0, 1])], b"name"[: pick.choice([0, 0, 4])]], []
            )
        elif chance < 0.9:
            make.host("input", pick.randrange(PORTS), pick.choice([1, 16, 5000]))
        else:
            make.host(pick.choice(["full", "drained", "resize"]))

    def host(self, rig: Rig, name: str, *arguments: Any) -> None:
        with self.device.lock:
            if name == "input":
                number, size = arguments
                self.device.ports[number].write(b"z" * size)
            elif name == "resize":
                self.device.resize(80, 25)
            else:
                self.full = name == "full"
                self.unsure = True
                if not self.full:
                    for port in self.device.ports:
                        port.drained()

    def started(self, features: int) -> None:
        self.got = [bytearray() for _ in range(PORTS)]
        self.sent = [bytearray() for _ in range(PORTS)]
        self.unsure = self.full

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        for one in chains:
            multiport = self.device._multiport
            if one.queue in OUTPUT and (one.queue == TRANSMIT or multiport):
                self.sent[OUTPUT.index(one.queue)] += before.gather(one.readable)

    def rested(self) -> None:
        if not self.unsure and not self.full:
            for number, (got, sent) in enumerate(zip(self.got, self.sent, strict=True)):
                if got != sent:
                    raise Violation("stream", f"port {number}: {len(got)} bytes came out of {len(sent)}, or others")
        if max(map(len, self.got)) > 1 << 20:
            self.started(0)

    def tangled(self) -> None:
        self.unsure = True

    def works(self, rig: Rig) -> None:
        with self.device.lock:
            self.full = False
            for port in self.device.ports:
                port.drained()
        rig._settle()
        self.started(0)
        rig.request(TRANSMIT, [b"hello"], [])
        if self.got[0] != b"hello":
            raise Violation("recovery", "the console's output does not come")


PACKET = struct.Struct("<QQIIIHHIII")  # src_cid dst_cid src_port dst_port len type op flags buf_alloc fwd_cnt
RX, TX, EVENT = range(3)
CID, HOST = 3, 2
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
LISTENING = 1024
RESETS = 128  # answers that the device keeps
CALLS = 1 << 30  # the ports of connections that the host makes


class Sockets(Kind):
    """The socket device, with a program of the host that takes connections and makes some."""

    NAME = "vsock"
    FEATURES = Kind.FEATURES | VSOCK_F.STREAM
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX, VSOCK_F.STREAM)
    SIZES = (16, 16, 8)
    DEFECT = 0.05

    def open(self, folder: Path) -> Vsock:
        self.device = Vsock(CID)
        self.ends: list[socket.socket] = []
        self._heard = False
        return self.device

    def _keep(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.ends.append(end)

    def begin(self, make: Generator) -> None:
        for _ in range(make.random.choice((0, 4, 6))):
            make.chain(RX, [], [4096], kick=0.1)

    def request(self, make: Generator) -> None:
        pick, chance = make.random, make.random.random()
        if chance < 0.6:
            self._packet(make)
        elif chance < 0.8:
            make.chain(RX, [], [pick.choice([4096, 4096, 1500, 44, 45, 43, 0])])
        elif chance < 0.805:  # none has a connection: each is answered, and nobody takes the answers
            for number in range(RESETS + 20):
                packet = PACKET.pack(CID, HOST, 9000, 9000 + number, 0, 1, RW, 0, 0, 0)
                make.chain(TX, [packet], [], kick=0.3)
        elif chance < 0.82:
            make.chain(EVENT, [], [pick.choice([4, 8, 3])])
        elif chance < 0.86:
            make.host("call", pick.choice([5000, 5001, 1, 0xFFFFFFFE]))
        else:
            name = pick.choice(["send", "send", "receive", "receive", "close", "shutdown"])
            make.host(name, pick.randrange(4), pick.choice([1, 100, 5000, 200000]))

    def _packet(self, make: Generator) -> None:
        pick = make.random

        def odd(value: int, bits: int) -> int:
            return make.word(bits) if pick.random() < 0.02 else value

        data = pick.randbytes(8) * pick.choice([0, 0, 1, 8, 100, 500])
        op = pick.choice(
            [REQUEST] * 3 + [RW] * 6 + [RESPONSE] * 2 + [CREDIT_UPDATE, CREDIT_REQUEST, SHUTDOWN, RST, 0, 8]
        )
        data = data if op == RW or pick.random() < 0.05 else b""
        host_port = pick.choice([LISTENING] * 4 + [CALLS, CALLS + 1, 1025])
        header = PACKET.pack(
            *(odd(CID, 64), odd(HOST, 64), odd(pick.choice([5000, 5001, 5002]), 32), odd(host_port, 32)),
            *(
                odd(len(data), 32),
                odd(1, 16),
                odd(op, 16),
                pick.choice([0, 1, 2, 3, 3, 0xFFFFFFFF]) if op == SHUTDOWN else 0,
            ),
            *(pick.choice([1 << 18, 1 << 18, 1 << 16, 0, 100, 0xFFFFFFFF]), odd(0, 32)),
        )
        make.chain(TX, [header, data], [])

    def host(self, rig: Rig, name: str, *arguments: Any) -> None:
        if not self._heard:
            self._heard = True
            self.device.listen(LISTENING, self._keep)
        if name == "call":
            ours, theirs = socket.socketpair()
            self._keep(ours)
            with self.device.lock:
                self.device._call(arguments[0], theirs, lambda stream: None)
            return
        number, size = arguments
        if not self.ends:
            return
        end = self.ends[number % len(self.ends)]
        with suppress(OSError):
            if name == "send":
                end.send(b"h" * size)
            elif name == "receive":
                end.recv(size)
            elif name == "shutdown":
                end.shutdown(number % 3)
            else:
                end.close()
                self.ends.remove(end)

    def started(self, features: int) -> None:
        if not self._heard:
            self._heard = True
            self.device.listen(LISTENING, self._keep)

    def rested(self) -> None:
        if len(self.device._streams) > self.device.limit or len(self.device._resets) > RESETS + 1:
            raise Violation("bound", f"{len(self.device._streams)} streams, {len(self.device._resets)} resets")

    def works(self, rig: Rig) -> None:
        assert rig.driver is not None
        for _ in range(4):
            rig.driver.submit(RX, writable=[4096])
        rig.request(TX, [PACKET.pack(CID, HOST, 6000, LISTENING, 0, 1, REQUEST, 0, 1 << 16, 0)], [])
        answers = [rig.driver.data(RX, head)[:count] for head, count in rig.driver.used(RX)]
        if RESPONSE not in [PACKET.unpack_from(answer)[6] for answer in answers]:
            raise Violation("recovery", "a connection is not accepted")

    def close(self) -> None:
        for end in self.ends:
            end.close()
