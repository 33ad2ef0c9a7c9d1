"""What hostile guests do to the registers of a transport: rows 39 and 61 to 66 of the list of known attacks."""

from __future__ import annotations

from itertools import permutations

import pytest
from probe import ALL, READY, Echo, Probe

from kvmpy.pci.config import Header
from kvmpy.testing import PCI_ECAM, FakeBoard, RingDriver
from kvmpy.virtio import pci
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.mmio import SIZE, VirtioMmio
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.spec import INTERRUPT, STATUS, F, Type

ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED = (
    STATUS.ACKNOWLEDGE, STATUS.DRIVER, STATUS.FEATURES_OK, STATUS.DRIVER_OK, STATUS.FAILED,
)  # fmt: skip
FUNCTION = PCI_ECAM + (8 << 12)
VALUES = (2**64 - 1, 0x80000000_80000000, 0x01010101_01010101, 1, 0)


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(4 << 20, transport)


@pytest.fixture
def device(board: FakeBoard) -> Echo:
    device = Echo()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Echo) -> RingDriver:
    return RingDriver(board)


def span(driver: RingDriver) -> int:
    """How many bytes of address space the device answers."""
    return SIZE if driver.board.pci is None else pci.BAR_SIZE


def assert_works(driver: RingDriver) -> None:
    driver.start(ALL)
    assert driver.request(0, [b"hello"], [5]) == b"hello"


# 39: writes to the configuration space.


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 8, 11, 12, 0xEF8, 0xEFF, 0xFFF])
def test_hostile_39_configuration_space_is_read_only(board: FakeBoard, offset: int, size: int) -> None:
    Probe().attach(board)
    driver = RingDriver(board)

    driver.write_config(offset, size, (1 << 8 * size) - 1)

    assert driver.config(0, 8) == 0x0807060504030201
    assert driver.config(8, 8) == 0x0C0B0A09


@pytest.mark.parametrize("running", [False, True])
def test_hostile_39_configuration_of_each_device(each_device: VirtioDevice, running: bool) -> None:
    """A capacity, a MAC address, a size; only what a balloon holds is its driver's to say."""
    driver = RingDriver(each_device.board)
    if running:
        driver.start(F.VERSION_1 | each_device.features)
    own = range(4, 8) if each_device.type_id == Type.BALLOON else ()
    before = [driver.config(at, 1) for at in range(0x100)]

    for at in (*range(64), 0xEF8, 0xEFF):
        for size in (1, 2, 4, 8):
            driver.write_config(at, size, 2 ** (8 * size) - 1)

    after = [driver.config(at, 1) for at in range(0x100)]
    assert [at for at in range(0x100) if after[at] != before[at] and at not in own] == []


# 61: accesses that hit no register.


def test_hostile_61_control_registers_at_other_widths(driver: RingDriver) -> None:
    """All of them, at each offset: nothing is read, nothing is set."""
    bus = driver.board.memory_bus
    regs = driver.transport.REGISTERS.values()
    fields = {int(reg.offset): reg.width or 4 for reg in regs if reg.offset is not None and reg.offset < 0x100}
    wrong = [(at, size) for at in range(0xF8) for size in (1, 2, 4, 8) if fields.get(at) != size]
    before = driver.transport.state()

    read = set()
    for at, size in wrong:
        bus.write(driver.base + at, size, 2 ** (8 * size) - 1)
        read.add(bus.read(driver.base + at, size))

    assert read == {0}
    assert driver.transport.state() == before


@pytest.mark.parametrize("size", [2, 4, 8])
def test_hostile_61_access_across_the_end_of_the_device(driver: RingDriver, size: int) -> None:
    """The last byte, with what is behind it: no device has all of it."""
    bus, end = driver.board.memory_bus, driver.base + span(driver)
    before = driver.transport.state()

    for at in range(end - size + 1, end):
        bus.write(at, size, 2 ** (8 * size) - 1)
        assert bus.read(at, size) == 2 ** (8 * size) - 1

    assert driver.transport.state() == before
    assert bus.read(end - 1, 1) == 0


