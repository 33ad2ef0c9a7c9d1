"""The event loop: descriptors, timers, calls; on its own thread, under the owner's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvmpy.core.events import EventLoop

SECONDS = 30.0


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
def loop(failures: list[BaseException]) -> Iterator[EventLoop]:
    loop = EventLoop("test", failures.append)
    loop.start()
    yield loop
    loop.stop()


class Owner:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_calls_run_in_order_on_the_loops_thread(loop: EventLoop) -> None:
    seen: list[tuple[int, str]] = []
    done = threading.Event()

    for number in range(100):
        loop.call_soon(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
    loop.call_soon(done.set)

    assert done.wait(SECONDS)
    assert seen == [(number, "kvmpy-test") for number in range(100)]


def test_a_callback_holds_its_owners_lock(loop: EventLoop) -> None:
    owner, held, done = Owner(), [], threading.Event()

    loop.call_soon(lambda: (held.append(owner.lock.locked()), done.set()), owner=owner)

    assert done.wait(SECONDS)
    assert held == [True]


def test_a_ready_descriptor_is_reported_until_it_is_removed(loop: EventLoop) -> None:
    reader, writer = os.pipe()
    got: list[bytes] = []
    more = threading.Event()

    def read() -> None:
        got.append(os.read(reader, 1))
        if len(got) == 2:
            loop.remove(reader)
            more.set()

    loop.add(reader, read)
    os.write(writer, b"abc")

    assert more.wait(SECONDS)
    settled = threading.Event()
    loop.call_soon(lambda: loop.call_soon(settled.set))
    assert settled.wait(SECONDS)
    assert got == [b"a", b"b"]
    os.close(reader)
    os.close(writer)


def test_timers_fire_in_the_order_of_their_times(loop: EventLoop) -> None:
    fired: list[str] = []
    done = threading.Event()

    loop.after(0.03, lambda: (fired.append("late"), done.set()))
    loop.after(0.01, lambda: fired.append("early"))

    assert done.wait(SECONDS)
    assert fired == ["early", "late"]


def test_a_callback_that_raises_is_told_and_ends_the_loop(loop: EventLoop, failures: list[BaseException]) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    loop.call_soon(fail)
    loop.stop()

    assert [type(failure) for failure in failures] == [ZeroDivisionError]


def test_what_cannot_be_watched_is_not_kept(loop: EventLoop, tmp_path: os.PathLike[str]) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)

    for _ in range(2):  # a leftover of the first try would make the second one say FileExistsError
        with pytest.raises(PermissionError):
            loop.add(fd, lambda: None)

    os.close(fd)


def test_stop_twice_and_remove_afterwards_are_harmless(loop: EventLoop) -> None:
    reader, writer = os.pipe()
    loop.add(reader, lambda: None)

    loop.stop()
    loop.remove(reader)
    loop.stop()

    os.close(reader)
    os.close(writer)


def test_failures_of_a_sibling_are_told_to_the_same(loop: EventLoop, failures: list[BaseException]) -> None:
    def fail() -> None:
        raise RuntimeError("on another thread")

    sibling = loop.sibling("other")
    sibling.call_soon(fail)
    sibling.start()
    sibling.stop()

    assert [str(error) for error in failures] == ["on another thread"]


def test_a_loop_that_has_stopped_watches_nothing() -> None:
    """A device is reset after its own loop has stopped, and may then wait for something else."""
    loop = EventLoop("stopped", lambda error: None)
    loop.start()
    reading, writing = os.pipe()
    loop.add(reading, lambda: None)
    loop.stop()

    loop.remove(reading)
    loop.add(reading, lambda: None)
    loop.call_soon(lambda: None)
    loop.after(0, lambda: None)

    os.close(reading)
    os.close(writing)
