"""A guest's exit status reaches the machine, once."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.board import Reason
from kvmpy.devices.exit_port import ExitPort
from kvmpy.testing import FakeBoard

PORT = 0xF4


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_the_byte_is_the_status(status: int) -> None:
    board = FakeBoard()
    ExitPort(PORT).attach(board)

    board.ports.write(PORT, 1, status)

    assert [(stop.reason, stop.status) for stop in board.stops] == [(Reason.EXIT, status)]


def test_later_bytes_are_ignored() -> None:
    board = FakeBoard()
    ExitPort(PORT).attach(board)

    board.ports.write(PORT, 1, 0)
    board.ports.write(PORT, 1, 7)

    assert [stop.status for stop in board.stops] == [0]
    assert board.ports.read(PORT, 1) == 0


def test_a_restored_port_remembers_that_a_status_was_given() -> None:
    first = ExitPort(PORT)
    first.attach(FakeBoard())
    first.write(0, 1, 7)
    state = json.loads(json.dumps(first.state()))
    board = FakeBoard()
    other = ExitPort(PORT)
    other.attach(board)

    other.restore(state)
    board.ports.write(PORT, 1, 8)

    assert other.state() == state
    assert board.stops == []
