"""What transports do with a device (more of what they owe a driver: test_conformance_transport.py)."""

from __future__ import annotations

import pytest
from probe import READY, Probe

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.spec import F


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(transport=transport)


@pytest.fixture
def device(board: FakeBoard) -> Probe:
    device = Probe()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Probe) -> RingDriver:
    return RingDriver(board)


def test_driver_comes_up(driver: RingDriver, device: Probe) -> None:
    driver.start(F.VERSION_1 | 1 << 40)

    driver.kick(1)

    assert driver.get("Status") == READY
    assert device.told == ["reset", F.VERSION_1 | 1 << 40, 0, 1, 1]  # both queues are looked at once
