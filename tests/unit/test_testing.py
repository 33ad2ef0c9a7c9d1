"""The fakes that ship with kvmpy behave like what they stand for."""

from __future__ import annotations

import pytest

from kvmpy.core.board import Reason, Stop
from kvmpy.core.regs import Reg, RegisterDevice
from kvmpy.testing import ByteSink, FakeBoard, IrqRecorder, StepLoop


class Toy(RegisterDevice, span=4):
    VALUE = Reg(0, reset=7)


def test_irq_recorder_counts_rises() -> None:
    line = IrqRecorder()
    initial = line.level

    for level in (False, True, True, False, True):
        line.set(level)
    line.pulse()

    assert (initial, line.level, line.edges, line.pulses) == (False, True, 3, 1)


def test_byte_sink_says_when_it_is_full_and_refuses_more() -> None:
    sink = ByteSink(room=2)

    answers = [sink.put(1), sink.put(2)]

    assert (answers, sink.data) == ([True, False], b"\1\2")
    with pytest.raises(AssertionError, match="said it is full"):
        sink.put(3)


def test_board_maps_devices_on_both_buses() -> None:
    board, toy, other = FakeBoard(), Toy(), Toy()

    board.pio(0x100, 4, toy)
    first, second = board.mmio(4, other), board.mmio(4, Toy())

    assert board.ports.read(0x100, 1) == 7
    assert board.memory_bus.read(first, 1) == 7
    assert second >= first + 4


def test_board_gives_the_asked_line_or_a_free_one() -> None:
    board = FakeBoard()

    asked, again, free, other = board.irq(4), board.irq(4), board.irq(), board.irq()

    assert asked is again is board.lines[4]
    assert len({id(asked), id(free), id(other)}) == 3


def test_board_has_the_ram_that_was_asked_for() -> None:
    board = FakeBoard(size=32)

    board.mem.write(28, b"abcd")

    assert board.mem.read(0, 32) == bytes(28) + b"abcd"


def test_a_removed_descriptor_has_no_callback() -> None:
    loop = StepLoop()
    loop.add(5, lambda: None)

    loop.remove(5)

    with pytest.raises(KeyError):
        loop.ready(5)


def test_board_records_stops_words_and_logs() -> None:
    board = FakeBoard()

    board.stop(Stop(Reason.QUIT))
    board.cmdline("a", "b=1")
    board.log("event", number=1)

    assert board.stops == [Stop(Reason.QUIT)]
    assert (board.words, board.logs) == (["a", "b=1"], [("event", {"number": 1})])


def test_step_loop_runs_what_is_due_with_the_owners_lock() -> None:
    loop, toy = StepLoop(), Toy()
    done: list[tuple[str, bool]] = []

    loop.call_soon(lambda: done.append(("soon", toy.lock.locked())), owner=toy)
    loop.after(2.0, lambda: done.append(("late", toy.lock.locked())))
    loop.after(1.0, lambda: done.append(("early", toy.lock.locked())), owner=toy)
    loop.add(5, lambda: done.append(("fd", toy.lock.locked())), owner=toy)
    loop.advance(0.5)
    loop.turn()
    loop.turn()
    loop.ready(5)
    loop.advance(1.5)
    loop.advance(2.0)

    assert done == [("soon", True), ("fd", True), ("early", True), ("late", False)]


def test_step_loop_leaves_for_the_next_turn_what_a_turn_adds() -> None:
    loop = StepLoop()
    turns: list[int] = []

    loop.call_soon(lambda: loop.call_soon(lambda: turns.append(2)))
    loop.turn()
    after_one = list(turns)
    loop.turn()

    assert (after_one, turns) == ([], [2])
