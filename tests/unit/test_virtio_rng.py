"""The entropy device (VIRTIO 1.2, 5.4)."""

from __future__ import annotations

import pytest

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio import rng


@pytest.fixture
def driver(transport: str) -> RingDriver:
    board = FakeBoard(transport=transport)
    rng.Rng().attach(board)
    driver = RingDriver(board)
    driver.start()
    return driver


def test_fills_what_it_is_given(driver: RingDriver) -> None:
    first, second = driver.request(0, writable=[32]), driver.request(0, writable=[1, 31])

    assert len(first) == len(second) == 32
    assert first != second
