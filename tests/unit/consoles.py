"""A console device with a driver that is up, and who is at the other end of its ports."""

from __future__ import annotations

import struct

import pytest

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.console import CONSOLE_F, VirtioConsole
from kvmpy.virtio.spec import F

RX, TX, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)


class Owner:
    """A port's owner with room for `room` pieces; `rooms` counts what on_room was told."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.data = b""
        self.room = room
        self.rooms = 0

    def take(self, data: bytes) -> bool:
        self.data += data
        self.room -= 1
        return self.room > 0

    def on_room(self) -> None:
        self.rooms += 1


class Terminal:
    """One port, which belongs to `owner`; with `ports` it is the second, "agent", and there are control messages."""

    def __init__(self, transport: str, ports: int = 1) -> None:
        self.board = FakeBoard(4 << 20, transport)
        self.owner = Owner()
        self.device = VirtioConsole(ports=ports)
        port = self.device.ports[0] if ports == 1 else self.device.add_port("agent")
        port.on_data, port.on_room = self.owner.take, self.owner.on_room
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        self.driver.start(F.VERSION_1 | CONSOLE_F.SIZE | CONSOLE_F.MULTIPORT * (ports > 1))


@pytest.fixture
def terminal(transport: str) -> Terminal:
    return Terminal(transport)


@pytest.fixture
def switchboard(transport: str) -> Terminal:
    """Three ports: the console, one named "agent", and one left."""
    return Terminal(transport, ports=3)


def say(driver: RingDriver, number: int, event: int, value: int) -> None:
    driver.request(CONTROL_TX, [struct.pack("<IHH", number, event, value)])


def hear(driver: RingDriver) -> list[tuple[int, int, bytes]]:
    """(port, event, what follows) of the control messages that wait for the driver."""
    for _ in range(16):
        driver.submit(CONTROL_RX, writable=[64])
    driver.kick(CONTROL_RX)
    messages = [driver.data(CONTROL_RX, head)[:size] for head, size in driver.used(CONTROL_RX)]
    assert [message[6:8] for message in messages] == [b"\1\0"] * len(messages)
    return [(*struct.unpack("<IH", message[:6]), message[8:]) for message in messages]
