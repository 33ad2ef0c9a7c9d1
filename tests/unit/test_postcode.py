"""POST codes are timed when they first come."""

from __future__ import annotations

import itertools
import json

import pytest

from kvmpy.devices.postcode import KERNEL_START, USER_START, PostCodes
from kvmpy.testing import FakeBoard

PORT = 0x80


@pytest.fixture
def codes() -> PostCodes:
    """Its clock goes from 0 in steps of 10: the constructor takes the first, attach the second."""
    device = PostCodes(PORT, clock=itertools.count(0, 10).__next__)
    device.attach(FakeBoard())
    return device


def test_codes_have_the_time_since_attach(codes: PostCodes) -> None:
    codes.write(0, 1, KERNEL_START)
    codes.write(0, 1, USER_START)

    assert codes.first == {0x40: 10, 0x41: 20}


def test_time_counts_from_start_when_the_machine_sets_it(codes: PostCodes) -> None:
    codes.start = 5

    codes.write(0, 1, KERNEL_START)

    assert codes.first == {0x40: 15}


def test_the_first_time_of_a_code_counts(codes: PostCodes) -> None:
    for code in (0x40, 0x00, 0x40, 0x00):
        codes.write(0, 1, code)

    assert codes.first == {0x40: 10, 0x00: 20}


def test_a_guest_that_writes_for_ever_is_256_records(codes: PostCodes) -> None:
    for n in range(10_000):
        codes.write(0, 1, n & 0xFF)

    assert len(codes.first) == 256


def test_reads_back_at_its_port() -> None:
    board = FakeBoard()
    PostCodes(PORT).attach(board)

    board.ports.write(PORT, 1, 0x5A)

    assert board.ports.read(PORT, 1) == 0x5A


def test_state_round_trip_through_json(codes: PostCodes) -> None:
    codes.write(0, 1, 0x40)
    state = json.loads(json.dumps(codes.state()))

    other = PostCodes(PORT)
    other.restore(state)

    assert other.state() == state
    assert other.first == {0x40: 10}


@pytest.mark.parametrize("first", [None, {}, [[0, 0]] * 257])
def test_restore_refuses_a_damaged_state(codes: PostCodes, first: object) -> None:
    with pytest.raises(ValueError, match="PostCodes: state"):
        codes.restore(codes.state() | {"first": first})
