"""The boot timer takes the first signal of init."""

from __future__ import annotations

import itertools
import json

import pytest

from kvmpy.devices.boot_timer import BootTimer
from kvmpy.testing import FakeBoard

BASE = 0xC0000000


@pytest.fixture
def board() -> FakeBoard:
    return FakeBoard()


@pytest.fixture
def timer(board: FakeBoard) -> BootTimer:
    """Its clock goes from 0 in steps of 10: the constructor takes the first, attach the second."""
    device = BootTimer(BASE, clock=itertools.count(0, 10).__next__)
    device.attach(board)
    return device


def test_before_the_signal_there_is_no_time(timer: BootTimer) -> None:
    assert timer.ELAPSED == -1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_byte_123_is_the_signal(board: FakeBoard, timer: BootTimer, size: int) -> None:
    board.memory_bus.write(BASE, size, 123)

    assert timer.ELAPSED == 10


def test_time_counts_from_start_when_the_machine_sets_it(board: FakeBoard, timer: BootTimer) -> None:
    timer.start = 3

    board.memory_bus.write(BASE, 1, 123)

    assert timer.ELAPSED == 17


@pytest.mark.parametrize(("offset", "value"), [(0, 0), (0, 122), (0, 124), (1, 123)])
def test_other_writes_are_not(board: FakeBoard, timer: BootTimer, offset: int, value: int) -> None:
    board.memory_bus.write(BASE + offset, 1, value)

    assert timer.ELAPSED == -1


def test_the_first_signal_counts(board: FakeBoard, timer: BootTimer) -> None:
    board.memory_bus.write(BASE, 1, 123)
    board.memory_bus.write(BASE, 1, 123)

    assert timer.ELAPSED == 10


def test_reads_give_0(board: FakeBoard, timer: BootTimer) -> None:
    board.memory_bus.write(BASE, 1, 123)

    assert board.memory_bus.read(BASE, 8) == 0


def test_state_round_trip_through_json(board: FakeBoard, timer: BootTimer) -> None:
    board.memory_bus.write(BASE, 1, 123)
    state = json.loads(json.dumps(timer.state()))

    other = BootTimer(BASE)
    other.restore(state)

    assert other.state() == state
    assert other.ELAPSED == 10
