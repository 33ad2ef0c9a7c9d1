"""A guest kernel's panic reaches the machine."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.board import Reason
from kvmpy.devices.pvpanic import Pvpanic
from kvmpy.testing import FakeBoard

PORT = 0x505


@pytest.fixture
def board() -> FakeBoard:
    board = FakeBoard()
    Pvpanic(PORT).attach(board)
    return board


def test_read_gives_the_events_it_knows(board: FakeBoard) -> None:
    board.ports.write(PORT, 1, 0)

    assert board.ports.read(PORT, 1) == 3


@pytest.mark.parametrize("value", [1, 3, 0xFF])
def test_panic_stops_the_machine(board: FakeBoard, value: int) -> None:
    board.ports.write(PORT, 1, value)

    assert [stop.reason for stop in board.stops] == [Reason.PANIC]


def test_a_guest_with_a_crash_kernel_goes_on(board: FakeBoard) -> None:
    board.ports.write(PORT, 1, 2)

    assert board.stops == []
    assert len(board.logs) == 1


@pytest.mark.parametrize("value", [0, 4, 0xFC])
def test_bits_it_does_not_know_are_ignored(board: FakeBoard, value: int) -> None:
    board.ports.write(PORT, 1, value)

    assert (board.stops, board.logs) == ([], [])


def test_state_round_trip_through_json() -> None:
    state = json.loads(json.dumps(Pvpanic(PORT).state()))

    other = Pvpanic(PORT)
    other.restore(state)

    assert other.state() == state
