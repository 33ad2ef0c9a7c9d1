"""The debug ports output what is written and lose only what does not fit."""

from __future__ import annotations

import json

from kvmpy.devices.debugcon import Debugcon
from kvmpy.testing import ByteSink, FakeBoard

PORT = 0x402


def make(room: int | None = None) -> tuple[FakeBoard, ByteSink, Debugcon]:
    board, sink = FakeBoard(), ByteSink(room)
    device = Debugcon(sink, PORT)
    device.attach(board)
    return board, sink, device


def test_what_is_written_is_output() -> None:
    board, sink, _ = make()

    for byte in b"hello":
        board.ports.write(PORT, 1, byte)

    assert sink.data == b"hello"


def test_reading_gives_e9_also_after_writing() -> None:
    board, _, _ = make()
    board.ports.write(PORT, 1, 0)

    assert board.ports.read(PORT, 1) == 0xE9


def test_what_a_full_sink_cannot_take_is_dropped_and_counted() -> None:
    board, sink, device = make(room=2)

    for byte in b"hello":
        board.ports.write(PORT, 1, byte)

    assert sink.data == b"he"
    assert device.DROPPED == 3


def test_after_drained_it_goes_on() -> None:
    board, sink, device = make(room=1)
    board.ports.write(PORT, 1, ord("a"))
    board.ports.write(PORT, 1, ord("b"))

    sink.room = None
    device.drained()
    board.ports.write(PORT, 1, ord("c"))

    assert sink.data == b"ac"


def test_state_round_trip_through_json() -> None:
    board, _, device = make(room=1)
    board.ports.write(PORT, 2, 0x6161)
    board.ports.write(PORT, 1, 0x61)
    board.ports.write(PORT, 1, 0x61)
    state = json.loads(json.dumps(device.state()))

    other = Debugcon(ByteSink(), PORT)
    other.restore(state)

    assert other.state() == state
    assert other.DROPPED == 1
