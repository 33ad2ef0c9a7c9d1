"""A socket device with a driver that is up: the guest's half of its connections, packet by packet."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.spec import F
from kvmpy.virtio.vsock import RX, TX, VSOCK_F, Vsock
from kvmpy.virtio.vsock_stream import HEADER, HOST_CID, REQUEST, RESPONSE, STREAM

CID = 3
PORT, GUEST_PORT = 1024, 5000  # of the host, of the guest
ROOM = 1 << 18  # buf_alloc, as Linux has it
BUFFERS = 32  # that the driver leaves in the receive queue
BUFFER_SIZE = 4096  # bytes of each
ROUNDS = 400  # of the event loop in `settle`: a device that needs more spins


class Packet(NamedTuple):
    """One packet, as the guest sends or gets it."""

    src_cid: int = CID
    dst_cid: int = HOST_CID
    src_port: int = GUEST_PORT
    dst_port: int = PORT
    size: int = -1  # by default that of `data`
    type: int = STREAM
    op: int = REQUEST
    flags: int = 0
    buf_alloc: int = ROOM
    fwd_cnt: int = 0
    data: bytes = b""

    def __bytes__(self) -> bytes:
        size = len(self.data) if self.size < 0 else self.size
        return HEADER.pack(*self[:4], size, *self[5:10]) + self.data


class Guest:
    """The driver of `device`. `got` is what has come from the host since it was looked at last."""

    def __init__(self, transport: str, path: Path | None = None, buffers: int = BUFFERS) -> None:
        self.board = FakeBoard(16 << 20, transport)
        self.device = Vsock(CID, path)
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        self.accepted: list[socket.socket] = []
        self.rounds = 0  # of the event loop in the last `settle`
        self._opened: list[socket.socket] = []
        self.start(buffers)

    def start(self, buffers: int = BUFFERS) -> None:
        self.driver.start(F.VERSION_1 | VSOCK_F.STREAM)
        self.give(buffers)

    def give(self, count: int, size: int = BUFFER_SIZE) -> None:
        """Leave buffers for packets, and see what the device does with them."""
        for _ in range(count):
            self.driver.submit(RX, writable=[size])
        self.driver.kick(RX)
        self.settle()

    def send(self, *packets: Packet, **fields: Any) -> None:
        """Send packets, one with these fields by default, and let all happen that follows."""
        for packet in packets or (Packet(**fields),):
            self.driver.submit(TX, readable=[bytes(packet)])
        self.driver.kick(TX)
        self.settle()

    def settle(self) -> None:
        """Let the event loop run until nothing is left to do."""
        steps = self.board.steps
        for self.rounds in range(ROUNDS):
            poll = select.poll()
            for fd, events in steps.watched.items():
                poll.register(fd, events)
            ready = poll.poll(0)
            if not ready and not steps._queue:
                return
            for fd, _ in ready:
                if fd in steps.watched:
                    steps.ready(fd)
            steps.turn()
        raise AssertionError("the device does not come to rest")

    def got(self) -> list[Packet]:
        """The packets that the host has sent; their buffers are given back."""
        heads = self.driver.used(RX)
        packets = [self._packet(*used) for used in heads]
        for head, _ in heads:
            self.driver.publish(RX, head)
        self.driver.kick(RX)
        self.settle()
        return packets

    def taken(self) -> list[Packet]:
        """The same, without giving back."""
        return [self._packet(*used) for used in self.driver.used(RX)]

    def ops(self) -> list[int]:
        return [packet.op for packet in self.got()]

    # Connections.

    def listen(self, port: int = PORT) -> None:
        """A program of this process takes what the guest connects to `port`."""
        self.device.listen(port, self._accept)

    def call(self, port: int = PORT, **fields: Any) -> socket.socket:
        """The guest connects to a program that listens; the host's end."""
        self.send(op=REQUEST, dst_port=port, **fields)
        assert [packet.op for packet in self.got()] == [RESPONSE]
        return self.accepted[-1]

    def connect(self, port: int = GUEST_PORT, **options: Any) -> Future[socket.socket]:
        """A program of this process connects to the guest, on a thread of its own; its request is there when this
        returns, if there is any."""
        future: Future[socket.socket] = Future()

        def run() -> None:
            try:
                future.set_result(self.keep(self.device.connect(port, **options)))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while not future.done() and not self.board.steps._queue:
            time.sleep(0.001)
        self.settle()
        return future

    def connected(self, **fields: Any) -> tuple[socket.socket, Packet]:
        """A connection of the host's that the guest has accepted: the host's end, and what it asked with."""
        future = self.connect()
        (request,) = self.got()
        self.answer(request, op=RESPONSE, **fields)
        return future.result(5), request

    def answer(self, packet: Packet, **fields: Any) -> None:
        """Send something back on the connection that `packet` is of."""
        self.send(Packet(src_port=packet.dst_port, dst_port=packet.src_port, **fields))

    def keep(self, stream: socket.socket) -> socket.socket:
        """Close `stream` at the end of the test."""
        stream.settimeout(5)
        self._opened.append(stream)
        return stream

    def close(self) -> None:
        with self.device.lock:
            self.device.reset()
            self.device.close()
        for stream in self._opened:
            stream.close()
        assert self.board.steps.watched == {}

    def _packet(self, head: int, size: int) -> Packet:
        raw = self.driver.data(RX, head)[:size]
        packet = Packet(*HEADER.unpack(raw[: HEADER.size]), raw[HEADER.size :])
        assert packet.size == len(packet.data)
        return packet

    def _accept(self, stream: socket.socket) -> None:
        self.accepted.append(self.keep(stream))


@pytest.fixture
def guest(transport: str) -> Iterator[Guest]:
    """A guest whose driver is up, on each transport; a program of this process listens at PORT."""
    guest = Guest(transport)
    guest.listen()
    yield guest
    guest.close()


@pytest.fixture
def reachable(transport: str, tmp_path: Path) -> Iterator[Guest]:
    """A guest with a UNIX socket."""
    guest = Guest(transport, tmp_path / "v.sock")
    yield guest
    guest.close()
