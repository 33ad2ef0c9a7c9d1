"""The balloon device (VIRTIO 1.2, 5.5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from balloons import (
    ALL,
    DEFLATE,
    INFLATE,
    MEMFREE,
    PAGE,
    RAM,
    REPORTING,
    STATS,
    begin,
    fill,
    pages,
    stats,
    zeros,
)

from kvmpy.core.errors import ConfigError, HostError
from kvmpy.core.memory import GuestMemory
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.balloon import BALLOON_F, Balloon, runs
from kvmpy.virtio.spec import INTERRUPT, F


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(RAM, transport)


@pytest.fixture
def device(board: FakeBoard) -> Balloon:
    device = Balloon(stats=10)
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Balloon) -> RingDriver:
    """With the queues that the specification gives these features."""
    driver = RingDriver(board)
    begin(driver, ALL, [INFLATE, DEFLATE, STATS, REPORTING])
    return driver


def test_runs_of_numbers() -> None:
    assert list(runs([5, 4, 9, 3, 4, 10, 7])) == [(3, 3), (7, 1), (9, 2)]
    assert list(runs([0])) == [(0, 1)]
    assert list(runs([])) == []


def test_offers_what_it_was_told_to() -> None:
    assert Balloon(deflate_on_oom=False, reporting=False).features == 0
    assert Balloon().features == BALLOON_F.DEFLATE_ON_OOM | BALLOON_F.PAGE_REPORTING
    assert Balloon(stats=1).features == ALL & ~F.VERSION_1


def test_target_tells_the_driver(driver: RingDriver, device: Balloon) -> None:
    device.target(1 << 20)

    assert driver.config(0, 4) == 256
    assert driver.interrupts() == INTERRUPT.CONFIGURATION
    assert device.actual == 0


def test_target_before_there_is_a_driver(device: Balloon, board: FakeBoard) -> None:
    device.target(1 << 20)

    assert RingDriver(board).config(0, 4) == 256


@pytest.mark.parametrize("size", [-1, RAM + 1, 1 << 64])
def test_target_that_cannot_be(device: Balloon, size: int) -> None:
    with pytest.raises(ConfigError, match="the guest has 4 MiB"):
        device.target(size)


def test_period_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="period -1"):
        Balloon(stats=-1)


def test_list_in_pieces(driver: RingDriver) -> None:
    fill(driver, 512, 3)
    data = pages(512, 514)

    driver.request(INFLATE, [data[:3], data[3:4], data[4:]])

    assert zeros(driver, 512, 3) == [512, 514]


def test_deflating_changes_no_page(driver: RingDriver) -> None:
    fill(driver, 512, 1)

    driver.request(DEFLATE, [pages(512)])

    assert zeros(driver, 512, 1) == []


def test_driver_says_how_large_the_balloon_is(driver: RingDriver, device: Balloon) -> None:
    write_actual(driver, 300)
    told = device.actual
    driver.set("Status", 0)

    assert (told, device.actual) == (300 * PAGE, 0)


def write_actual(driver: RingDriver, pages: int) -> None:
    driver.write_config(4, 4, pages)


# What a hostile guest may try (HOSTILE.md, 54 and 55).


# Statistics.


# Free page reporting, and which queue it has.


def test_reported_pages_are_discarded(driver: RingDriver) -> None:
    fill(driver, 512, 8)
    ring = driver.queues[REPORTING]
    driver.descriptor(ring.desc, 0, 513 * PAGE, 2 * PAGE, 1 | 2, 1)
    driver.descriptor(ring.desc, 1, 517 * PAGE, PAGE, 2, 0)
    driver.publish(REPORTING, 0)

    driver.kick(REPORTING)

    assert zeros(driver, 512, 8) == [513, 514, 517]
    assert driver.used(REPORTING) == [(0, 0)]


@pytest.mark.parametrize(
    ("address", "size", "flags"), [(512 * PAGE, PAGE, 0), (512 * PAGE + 1, PAGE, 2), (512 * PAGE, 0, 2)]
)
def test_reports_of_no_page(driver: RingDriver, address: int, size: int, flags: int) -> None:
    """What the device may only read, no whole page, nothing."""
    fill(driver, 512, 2)
    driver.descriptor(driver.queues[REPORTING].desc, 0, address, size, flags, 0)
    driver.publish(REPORTING, 0)

    driver.kick(REPORTING)

    assert (zeros(driver, 512, 2), driver.used(REPORTING)) == ([], [(0, 0)])


@pytest.mark.parametrize(
    ("features", "queues", "index"),
    [
        (ALL, [0, 1, 2, 4], 4),
        (ALL, [0, 1, 2, 3], 3),
        (ALL & ~BALLOON_F.STATS_VQ, [0, 1, 4], 4),
        (ALL & ~BALLOON_F.STATS_VQ, [0, 1, 2], 2),
    ],
    ids=["specification", "Linux", "specification, no statistics", "Linux, no statistics"],
)
def test_number_of_the_reporting_queue(driver: RingDriver, features: int, queues: list[int], index: int) -> None:
    begin(driver, features, queues)
    fill(driver, 512, 1)
    driver.descriptor(driver.queues[index].desc, 0, 512 * PAGE, PAGE, 2, 0)
    driver.publish(index, 0)

    driver.kick(index)

    assert zeros(driver, 512, 1) == [512]


# State.


def test_state_and_restore(driver: RingDriver, device: Balloon) -> None:
    device.target(1 << 20)
    write_actual(driver, 7)
    head = driver.submit(STATS, [stats((MEMFREE, 1))])
    driver.kick(STATS)
    state = driver.transport.state()

    driver.set("Status", 0)
    device.target(0)
    driver.transport.restore(state)
    driver.board.steps.advance(11)

    assert (driver.config(0, 4), device.actual, device.stats) == (256, 7 * PAGE, {"MEMFREE": 1})
    assert driver.used(STATS) == [(head, 0)]


@pytest.mark.parametrize(
    "change",
    [{"pages": [1]}, {"pages": [-1, 0]}, {"stats": {"MEMFREE": "x"}}, {"outstanding": []}, {"version": 2}],
)
def test_state_that_is_not_ours(device: Balloon, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Balloon"):
        device.restore(device.state() | change)


# Real memory.


@pytest.fixture
def real(board: FakeBoard) -> Iterator[GuestMemory]:
    """The board's RAM as a machine has it, with a hole in its address space."""
    plain, board.mem = board.mem, GuestMemory.allocate([(0, RAM), (1 << 32, RAM)], huge=False)
    yield board.mem
    board.mem.close()
    board.mem = plain


