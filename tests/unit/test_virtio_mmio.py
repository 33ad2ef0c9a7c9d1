"""The registers of virtio over MMIO (VIRTIO 1.2, 4.2.2) and what drivers must not do with them."""

from __future__ import annotations

import pytest
from probe import READY, Probe

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.spec import INTERRUPT, STATUS, Type


@pytest.fixture
def board() -> FakeBoard:
    return FakeBoard()


@pytest.fixture
def device(board: FakeBoard) -> Probe:
    device = Probe()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Probe) -> RingDriver:
    return RingDriver(board)


def test_identity(driver: RingDriver) -> None:
    assert driver.get("MagicValue").to_bytes(4, "little") == b"virt"
    assert (driver.get("Version"), driver.get("DeviceID")) == (2, Type.BLOCK)
    assert driver.get("Status") == 0


@pytest.mark.parametrize("number", [2, 0xFFFF, 0x80000000, 0xFFFFFFFF])
def test_queue_that_is_not_there(driver: RingDriver, device: Probe, number: int) -> None:
    driver.start()
    told = len(device.told)

    driver.set("QueueSel", number)
    driver.set("QueueNum", 8)
    driver.set("QueueReady", 1)
    driver.kick(number)

    assert (driver.get("QueueNumMax"), driver.get("QueueReady")) == (0, 0)
    assert len(device.told) == told
    assert driver.get("Status") == READY


def test_queues_are_fixed_while_the_driver_is_up(driver: RingDriver) -> None:
    driver.start()
    queue = driver.transport.core.queues[0]
    before = queue.state()

    driver.set("QueueSel", 0)
    for register in ("QueueNum", "QueueDescLow", "QueueDriverHigh", "QueueDeviceLow", "QueueReady"):
        driver.set(register, 0x12345)

    assert queue.state() == before


def test_queue_can_be_stopped(driver: RingDriver, device: Probe) -> None:
    driver.start()
    driver.set("QueueSel", 0)

    driver.set("QueueReady", 0)
    driver.set("QueueReady", 1)  # too late
    driver.kick(0)

    assert driver.get("QueueReady") == 0
    assert device.told[-1] != 0


def test_reset(driver: RingDriver, device: Probe) -> None:
    driver.start()
    driver.transport.InterruptStatus = INTERRUPT.USED_BUFFER
    driver.set("Status", 0)

    assert device.told[-1] == "reset"
    assert (driver.get("Status"), driver.get("InterruptStatus"), driver.get("QueueReady")) == (0, 0, 0)
    assert (driver.get("DeviceID"), driver.get("MagicValue")) == (Type.BLOCK, int.from_bytes(b"virt", "little"))
    driver.set("QueueSel", 1)
    assert driver.get("QueueReady") == 0


def test_interrupt_status_stays_until_acknowledged(driver: RingDriver) -> None:
    driver.start()
    core, line = driver.transport.core, driver.board.lines[16]
    core.device.config_changed()
    core.device.config_changed()

    assert line.pulses == 2
    assert driver.interrupts() == INTERRUPT.CONFIGURATION
    assert driver.interrupts() == 0


@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_are_words(driver: RingDriver, size: int) -> None:
    driver.board.memory_bus.write(driver.base + 0x70, size, STATUS.ACKNOWLEDGE)

    assert driver.get("Status") == 0
    assert driver.get("MagicValue", size) == 0


def test_no_shared_memory_regions(driver: RingDriver) -> None:
    driver.set("SHMSel", 0)

    assert (driver.get("SHMLenLow"), driver.get("SHMLenHigh")) == (0xFFFFFFFF, 0xFFFFFFFF)


@pytest.mark.parametrize("offset", range(0, 0x1000, 4), ids=hex)
def test_any_word_can_be_written(driver: RingDriver, offset: int) -> None:
    driver.start()
    for value in (0xFFFFFFFF, 0x80000000, 1, 0):
        driver.board.memory_bus.write(driver.base + offset, 4, value)
        driver.board.memory_bus.read(driver.base + offset, 4)
        driver.board.steps.turn()

    driver.start()
    assert driver.get("Status") == READY
