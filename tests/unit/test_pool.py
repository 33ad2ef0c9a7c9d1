"""A pool of sandboxes: each is used once, the dead are left out, and what goes wrong is told to who waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvmpy import pool
from kvmpy.core.board import Reason, Stop
from kvmpy.core.errors import ConfigError, GuestLost, HostError, TimedOut
from kvmpy.pool import SandboxPool

LIMIT = 10.0


class FakeSandbox:
    """A sandbox without a machine."""

    def __init__(self, number: int = 0) -> None:
        if number < 0:
            raise ConfigError(f"{number} is no number")
        self.number = number
        self.running = False
        self.stopped: Stop | None = None
        self.machine = self
        self.stops: list[Stop] = []

    def start(self) -> FakeSandbox:
        if self.number == 13:
            raise HostError("no memory")
        self.running = True
        started.append(self)
        return self

    def stop(self, why: Stop) -> None:
        self.stops.append(why)

    def close(self) -> None:
        self.running = False


started: list[FakeSandbox] = []


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    started.clear()
    monkeypatch.setattr(pool, "Sandbox", FakeSandbox)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_each_is_taken_once_and_replaced() -> None:
    with SandboxPool(size=2) as sandboxes:
        taken: list[Any] = [sandboxes.take(LIMIT) for _ in range(5)]
        wait_until(lambda: len(sandboxes) == 2)

    assert len(set(map(id, taken))) == 5
    assert all(sandbox.running for sandbox in taken)
    assert len(started) == 7
    assert [sandbox.running for sandbox in started if sandbox not in taken] == [False, False]


def test_the_dead_are_left_out() -> None:
    with SandboxPool(size=1) as sandboxes:
        wait_until(lambda: len(sandboxes) == 1)
        started[0].stopped = Stop(Reason.PANIC)

        taken: Any = sandboxes.take(LIMIT)

    assert taken is started[1]


def test_the_dead_are_replaced_before_anybody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.01)
    with SandboxPool(size=2) as sandboxes:
        wait_until(lambda: len(sandboxes) == 2)
        started[0].stopped = Stop(Reason.PANIC)
        assert len(sandboxes) == 1

        wait_until(lambda: len(sandboxes) == 2)

    assert len(started) == 3
    assert not started[0].running


def test_an_error_is_told_to_each() -> None:
    with SandboxPool(size=3, number=13) as sandboxes:
        for _ in range(3):
            with pytest.raises(HostError, match="no memory"):
                sandboxes.take(LIMIT)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="-1 is no number"):
        SandboxPool(number=-1)
    with pytest.raises(ConfigError, match="a pool of 0 sandboxes"):
        SandboxPool(size=0)


def test_who_closes_a_pool_does_not_wait_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def start(self: FakeSandbox) -> FakeSandbox:
        """Until somebody stops the machine."""
        begun.set()
        wait_until(lambda: bool(self.stops))
        raise GuestLost("the guest did not start")

    monkeypatch.setattr(FakeSandbox, "start", start)
    sandboxes = SandboxPool(size=1).start()
    begun.wait(LIMIT)

    begin = time.monotonic()
    sandboxes.close()

    assert time.monotonic() - begin < LIMIT / 2
    assert len(sandboxes) == 0


def test_a_pool_that_is_closed_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(FakeSandbox, "start", lambda self: gate.wait(LIMIT) and self)

    with SandboxPool(size=1) as sandboxes:
        with pytest.raises(TimedOut):
            sandboxes.take(0.01)
        gate.set()

    with pytest.raises(ConfigError, match="closed"):
        sandboxes.take()
    with pytest.raises(ConfigError, match="started before"):
        sandboxes.start()


def test_a_mistake_in_the_thread_is_told_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sandbox: FakeSandbox) -> FakeSandbox:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(FakeSandbox, "start", fail)

    with SandboxPool(size=1) as sandboxes, pytest.raises(ZeroDivisionError, match="on purpose"):
        sandboxes.take(LIMIT)
