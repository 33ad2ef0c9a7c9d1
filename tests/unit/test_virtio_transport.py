"""What both transports owe a driver: status, features, queues, configuration (VIRTIO 1.2, 2 and 3)."""

from __future__ import annotations

import pytest
from probe import READY, Probe, Turnstile

from kvmpy.testing import FakeBoard, RingDriver, StepLoop
from kvmpy.virtio.spec import INTERRUPT, STATUS, F


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


def test_features_come_in_two_halves(driver: RingDriver) -> None:
    halves = []
    for half in (0, 1, 2, 0xFFFFFFFF):
        driver.set("DeviceFeaturesSel", half)
        halves.append(driver.get("DeviceFeatures"))

    offered = Probe.features | F.VERSION_1 | F.EVENT_IDX | F.INDIRECT_DESC
    assert halves == [offered & 0xFFFFFFFF, offered >> 32, 0, 0]


@pytest.mark.parametrize("features", [0, 1 << 9, F.VERSION_1 | 1 << 10, F.VERSION_1 | 1 << 34], ids=hex)
def test_features_that_are_not_agreed_on(driver: RingDriver, features: int) -> None:
    """Without VERSION_1, or with a bit that was not offered (a packed ring is none), FEATURES_OK does not stay."""
    driver.set("Status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)

    driver.accept(features)
    driver.set("Status", driver.get("Status") | STATUS.DRIVER_OK)

    assert driver.get("Status") == STATUS.ACKNOWLEDGE | STATUS.DRIVER


def test_driver_comes_up(driver: RingDriver, device: Probe) -> None:
    driver.start(F.VERSION_1 | 1 << 40)

    driver.kick(1)

    assert driver.get("Status") == READY
    assert device.told == ["reset", F.VERSION_1 | 1 << 40, 0, 1, 1]  # both queues are looked at once


def test_features_are_fixed_once_they_are_agreed_on(driver: RingDriver, device: Probe) -> None:
    driver.start()
    driver.set("DriverFeaturesSel", 0)
    driver.set("DriverFeatures", 0xFFFFFFFF)

    assert driver.transport.core.accepted == F.VERSION_1


def test_nothing_is_served_before_driver_ok(driver: RingDriver, device: Probe) -> None:
    driver.kick(0)

    assert device.told == []


def test_status_bits_are_never_cleared_but_by_reset(driver: RingDriver) -> None:
    driver.start()

    driver.set("Status", STATUS.ACKNOWLEDGE)

    assert driver.get("Status") == READY


def test_driver_cannot_claim_that_the_device_needs_a_reset(driver: RingDriver) -> None:
    driver.set("Status", STATUS.DEVICE_NEEDS_RESET)

    assert driver.get("Status") == 0


def test_configuration_space(driver: RingDriver) -> None:
    assert [driver.config(offset, size) for offset, size in ((0, 1), (1, 1), (2, 2), (4, 4))] == [
        1, 2, 0x0403, 0x08070605,
    ]  # fmt: skip
    assert [driver.config(offset, 4) for offset in (10, 12, 0xEFC)] == [0x0C0B, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 8, 11, 12, 0xEF8])
def test_configuration_space_is_read_only(driver: RingDriver, offset: int, size: int) -> None:
    driver.write_config(offset, size, (1 << 8 * size) - 1)

    assert driver.config(0, 8) == 0x0807060504030201
    assert driver.config(8, 8) == 0x0C0B0A09


def test_generation_tells_of_changes(driver: RingDriver) -> None:
    before = driver.get("ConfigGeneration")

    driver.transport.core.device.config_changed()

    assert driver.get("ConfigGeneration") == before + 1
    assert driver.get("InterruptStatus") == 0  # there is no driver to tell


def test_reset_forgets_the_driver(driver: RingDriver, device: Probe) -> None:
    driver.start()

    driver.set("Status", 0)
    driver.kick(0)

    assert device.told[-1] == "reset"
    for index in (0, 1):
        driver.set("QueueSel", index)
        assert (driver.get("Status"), driver.get("QueueReady")) == (0, 0)
        assert driver.get("QueueNumMax") == Probe.queue_sizes[index]


def test_device_works_after_many_resets(driver: RingDriver, device: Probe) -> None:
    for _ in range(1000):
        driver.set("Status", STATUS.ACKNOWLEDGE)
        driver.set("Status", 0)

    driver.start()
    driver.kick(0)

    assert device.told[-1] == 0
    assert driver.get("Status") == READY


@pytest.mark.parametrize("status", [STATUS.DRIVER_OK, 0xFF, STATUS.FAILED, STATUS.FEATURES_OK, 0x30])
def test_status_that_comes_too_early(driver: RingDriver, device: Probe, status: int) -> None:
    """No features are agreed on: neither FEATURES_OK nor DRIVER_OK stays."""
    driver.set("Status", status)
    driver.kick(0)

    assert driver.get("Status") == status & (STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FAILED)
    assert device.told == []


def test_change_of_configuration_interrupts(driver: RingDriver, device: Probe) -> None:
    driver.start()

    device.config_changed()

    assert driver.interrupts() == INTERRUPT.CONFIGURATION
    assert (driver.interrupts(), driver.pulses) == (0, 1)


# Locks.


@pytest.fixture
def turnstile(driver: RingDriver, device: Probe) -> Turnstile:
    """The device's lock, once the driver is up."""
    driver.start()
    device.lock = turnstile = Turnstile()
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