def test_memory_goes_back_to_the_host(real: GuestMemory, board: FakeBoard) -> None:
    device = Balloon()
    device.attach(board)
    driver = RingDriver(board)
    begin(driver, ALL & ~BALLOON_F.STATS_VQ, [0, 1, 2])
    real.write(1 << 32, b"x" * RAM)
    real.write(RAM // 2, b"x" * (RAM // 2))
    high = [(1 << 32) // PAGE + n for n in range(RAM // PAGE)]
    driver.submit(INFLATE, [pages(*high)])
    full = real.resident()

    driver.kick(INFLATE)
    inflated = real.resident()
    driver.descriptor(driver.queues[2].desc, 0, RAM // 2, RAM // 2, 2, 0)
    driver.publish(2, 0)
    driver.kick(2)
    reported = real.resident()
    for queue in driver.transport.core.queues:  # they have windows on the memory
        queue.stop()

    assert (full - inflated, inflated - reported) == (RAM, RAM // 2)
    assert board.logs == []


def test_memory_that_the_host_keeps(driver: RingDriver, board: FakeBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gpa: int, size: int) -> None:
        raise HostError("locked")

    monkeypatch.setattr(board.mem, "discard", refuse)

    answer = driver.request(INFLATE, [pages(512)])

    assert (answer, driver.needs_reset) == (b"", False)
    assert board.logs == [("memory stays with the guest", {"why": "locked"})]


def test_a_target_from_the_start(board: FakeBoard) -> None:
    device = Balloon(target="2M")

    device.attach(board)

    assert struct.unpack("<II", device.config) == ((2 << 20) // PAGE, 0)


def test_a_target_from_the_start_that_cannot_be(board: FakeBoard) -> None:
    with pytest.raises(ConfigError, match="a balloon of 8 MiB does not fit; the guest has 4 MiB"):
        Balloon(target="8M").attach(board)
    with pytest.raises(ConfigError, match='invalid size "much"'):
        Balloon(target="much")
