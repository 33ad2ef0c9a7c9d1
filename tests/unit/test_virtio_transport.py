"""What transports do with a device (more of what they owe a driver: test_conformance_transport.py)."""

from __future__ import annotations

import pytest
from probe import READY, Probe, Turnstile

from kvmpy.testing import FakeBoard, RingDriver, StepLoop
from kvmpy.virtio.spec import F


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(transport=transport)


@pytest.fixture
def device(board: FakeBoard) -> Probe:
    device = Probe()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Probe) -> RingDriver:
    return RingDriver(board)


def test_driver_comes_up(driver: RingDriver, device: Probe) -> None:
    driver.start(F.VERSION_1 | 1 << 40)

    driver.kick(1)

    assert driver.get("Status") == READY
    assert device.told == ["reset", F.VERSION_1 | 1 << 40, 0, 1, 1]  # both queues are looked at once


# Locks.


@pytest.fixture
def turnstile(driver: RingDriver, device: Probe) -> Turnstile:
    """The device's lock, once the driver is up."""
    driver.start()
    device.lock = turnstile = Turnstile()
    driver.board.memory_bus.slots.clear()
    return turnstile


def test_interrupts_and_kicks_do_not_wait_for_the_device(driver: RingDriver, turnstile: Turnstile) -> None:
    """A device that waits for the host holds its lock: vCPUs that only answer its interrupts go on all the same."""
    driver.interrupts()
    driver.set("QueueNotify", 1)

    assert turnstile.taken == 0


@pytest.mark.parametrize("register", ["Status", "QueueReady"])
def test_other_registers_wait_for_the_device(driver: RingDriver, turnstile: Turnstile, register: str) -> None:
    driver.get(register)
    driver.set(register, 0)
    driver.config(0, 4)
    driver.write_config(0, 4, 0)

    assert turnstile.taken == 4


def test_reset_waits_for_what_the_device_does(driver: RingDriver, device: Probe, turnstile: Turnstile) -> None:
    """On return nothing of it is under way (2.4)."""
    held: list[int] = []
    device.reset = lambda: held.append(turnstile.taken)

    driver.set("Status", 0)

    assert held == [1]


def test_a_device_may_have_a_thread_of_its_own(board: FakeBoard) -> None:
    class Slow(Probe):
        own_thread = True

    loops = [StepLoop(), StepLoop()]
    board.new_loop = lambda name: loops[1]
    board.loop = board.steps = loops[0]
    device = Slow()
    device.attach(board)
    driver = RingDriver(board)
    driver.start()

    board.steps.turn()
    before = list(device.told)
    loops[1].turn()

    assert device.loop is loops[1]
    assert (before, device.told[len(before) :]) == (["reset", F.VERSION_1], [0, 1])