def test_hostile_61_string_moves_across_two_devices(board: FakeBoard) -> None:
    """Accesses of all sizes, from the first byte of one device to the last of the next."""
    devices = [Echo(), Echo()]
    for device in devices:
        device.attach(board)
    drivers = [RingDriver(board, number) for number in (0, 1)]
    base, end = drivers[0].base, drivers[1].base + span(drivers[1])

    for size in (1, 2, 4, 8):
        for address in range(base, end - size + 1, size):
            board.memory_bus.write(address, size, 2 ** (8 * size) - 1)
            board.memory_bus.read(address, size)
        board.steps.turn()

    fresh = [RingDriver(board, 0), RingDriver(board, 1, free=0x20000)]
    for driver in fresh:
        assert_works(driver)


def test_hostile_61_configuration_space_at_any_width(board: FakeBoard) -> None:
    """Bytes, and what goes beyond the end of the configuration reads as zeros there."""
    Probe().attach(board)
    driver = RingDriver(board)
    config = bytes(Probe.config).ljust(32, b"\0")

    for size in (1, 2, 4, 8):
        for at in range(24):
            assert driver.config(at, size) == int.from_bytes(config[at : at + size], "little")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_hostile_61_any_write_anywhere(driver: RingDriver, size: int) -> None:
    """Each offset of the device, with values that set everything, something and nothing."""
    bus = driver.board.memory_bus
    pages = range(0, span(driver), 0x1000)
    offsets = [page + at for page in pages for at in (*range(0x180), 0xFF8, 0xFFC, 0xFFE, 0xFFF)]

    for at in offsets:
        for value in VALUES:
            bus.write(driver.base + at, size, value & 2 ** (8 * size) - 1)
            bus.read(driver.base + at, size)
        driver.board.steps.turn()

    assert_works(RingDriver(driver.board))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_hostile_61_any_write_anywhere_in_pci_configuration_space(size: int) -> None:
    board = FakeBoard(4 << 20, "pci")
    Echo().attach(board)
    base = RingDriver(board).base

    for at in range(0x1000 - size + 1):
        for value in VALUES:
            board.memory_bus.write(FUNCTION + at, size, value & 2 ** (8 * size) - 1)
            board.memory_bus.read(FUNCTION + at, size)
    board.steps.turn()

    board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, base)
    board.memory_bus.write(FUNCTION + Header.BAR_HIGH_AT, 4, 0)
    assert_works(RingDriver(board))


# 62: registers that are not there, or only in one direction.


def test_hostile_62_read_only_registers_are_not_written(driver: RingDriver) -> None:
    bus = driver.board.memory_bus
    registers = [reg for reg in driver.transport.REGISTERS.values() if reg.offset is not None and not reg.write]
    before = [bus.read(driver.base + int(reg.offset or 0), reg.width or 4) for reg in registers]

    for reg in registers:
        bus.write(driver.base + int(reg.offset or 0), reg.width or 4, 0xFFFFFFFF)

    assert [bus.read(driver.base + int(reg.offset or 0), reg.width or 4) for reg in registers] == before
    assert len(registers) > 3


def test_hostile_62_write_only_registers_read_0() -> None:
    board = FakeBoard()
    Echo().attach(board)
    driver = RingDriver(board)
    names = [name for name, reg in VirtioMmio.REGISTERS.items() if not reg.read]
    driver.prepare(ALL)
    for name in names:
        driver.set(name, 0x55)

    assert [driver.get(name) for name in names] == [0] * len(names)
    assert "QueueSel" in names


def test_hostile_62_registers_that_are_not_there(driver: RingDriver) -> None:
    bus = driver.board.memory_bus
    taken = {int(reg.offset) for reg in driver.transport.REGISTERS.values() if reg.offset is not None}
    free = [at for at in range(0, 0xFC, 4) if not taken & set(range(at, at + 4))]
    before = driver.transport.state()

    for at in free:
        bus.write(driver.base + at, 4, 0xFFFFFFFF)

    assert {bus.read(driver.base + at, 4) for at in free} == {0}
    assert driver.transport.state() == before
    assert len(free) > 20


def test_hostile_62_configuration_of_a_device_without_one(board: FakeBoard) -> None:
    Rng().attach(board)
    driver = RingDriver(board)

    for at in (0, 1, 4, 0xEF1, 0xEF8):
        for size in (1, 2, 4, 8):
            driver.write_config(at, size, 2 ** (8 * size) - 1)
            assert driver.config(at, size) == 0


