"""Both outboxes, the plain one and the shim's, do the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.outbox import PlainOutbox
from kvmpy.kvm.fast import FastOutbox

LIMIT, BATCH = 12, 4

Wakes = Callable[[], bool]  # whether the reader has been woken since the last call


def plain() -> tuple[PlainOutbox, Wakes]:
    wakes: list[None] = []

    def woken() -> bool:
        before, wakes[:] = bool(wakes), []
        return before

    return PlainOutbox(LIMIT, BATCH, lambda: wakes.append(None)), woken


def fast() -> tuple[FastOutbox, Wakes]:
    box = FastOutbox(LIMIT, BATCH)

    def woken() -> bool:
        with suppress(BlockingIOError):
            return bool(os.eventfd_read(box.fd))
        return False

    return box, woken


@pytest.fixture(params=[plain, fast])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Wakes]]:
    box, woken = request.param()
    yield box, woken
    getattr(box, "close", lambda: None)()


def test_the_first_byte_wakes_at_leisure(pair: tuple[Any, Wakes]) -> None:
    box, woken = pair

    box.put(b"a")
    first, waiting = woken(), box.waiting()
    box.put(b"b")

    assert (first, waiting, woken()) == (True, (1, True), False)


@pytest.mark.parametrize("data", [b"b\n", b"bcd"])
def test_a_line_or_a_batch_wakes_at_once(pair: tuple[Any, Wakes], data: bytes) -> None:
    box, woken = pair
    box.put(b"a")
    woken()

    box.put(data)

    assert woken()
    assert box.waiting() == (1 + len(data), False)
    assert box.take() == b"a" + data


def test_after_a_take_the_next_byte_wakes_again(pair: tuple[Any, Wakes]) -> None:
    box, woken = pair
    box.put(b"a\n")
    box.take()
    woken()

    box.put(b"b")

    assert woken()


def test_it_is_full_until_the_host_has_taken_half(pair: tuple[Any, Wakes]) -> None:
    box, _ = pair

    rooms = box.put(b"x" * 11), box.put(b"x")
    drained = box.sent(5), box.sent(1), box.sent(1)

    assert rooms == (True, False)
    assert drained == (False, True, False)
    assert box.under_way == 5


STEPS = st.lists(
    st.one_of(
        st.binary(max_size=6).map(lambda data: ("put", data)),
        st.just(("waiting",)),
        st.just(("take",)),
        st.integers(0, 20).map(lambda count: ("sent", count)),
    )
)


@given(STEPS)
def test_both_give_the_same(steps: list[Any]) -> None:
    seen = []
    for make in (plain, fast):
        box, woken = make()
        seen.append([(getattr(box, verb)(*words), woken(), box.under_way) for verb, *words in steps])
        getattr(box, "close", lambda: None)()

    assert seen[0] == seen[1]


def test_a_closed_one_still_takes_bytes() -> None:
    box, _ = fast()
    box.close()
    box.close()

    assert box.put(b"a\n")
    assert box.take() == b"a\n"


def test_what_comes_while_the_reader_takes_wakes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no later byte that does: the guest waits for room."""
    box, woken = fast()
    box.put(b"first\n")
    assert woken()
    waiting = FastOutbox.waiting

    def meanwhile(outbox: FastOutbox) -> tuple[int, bool]:
        asked = waiting(outbox)
        outbox.put(b"second\n")
        return asked

    monkeypatch.setattr(FastOutbox, "waiting", meanwhile)
    first = box.take()
    monkeypatch.undo()

    assert (first, woken()) == (b"first\n", True)
    assert (box.take(), woken()) == (b"second\n", False)
    box.close()


def test_full_is_full_for_all_writers_until_half_has_gone(pair: tuple[Any, Wakes]) -> None:
    """Or whoever was refused before would never be told."""
    box, _ = pair
    refused = box.put(b"x" * LIMIT)
    still = box.sent(LIMIT // 2 - 1)

    other = box.put(b"y")
    drained = box.sent(2)

    assert (refused, still, other, drained) == (False, False, False, True)
