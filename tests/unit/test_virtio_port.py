"""A console device's port that ends in a UNIX socket (virtio/port.py)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import catalogue
from kvmpy.core.errors import HostError
from kvmpy.core.events import READ, WRITE
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.console import CONSOLE_F, DEVICE_ADD, DEVICE_READY, INPUT_LIMIT, PORT_NAME, PORT_OPEN, PORT_READY
from kvmpy.virtio.port import OUTPUT_LIMIT, PortSocket
from kvmpy.virtio.spec import F

CONTROL_RX, CONTROL_TX, RX, TX = 2, 3, 4, 5
HELLO = struct.pack("<IHH", 0xFFFFFFFF, DEVICE_READY, 1)


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(4 << 20, transport)


@pytest.fixture
def device(board: FakeBoard, tmp_path: Path) -> Iterator[PortSocket]:
    device = PortSocket(port="org.example.agent", path=tmp_path / "socket")
    device.attach(board)
    yield device
    device.close()


@pytest.fixture
def driver(board: FakeBoard, device: PortSocket) -> RingDriver:
    """It knows the port, and has it open."""
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.MULTIPORT)
    for event in (PORT_READY, PORT_OPEN):
        driver.request(CONTROL_TX, [struct.pack("<IHH", 1, event, 1)])
    return driver


@pytest.fixture
def client(board: FakeBoard, device: PortSocket) -> Iterator[socket.socket]:
    """Somebody who has connected."""
    with connect(board, device) as client:
        yield client


def connect(board: FakeBoard, device: PortSocket) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(str(device.path))
    (listener,) = board.steps.watched
    board.steps.ready(listener)
    return client


def ready(board: FakeBoard, events: int) -> None:
    """The client's connection is ready to be read or written."""
    board.steps.ready([fd for fd, wanted in board.steps.watched.items() if wanted == events][-1])
    board.steps.turn()


def test_the_guest_sees_a_port_with_a_name_and_no_console(board: FakeBoard, device: PortSocket) -> None:
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.MULTIPORT)
    for _ in range(8):
        driver.submit(CONTROL_RX, writable=[64])

    driver.request(CONTROL_TX, [HELLO])
    driver.request(CONTROL_TX, [struct.pack("<IHH", 1, PORT_READY, 1)])
    board.steps.turn()

    messages = [driver.data(CONTROL_RX, head)[:size] for head, size in driver.used(CONTROL_RX)]
    assert messages == [
        struct.pack("<IHH", 1, DEVICE_ADD, 1),
        struct.pack("<IHH", 1, PORT_NAME, 1) + b"org.example.agent",
        struct.pack("<IHH", 1, PORT_OPEN, 1),
    ]


def test_both_directions(board: FakeBoard, driver: RingDriver, client: socket.socket) -> None:
    driver.submit(RX, writable=[64])

    driver.request(TX, [b"from the guest"])
    client.sendall(b"from the host")
    ready(board, READ)

    ((head, size),) = driver.used(RX)
    assert client.recv(64) == b"from the guest"
    assert driver.data(RX, head)[:size] == b"from the host"


def test_a_port_that_nobody_in_the_guest_has_open(board: FakeBoard, driver: RingDriver, client: socket.socket) -> None:
    """Linux would throw away what comes then."""
    driver.submit(RX, writable=[64])
    driver.request(CONTROL_TX, [struct.pack("<IHH", 1, PORT_OPEN, 0)])

    client.sendall(b"wait")
    ready(board, READ)
    before = driver.used(RX)
    driver.request(CONTROL_TX, [struct.pack("<IHH", 1, PORT_OPEN, 1)])
    board.steps.turn()

    ((head, size),) = driver.used(RX)
    assert before == []
    assert driver.data(RX, head)[:size] == b"wait"


def test_a_guest_that_does_not_read(board: FakeBoard, driver: RingDriver, client: socket.socket) -> None:
    """Then the client's bytes stay with the client, and none is lost."""
    data = bytes(range(256)) * (INPUT_LIMIT // 128)
    client.sendall(data)

    for _ in range(2):
        ready(board, READ)
    waiting = READ in list(board.steps.watched.values())[1:]
    for _ in range(8):
        driver.submit(RX, writable=[len(data)])
    driver.kick(RX)
    for _ in range(8):
        board.steps.turn()

    assert not waiting
    assert READ in list(board.steps.watched.values())[1:]
    assert b"".join(driver.data(RX, head)[:size] for head, size in driver.used(RX)) == data


def test_a_client_that_does_not_read(board: FakeBoard, driver: RingDriver, client: socket.socket) -> None:
    """Then the guest's bytes stay with the guest, and none is lost."""
    pieces = [bytes([n]) * (1 << 16) for n in range(24)]
    for piece in pieces:
        driver.submit(TX, readable=[piece])

    driver.kick(TX)
    for _ in range(24):
        board.steps.turn()
    taken = len(driver.used(TX))
    got = bytearray()
    while len(got) < 24 << 16:
        got += client.recv(1 << 16)
        for fd in [fd for fd, events in board.steps.watched.items() if events == WRITE]:
            board.steps.ready(fd)
        board.steps.turn()

    assert OUTPUT_LIMIT >> 16 <= taken < 24
    assert got == b"".join(pieces)


def test_a_client_that_leaves_with_output_unread(board: FakeBoard, driver: RingDriver, device: PortSocket) -> None:
    """The guest goes on, and the next client hears what it says from then on."""
    first = connect(board, device)
    for _ in range(24):
        driver.submit(TX, readable=[bytes(1 << 16)])
    driver.kick(TX)
    for _ in range(24):
        board.steps.turn()

    first.close()
    ready(board, READ)
    for _ in range(24):
        board.steps.turn()
    taken = len(driver.used(TX))
    with connect(board, device) as second:
        driver.request(TX, [b"hello"])
        heard = second.recv(64)

    assert (taken, heard) == (24, b"hello")


def test_nobody_is_connected(driver: RingDriver) -> None:
    driver.request(TX, [bytes(1 << 16)])


def test_the_socket_goes_with_the_device(device: PortSocket) -> None:
    there = device.path.exists()

    device.close()

    assert (there, device.path.exists()) == (True, False)


def test_a_path_that_cannot_be(board: FakeBoard, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(HostError, match=r'cannot listen on ".*file": Address already in use; name another path'):
        catalogue.make(f"virtio-console,port=a,path={tmp_path / 'file'}").attach(board)