# 63 and 64: status and features.


def agreeing(driver: RingDriver) -> None:
    """Features that are acceptable, with a status of 0."""
    driver.set("Status", 0)
    for half in (0, 1):
        driver.set("DriverFeaturesSel", half)
        driver.set("DriverFeatures", F.VERSION_1 >> 32 * half & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("writes", "status"),
    [
        ([DRIVER_OK], 0),
        ([DRIVER], 0),
        ([FEATURES_OK], 0),
        ([FEATURES_OK | DRIVER_OK], 0),
        ([ACKNOWLEDGE, FEATURES_OK], ACKNOWLEDGE),
        ([ACKNOWLEDGE, DRIVER_OK], ACKNOWLEDGE),
        ([ACKNOWLEDGE | DRIVER, DRIVER_OK], ACKNOWLEDGE | DRIVER),
        ([ACKNOWLEDGE | DRIVER, FEATURES_OK, FEATURES_OK], ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ([ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK], READY),
        ([READY, ACKNOWLEDGE, DRIVER], READY),
        ([FAILED], FAILED),
        ([FAILED, READY], FAILED | READY & ~DRIVER_OK),
        ([READY, FAILED], READY | FAILED),
        ([READY, 0x30, 0x40], READY),
        ([READY, 0], 0),
    ],
)  # fmt: skip
def test_hostile_63_status_takes_only_legal_steps(
    driver: RingDriver, device: Echo, writes: list[int], status: int
) -> None:
    """3.1.1: each step stands on the one before, none is taken back but by a reset, DRIVER_OK never follows FAILED."""
    agreeing(driver)

    for value in writes:
        driver.set("Status", value)

    assert driver.get("Status") == status
    assert bool(device.queues) == bool(status & DRIVER_OK)


@pytest.mark.parametrize("status", [DRIVER_OK, 0xFF, FAILED, FEATURES_OK, 0x30])
def test_hostile_63_status_before_features_are_agreed_on(driver: RingDriver, device: Echo, status: int) -> None:
    driver.set("Status", status)
    driver.kick(0)

    assert driver.get("Status") == status & FAILED | (status & (ACKNOWLEDGE | DRIVER))
    assert device.queues == ()


def test_hostile_63_steps_in_any_order(driver: RingDriver, device: Echo) -> None:
    """At every moment DRIVER_OK reads back only when all else does, and then the device works."""
    for order in permutations((ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, FAILED)):
        agreeing(driver)
        for value in order:
            driver.set("Status", value)
            status = driver.get("Status")
            assert bool(device.queues) == bool(status & DRIVER_OK)
            assert not status & DRIVER_OK or status & READY == READY

    assert_works(driver)


@pytest.mark.parametrize(
    "features",
    [0, 0xFFFFFFFF, F.VERSION_1 | 1, F.VERSION_1 | 1 << 33, F.VERSION_1 | 1 << 63, 2**64 - 1, ALL & ~F.VERSION_1],
    ids=hex,
)
def test_hostile_64_features_that_were_not_offered(driver: RingDriver, features: int) -> None:
    driver.set("Status", ACKNOWLEDGE | DRIVER)

    driver.accept(features)

    assert driver.get("Status") == ACKNOWLEDGE | DRIVER
    assert_works(driver)


def test_hostile_64_every_feature_alone(each_device: VirtioDevice) -> None:
    """Those that the device has not offered are refused, each for itself."""
    driver = RingDriver(each_device.board)
    offered = each_device.features | ALL
    taken = 0

    for feature in range(64):
        driver.set("Status", 0)
        driver.set("Status", ACKNOWLEDGE | DRIVER)
        driver.accept(F.VERSION_1 | 1 << feature)
        taken |= bool(driver.get("Status") & FEATURES_OK) << feature

    assert not taken & ~offered
    assert taken & ALL == ALL


def test_hostile_64_features_after_features_ok(driver: RingDriver) -> None:
    """Neither before DRIVER_OK nor after it: indirect descriptors stay refused."""
    driver.prepare(F.VERSION_1)
    for value in (0xFFFFFFFF, ALL & 0xFFFFFFFF):
        driver.set("DriverFeaturesSel", 0)
        driver.set("DriverFeatures", value)
        driver.set("Status", driver.get("Status") | FEATURES_OK)
    driver.go()
    driver.set("DriverFeatures", ALL & 0xFFFFFFFF)

    driver.submit(0, [b"x"], indirect=True)
    driver.kick(0)

    assert driver.needs_reset
    assert_works(driver)


# 65 and 66: kicks, interrupts and resets at the wrong time.


def test_hostile_65_kicks_before_and_during_the_setup(driver: RingDriver, device: Echo) -> None:
    for value in (0, ACKNOWLEDGE, DRIVER):
        driver.set("Status", value)
        for number in (0, 1, 5):
            driver.kick(number)
    driver.prepare(ALL)
    driver.submit(0, [b"x"], [1])
    for number in (0, 1, 5):
        driver.kick(number)

    assert (driver.used(0), device.served, driver.pulses) == ([], 0, 0)
    driver.go()
    assert len(driver.used(0)) == 1


def test_hostile_65_kicks_after_a_reset(driver: RingDriver, device: Echo) -> None:
    driver.start(ALL)
    driver.submit(0, [b"x"], [1])
    driver.set("QueueNotify", 0)
    driver.set("Status", 0)
    driver.board.steps.turn()

    driver.kick(0)

    assert (driver.used(0), device.served) == ([], 0)


def test_hostile_65_kick_that_is_on_its_way_into_the_next_life(driver: RingDriver, device: Echo) -> None:
    """A doorbell from before the reset is served after it, which finds nothing wrong."""
    driver.start(ALL)
    driver.set("QueueNotify", 0)
    driver.set("Status", 0)
    driver.prepare(ALL)
    driver.board.steps.turn()
    driver.go()

    assert device.served == 0
    assert driver.request(0, [b"hello"], [5]) == b"hello"


def test_hostile_65_interrupt_that_is_never_acknowledged(driver: RingDriver) -> None:
    """It stays there to be read, and the device goes on."""
    driver.start(F.VERSION_1)

    for _ in range(300):
        assert driver.request(0, [b"hello"], [5]) == b"hello"

    assert driver.pulses == 300
    assert driver.interrupts() == INTERRUPT.USED_BUFFER
    assert driver.interrupts() == 0


def test_hostile_66_ten_thousand_resets(driver: RingDriver, device: Echo) -> None:
    for _ in range(10_000):
        driver.set("Status", ACKNOWLEDGE)
        driver.set("Status", 0)

    assert_works(driver)


def test_hostile_66_resets_of_every_device_with_requests_under_way(each_device: VirtioDevice) -> None:
    driver = RingDriver(each_device.board, free=0x100000)
    for _ in range(50):
        driver.start(F.VERSION_1 | each_device.features, [8] * len(each_device.queue_sizes))
        for index in range(len(driver.queues)):
            driver.submit(index, [bytes(16)], [64])
            driver.set("QueueNotify", index)
        driver.set("Status", 0)

    driver.start(F.VERSION_1 | each_device.features)
    each_device.board.steps.turn()

    assert driver.get("Status") == READY
    assert [driver.used(index) for index in range(len(driver.queues))] == [[]] * len(driver.queues)
    assert len(each_device.board.steps._queue) <= len(driver.queues)


def test_hostile_66_reset_from_within_a_round(board: FakeBoard) -> None:
    """The last moment: the device has taken a chain, and its driver is gone before it comes back."""
    device = Late()
    device.attach(board)
    driver = RingDriver(board)
    driver.start(ALL)
    driver.submit(0, [b"x"], [1])
    driver.kick(0)
    driver.set("Status", 0)
    before = board.mem.read(0, 4 << 20)

    device.finish()

    assert board.mem.read(0, 4 << 20) == before
    assert driver.pulses == 0


class Late(Echo):
    """Gives a chain back much later, and does not hear of resets."""

    def notify(self, index: int, queue: object) -> None:
        self.queue = queue
        self.chains = list(queue.available())  # type: ignore[attr-defined]

    def finish(self) -> None:
        for chain in self.chains:
            self.queue.push(chain)  # type: ignore[attr-defined]
        self.queue.signal()  # type: ignore[attr-defined]
