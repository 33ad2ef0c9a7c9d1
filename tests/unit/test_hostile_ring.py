"""What hostile drivers do to rings and descriptors: rows 1 to 27 of the list of known attacks.

Where a row wants a chain rejected and the rule is one of the ring's own, kvmpy gives nothing back and needs a reset: no
driver comes to break such a rule by chance. Row 26 is about a dirty log, which there is none.
"""

from __future__ import annotations

import struct
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from disks import CONTENT, FEATURES, SECTORS, Connect, Disk
from nics import FRAME, OFFLOADS, Rig
from probe import ALL, Echo
from racing import every_moment, turns

from kvmpy.core.memory import GuestMemory, Region
from kvmpy.testing import MMIO_BASE, PCI_ECAM, PCI_WINDOW, FakeBoard, RingDriver
from kvmpy.virtio.blk import HEADER, SEGMENT, Blk, S, T
from kvmpy.virtio.console import CONSOLE_F, DEVICE_ADD, DEVICE_READY, VirtioConsole
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.net import TX
from kvmpy.virtio.queue import DESC_F, Chain, VirtQueue
from kvmpy.virtio.spec import INTERRUPT, STATUS, F, Type

RAM = 4 << 20
NEXT, WRITE, INDIRECT = int(DESC_F.NEXT), int(DESC_F.WRITE), int(DESC_F.INDIRECT)
TABLE = 0x800  # guest memory that no ring and no buffer of RingDriver's uses
IOAPIC, LAPIC, GAP, HIGH = 0xFEC0_0000, 0xFEE0_0000, 0xD000_0000, 1 << 32

Descriptor = tuple[int, int, int, int]  # address, length, flags, next


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(RAM, transport)


@pytest.fixture
def device(board: FakeBoard) -> Echo:
    device = Echo()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Echo) -> RingDriver:
    driver = RingDriver(board)
    driver.start(ALL)
    return driver


@pytest.fixture(params=["echo", "disk"])
def victim(request: pytest.FixtureRequest, transport: str, path: Path) -> Iterator[RingDriver]:
    """The driver of a plain device, and that of a disk: there may be more than one reader of descriptors."""
    device = Echo() if request.param == "echo" else Blk(path=path, queues=2)
    device.attach(FakeBoard(RAM, transport))
    driver = RingDriver(device.board)
    driver.start(ALL, [8, 8])
    yield driver
    device.close()


def offer(driver: RingDriver, *entries: Descriptor, table: tuple[Descriptor, ...] = ()) -> None:
    """Make a chain of `entries` available whose head is 0, with an indirect `table` at TABLE; kick."""
    for n, entry in enumerate(entries):
        driver.descriptor(driver.queues[0].desc, n, *entry)
    for n, entry in enumerate(table):
        driver.descriptor(TABLE, n, *entry)
    driver.publish(0, 0)
    driver.kick(0)


def avail_index(driver: RingDriver, index: int) -> None:
    """Say that so many chains have been made available so far."""
    driver.board.mem.write(driver.queues[0].avail + 2, struct.pack("<H", index & 0xFFFF))


def assert_refused(driver: RingDriver) -> None:
    """Nothing was given back, the driver is told once, what it does now changes nothing; after a reset all is well."""
    assert driver.needs_reset
    assert driver.interrupts() == INTERRUPT.CONFIGURATION
    for _ in range(3):
        driver.kick(0)
    assert (driver.used(0), driver.interrupts()) == ([], 0)
    assert [event for event, _ in driver.board.logs] == ["virtio device needs a reset"]
    assert_recovers(driver)


def assert_recovers(driver: RingDriver) -> None:
    """A request is answered that means something to a disk as well."""
    driver.start(ALL, [8, 8])
    assert driver.request(0, [HEADER.pack(T.GET_ID, 0, 0)], [21])
    assert not driver.needs_reset


# 1 to 4: indices.


@pytest.mark.parametrize("served", [0, 5])
@pytest.mark.parametrize("ahead", [8 + 1, 0x8000, 0xFFFF])
def test_hostile_01_more_available_than_the_queue_has(victim: RingDriver, served: int, ahead: int) -> None:
    for _ in range(served):
        victim.request(0, [b"x"])
    victim.interrupts()

    avail_index(victim, served + ahead)
    victim.kick(0)

    assert_refused(victim)


@pytest.mark.parametrize("address", [0, 0x1000, RAM - 1])
@pytest.mark.parametrize("flags", [0, WRITE])
def test_hostile_02_only_a_descriptor_of_no_bytes(driver: RingDriver, address: int, flags: int) -> None:
    offer(driver, (address, 0, flags, 0))

    assert driver.used(0) == [(0, 0)]


def test_hostile_02_descriptors_of_no_bytes_between_others(driver: RingDriver) -> None:
    text, room = driver.allocate(2, 1), driver.allocate(2, 1)
    driver.board.mem.write(text, b"hi")

    offer(
        driver,
        (0, 0, NEXT, 1),
        (text, 2, NEXT, 2),
        (text, 0, NEXT, 3),
        (room, 0, NEXT | WRITE, 4),
        (room, 1, NEXT | WRITE, 5),
        (0, 0, NEXT | WRITE, 6),
        (room + 1, 1, WRITE, 0),
    )

    assert driver.used(0) == [(0, 2)]
    assert driver.board.mem.read(room, 2) == b"hi"


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("flags", [NEXT, NEXT | WRITE])
def test_hostile_03_loop_of_one(victim: RingDriver, size: int, flags: int) -> None:
    offer(victim, (0, size, flags, 0))

    assert_refused(victim)


@pytest.mark.parametrize("size", [0, 16])
def test_hostile_03_loop_of_two(victim: RingDriver, size: int) -> None:
    offer(victim, (0, size, NEXT, 1), (0, size, NEXT, 0))

    assert_refused(victim)


@pytest.mark.parametrize("size", [0, 16])
def test_hostile_03_loop_in_an_indirect_table(victim: RingDriver, size: int) -> None:
    offer(victim, (TABLE, 32, INDIRECT, 0), table=((0, size, NEXT, 1), (0, size, NEXT, 0)))

    assert_refused(victim)


@pytest.mark.parametrize("following", [8, 9, 0x8000, 0xFFFF])
def test_hostile_04_next_beyond_the_table(victim: RingDriver, following: int) -> None:
    offer(victim, (0, 16, NEXT, following))

    assert_refused(victim)


@pytest.mark.parametrize("following", [2, 8, 0xFFFF])
def test_hostile_04_next_beyond_the_indirect_table(victim: RingDriver, following: int) -> None:
    offer(victim, (TABLE, 32, INDIRECT, 0), table=((0, 16, NEXT, following), (0, 16, 0, 0), (0, 16, 0, 0)))

    assert_refused(victim)


@pytest.mark.parametrize("head", [8, 0x100, 0xFFFF])
@pytest.mark.parametrize("count", [1, 8])
def test_hostile_04_head_beyond_the_table(victim: RingDriver, head: int, count: int) -> None:
    for _ in range(count):
        victim.publish(0, head)

    victim.kick(0)

    assert_refused(victim)


# 5 to 9: lengths and addresses.


def test_hostile_05_chain_longer_than_the_queue(victim: RingDriver) -> None:
    entries = [(0, 1, NEXT, n + 1) for n in range(4)]

    offer(victim, *entries, (TABLE, 16 * 5, INDIRECT, 0), table=(*entries, (0, 1, 0, 0)))

    assert_refused(victim)


def test_hostile_05_chain_as_long_as_the_queue(driver: RingDriver) -> None:
    entries = [(0, 1, NEXT, n + 1) for n in range(4)]

    offer(driver, *entries, (TABLE, 16 * 4, INDIRECT, 0), table=(*entries[:3], (0, 1, 0, 0)))

    assert driver.used(0) == [(0, 0)]


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize(("address", "size"), [(2**64 - 0x1000, 0x2000), (2**64 - 8, 16), (2**64 - 1, 1)])
def test_hostile_06_end_that_wraps_round(victim: RingDriver, address: int, size: int, flags: int) -> None:
    offer(victim, (address, size, flags, 0))

    assert_refused(victim)


@pytest.fixture(params=["echo", "disk"])
def gappy(request: pytest.FixtureRequest, transport: str, path: Path) -> Iterator[RingDriver]:
    """As `victim`, with RAM that has the holes of a PC: three pieces, one up to 3.25 GiB, one from 4 GiB on."""
    device = Echo() if request.param == "echo" else Blk(path=path, queues=2)
    board = FakeBoard(transport=transport)
    board.mem = GuestMemory(Region(base, memoryview(bytearray(1 << 20))) for base in (0, GAP - (1 << 20), HIGH))
    device.attach(board)
    driver = RingDriver(board)
    driver.start(ALL, [8, 8])
    yield driver
    device.close()


BESIDE = {
    "past the end": ((1 << 20) - 8, 16),
    "past 3.25 GiB": (GAP - 8, 16),
    "in the hole": (GAP, 16),
    "across the hole": (GAP - 16, HIGH - GAP + 32),
    "into RAM from the hole": (HIGH - 8, 16),
    "past all RAM": (HIGH + (1 << 20) - 1, 2),
}


@pytest.mark.parametrize("flags", [0, WRITE, INDIRECT])
@pytest.mark.parametrize(("address", "size"), BESIDE.values(), ids=BESIDE)
def test_hostile_07_buffer_beside_ram(gappy: RingDriver, address: int, size: int, flags: int) -> None:
    offer(gappy, (address, size, flags, 0))

    assert_refused(gappy)


@pytest.mark.parametrize("address", [GAP - 16, GAP, HIGH - 16, HIGH + (1 << 20) - 16, 1 << 40, 2**64 - 16], ids=hex)
@pytest.mark.parametrize("ring", ["Desc", "Driver", "Device"])
def test_hostile_07_ring_beside_ram(gappy: RingDriver, ring: str, address: int) -> None:
    begin(gappy, QueueNum=8, **{**RINGS, ring: address})

    assert_refused(gappy)


def test_hostile_07_rings_at_the_ends_of_ram(gappy: RingDriver) -> None:
    begin(gappy, QueueNum=8, Desc=GAP - 128, Driver=HIGH, Device=HIGH + (1 << 20) - 72)

    assert gappy.get("Status") & STATUS.DRIVER_OK
    assert not gappy.needs_reset


RINGS = {"Desc": 0x1000, "Driver": 0x2000, "Device": 0x3000}


def begin(driver: RingDriver, *, QueueNum: int, QueueReady: int = 1, **rings: int) -> None:
    """As a driver does, with queue 0 set up in this way; rings that are not named stay where a reset leaves them."""
    driver.set("Status", 0)
    driver.set("Status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)
    driver.accept(ALL)
    driver.set("QueueSel", 0)
    driver.set("QueueNum", QueueNum)
    for ring, address in rings.items():
        driver.set(f"Queue{ring}Low", address & 0xFFFFFFFF)
        driver.set(f"Queue{ring}High", address >> 32)
    driver.set("QueueReady", QueueReady)
    driver.go()


@pytest.mark.parametrize("flags", [0, WRITE])
def test_hostile_08_as_long_as_can_be(victim: RingDriver, flags: int) -> None:
    victim.descriptor(victim.queues[0].desc, 0, 0, 0xFFFFFFFF, flags, 0)
    victim.publish(0, 0)
    tracemalloc.start()

    victim.kick(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1 << 20
    assert_refused(victim)


class Taker(Echo):
    """Gives everything back unread."""

    queue_sizes = (512,)

    def notify(self, index: int, queue: VirtQueue) -> None:
        for chain in queue.available():
            queue.push(chain)


@pytest.mark.parametrize(("count", "refused"), [(256, False), (257, True)])
def test_hostile_09_sum_beyond_four_gigabytes(transport: str, count: int, refused: bool) -> None:
    """All of RAM, again and again."""
    board = FakeBoard(16 << 20, transport)
    Taker().attach(board)
    driver = RingDriver(board)
    driver.start(ALL)

    offer(driver, *[(0, 16 << 20, NEXT * (n < count - 1) | WRITE, n + 1) for n in range(count)])

    assert (driver.needs_reset, driver.used(0)) == (refused, [] if refused else [(0, 0)])


# 10 and 11: work without end.


class Holder(Echo):
    """Takes chains and keeps them, as for a host that is slow."""

    def __init__(self) -> None:
        self.held: list[Chain] = []

    def notify(self, index: int, queue: VirtQueue) -> None:
        self.held += queue.available()

    def reset(self) -> None:
        self.held.clear()


@pytest.mark.parametrize("at_once", [1, 8])
def test_hostile_10_more_under_way_than_the_queue_has(board: FakeBoard, at_once: int) -> None:
    """The driver makes the same descriptors available again before they have come back."""
    device = Holder()
    device.attach(board)
    driver = RingDriver(board)
    driver.start(ALL)
    for _ in range(0, 8, at_once):
        for _ in range(at_once):
            driver.publish(0, 0)
        driver.kick(0)
    full = len(device.held), driver.needs_reset

    for _ in range(at_once):
        driver.publish(0, 0)
    driver.kick(0)

    assert full == (8, False)
    assert len(device.held) == 8
    assert driver.needs_reset


class Endless(Echo):
    """While it works, another CPU makes as much available again."""

    driver: RingDriver

    def notify(self, index: int, queue: VirtQueue) -> None:
        for chain in queue.available():
            self.served += 1
            queue.push(chain)
            self.driver.publish(0, 0)


def test_hostile_11_second_cpu_adds_what_the_device_takes(board: FakeBoard) -> None:
    """One round of the queue and one interrupt each time; other callbacks of the event loop come in between."""
    device = Endless()
    device.attach(board)
    device.driver = driver = RingDriver(board)
    driver.start(F.VERSION_1)
    for _ in range(8):
        driver.publish(0, 0)
    driver.set("QueueNotify", 0)
    rounds = []

    for _ in range(3):
        board.steps.call_soon(lambda: rounds.append((device.served, driver.pulses)))
        board.steps.turn()

    assert rounds == [(8, 1), (16, 2), (24, 3)]


def test_hostile_11_many_kicks_are_one(driver: RingDriver, device: Echo) -> None:
    for _ in range(8):
        driver.publish(0, 0)
    for _ in range(1000):
        driver.set("QueueNotify", 0)

    driver.board.steps.turn()
    served = device.served
    driver.board.steps.turn()

    assert (served, device.served) == (8, 8)
    assert not driver.board.steps._queue


# 12 to 15: indirect tables.


@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 16 * 9, 16 * 65535, 16 << 16, 0xFFFFFFF0])
def test_hostile_12_size_of_an_indirect_table(victim: RingDriver, size: int) -> None:
    offer(victim, (TABLE, size, INDIRECT, 0), table=((0, 1, 0, 0),))

    assert_refused(victim)


def test_hostile_13_indirect_in_an_indirect_table(victim: RingDriver) -> None:
    offer(victim, (TABLE, 16, INDIRECT, 0), table=((TABLE + 32, 16, INDIRECT, 0),))

    assert_refused(victim)


def test_hostile_13_indirect_table_in_itself(victim: RingDriver) -> None:
    offer(victim, (TABLE, 16, INDIRECT, 0), table=((TABLE, 16, INDIRECT, 0),))

    assert_refused(victim)


@pytest.mark.parametrize("second", [0, INDIRECT])
def test_hostile_13_indirect_and_next(victim: RingDriver, second: int) -> None:
    offer(victim, (TABLE, 16, INDIRECT | NEXT, 1), (TABLE, 16, second, 0), table=((0, 1, 0, 0),))

    assert_refused(victim)


def test_hostile_13_chain_that_ends_in_one_indirect_table_is_served(driver: RingDriver) -> None:
    room = driver.allocate(2, 1)
    driver.board.mem.write(0x700, b"hi")

    offer(driver, (0x700, 2, NEXT, 1), (TABLE, 16, INDIRECT, 0), table=((room, 2, WRITE, 0),))

    assert driver.used(0) == [(0, 2)]
    assert driver.board.mem.read(room, 2) == b"hi"


def test_hostile_14_indirect_that_was_not_negotiated(victim: RingDriver) -> None:
    victim.start(F.VERSION_1, [8, 8])

    offer(victim, (TABLE, 16, INDIRECT, 0), table=((0, 1, 0, 0),))

    assert_refused(victim)


def test_hostile_15_write_means_nothing_beside_indirect(driver: RingDriver) -> None:
    room = driver.allocate(2, 1)
    driver.board.mem.write(0x700, b"hi")

    offer(driver, (TABLE, 32, INDIRECT | WRITE, 0), table=((0x700, 2, NEXT, 1), (room, 2, WRITE, 0)))

    assert driver.used(0) == [(0, 2)]
    assert driver.board.mem.read(room, 2) == b"hi"


# 16 to 19: registers and places of the queues.


@pytest.mark.parametrize(
    ("register", "value"),
    [
        ("QueueNum", 0), ("QueueNum", 1), ("QueueNum", 0xFFFF), ("QueueDescLow", 0x12340), ("QueueDescHigh", 1),
        ("QueueDriverLow", 0x12340), ("QueueDriverHigh", 0xFFFFFFFF), ("QueueDeviceLow", 0), ("QueueDeviceHigh", 1),
    ],
)  # fmt: skip
def test_hostile_16_queue_changes_while_the_driver_is_up(driver: RingDriver, register: str, value: int) -> None:
    """Ignored, and logged (how often, is limited by the log: see test_log.py)."""
    before = driver.transport.core.state()
    driver.set("QueueSel", 0)

    driver.set(register, value)

    assert driver.transport.core.state() == before
    assert driver.board.logs == [("a queue is set up too late", {"device": "Echo", "queue": 0})]
    for _ in range(20):
        assert driver.request(0, [b"hello"], [5]) == b"hello"


@pytest.mark.parametrize("value", [1, 2, 0xFFFF])
def test_hostile_16_queue_is_enabled_while_the_driver_is_up(driver: RingDriver, device: Echo, value: int) -> None:
    """One that is enabled already, and one that was left out."""
    driver.prepare(ALL)
    driver.set("QueueSel", 1)
    driver.set("QueueReady", 0)
    driver.go()

    driver.set("QueueReady", value)
    driver.publish(1, 0)
    driver.kick(1)

    assert (driver.get("QueueReady"), device.served) == (0, 0)
    assert driver.request(0, [b"hello"], [5]) == b"hello"
    driver.set("QueueSel", 0)
    driver.set("QueueReady", 1)
    assert driver.request(0, [b"hello"], [5]) == b"hello"


@pytest.mark.parametrize("size", [0, 3, 7, 9, 512, 0x8000, 0xFFFF, 0xFFFFFFFF])
def test_hostile_17_size_that_cannot_be(victim: RingDriver, size: int) -> None:
    begin(victim, QueueNum=size, **RINGS)

    assert_refused(victim)


@pytest.mark.parametrize("named", [(), ("Desc", "Driver"), ("Desc", "Device"), ("Driver", "Device")])
def test_hostile_17_queue_without_addresses(victim: RingDriver, named: tuple[str, ...]) -> None:
    begin(victim, QueueNum=8, **{ring: RINGS[ring] for ring in named})

    assert_refused(victim)


@pytest.mark.parametrize("ready", [2, 0x80000000, 0xFFFFFFFE])
def test_hostile_17_ready_is_neither_0_nor_1(driver: RingDriver, device: Echo, ready: int) -> None:
    begin(driver, QueueNum=8, QueueReady=ready, **RINGS)
    driver.board.mem.write(RINGS["Driver"], struct.pack("<HHH", 0, 1, 0))

    driver.kick(0)

    assert (driver.get("QueueReady"), device.served) == (0, 0)
    assert_recovers(driver)


@pytest.mark.parametrize("number", [2, 5, 0xFFFF, 0x80000000, 0xFFFFFFFF])
def test_hostile_18_kick_of_a_queue_that_is_not_there(driver: RingDriver, device: Echo, number: int) -> None:
    driver.publish(0, 0)

    driver.set("QueueNotify", number)

    assert not driver.board.steps._queue
    assert device.served == 0


@pytest.mark.parametrize("number", [2, 5, 0x7FFF, 0xFFFF])
def test_hostile_18_registers_of_a_queue_that_is_not_there(driver: RingDriver, number: int) -> None:
    driver.set("Status", 0)
    driver.set("Status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)
    before = driver.transport.core.state()
    driver.set("QueueSel", number)

    for ring in ("Desc", "Driver", "Device"):
        driver.set(f"Queue{ring}Low", 0x1000)
        driver.set(f"Queue{ring}High", 0xFFFFFFFF)
    driver.set("QueueNum", 8)
    driver.set("QueueReady", 1)

    names = ("QueueNumMax", "QueueReady", "QueueDescLow", "QueueDriverHigh", "QueueDeviceLow")
    assert [driver.get(name) for name in names] == [0] * 5
    assert driver.transport.core.state() == before


@pytest.mark.parametrize(
    ("ring", "address"),
    [("Desc", 0x1008), ("Desc", 0x1001), ("Driver", 0x2001), ("Device", 0x3002), ("Device", 0x3001)],
)
def test_hostile_19_ring_out_of_alignment(victim: RingDriver, ring: str, address: int) -> None:
    begin(victim, QueueNum=8, **{**RINGS, ring: address})

    assert_refused(victim)


OVERLAPS = {
    "all in one place": {"Desc": 0x1000, "Driver": 0x1000, "Device": 0x1000},
    "used over available": {"Desc": 0x1000, "Driver": 0x2000, "Device": 0x2000},
    "used over descriptors": {"Desc": 0x1000, "Driver": 0x2000, "Device": 0x1004},
    "available over descriptors": {"Desc": 0x1000, "Driver": 0x1040, "Device": 0x3000},
}


@pytest.mark.parametrize("rings", OVERLAPS.values(), ids=OVERLAPS)
def test_hostile_19_rings_over_each_other(driver: RingDriver, rings: dict[str, int]) -> None:
    """The device reads what it has written itself."""
    begin(driver, QueueNum=8, **rings)

    for index in range(1, 40):
        driver.board.mem.write(rings["Driver"] + 2, struct.pack("<H", index))
        driver.kick(0)

    assert_recovers(driver)


@pytest.mark.parametrize("ring", ["desc", "avail", "used"])
@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\xff"])
def test_hostile_19_ring_as_a_buffer(driver: RingDriver, ring: str, fill: bytes) -> None:
    """The device writes over the ring that it works with."""
    address = getattr(driver.queues[0], ring)
    driver.board.mem.write(0x700, fill * 64)
    for n in range(8):
        driver.descriptor(driver.queues[0].desc, n, 0x700, 64, NEXT, (n + 1) % 8)
    driver.descriptor(driver.queues[0].desc, 1, address, 64, WRITE, 0)

    for _ in range(8):
        driver.publish(0, 0)
        driver.kick(0)

    assert_recovers(driver)


def test_hostile_19_ring_as_an_indirect_table(victim: RingDriver) -> None:
    offer(victim, (victim.queues[0].desc, 16, INDIRECT, 0))

    assert_refused(victim)


# 20: another CPU changes memory while the device works, at each moment. What is read once has two answers: up to the
# moment of the reading that to the new value, from there on that to the old one, and never one to a mixture.

GOOD = (0x700, 4, NEXT, 1)
Answer = tuple[bool, list[tuple[int, int]], bytes]  # whether it needs a reset, the used ring, what was written
REFUSED: Answer = (True, [], bytes(4))
SERVED: Answer = (False, [(0, 4)], b"good")
EMPTY: Answer = (False, [(0, 0)], bytes(4))  # a request without room
SHORT: Answer = (False, [(0, 2)], b"ev\0\0")
FLIPS: dict[str, tuple[int, Descriptor, Answer]] = {
    "address": (0, (1 << 40, 4, NEXT, 1), REFUSED),
    "address that wraps round": (0, (2**64 - 2, 4, NEXT, 1), REFUSED),
    "length": (0, (0x700, 0xFFFFFFFF, NEXT, 1), REFUSED),
    "address and length": (0, (0x680, 2, NEXT, 1), SHORT),
    "next": (0, (0x700, 4, NEXT, 0xFFFF), REFUSED),
    "flags and next": (0, (0x700, 4, 0, 0xFFFF), EMPTY),
    "loop": (0, (0x700, 4, NEXT, 0), REFUSED),
    "indirect of no size": (0, (0x700, 4, INDIRECT, 1), REFUSED),
    "second address": (1, (1 << 40, 4, WRITE, 0), REFUSED),
    "second length": (1, (0x600, 0xFFFFFFFF, WRITE, 0), REFUSED),
    "second flags and length": (1, (0x680, 2, 0, 0), EMPTY),
}


def ready(driver: RingDriver, *table: Descriptor) -> None:
    """A driver whose next kick is for four bytes and room for four, in an indirect `table` if there is one."""
    driver.start(ALL)
    driver.board.mem.write(0x700, b"good")
    driver.board.mem.write(0x680, b"evil")
    driver.board.mem.write(0x600, bytes(4))
    first = (TABLE, 32, INDIRECT, 0) if table else GOOD
    for n, entry in enumerate((first, (0x600, 4, WRITE, 0))):
        driver.descriptor(driver.queues[0].desc, n, *entry)
    for n, entry in enumerate(table):
        driver.descriptor(TABLE, n, *entry)
    driver.descriptor(OTHER_TABLE, 0, 0x680, 2, 0, 0)
    driver.publish(0, 0)


def answer(driver: RingDriver) -> Answer:
    return driver.needs_reset, driver.used(0), driver.board.mem.read(0x600, 4)


@pytest.mark.parametrize(("number", "entry", "new"), FLIPS.values(), ids=FLIPS)
def test_hostile_20_descriptor_is_read_once(driver: RingDriver, number: int, entry: Descriptor, new: Answer) -> None:
    moments = every_moment(
        lambda: ready(driver),
        lambda: driver.kick(0),
        lambda: driver.descriptor(driver.queues[0].desc, number, *entry),
        "virtio/queue.py",
    )

    answers = [answer(driver) for _ in moments]

    assert turns(answers) == [new, SERVED]


OTHER_TABLE = TABLE + 0x40
INDIRECT_FLIPS: dict[str, tuple[bool, Descriptor, Answer]] = {
    "half an entry": (False, (TABLE, 24, INDIRECT, 0), REFUSED),
    "too long": (False, (TABLE, 16 << 16, INDIRECT, 0), REFUSED),
    "too short": (False, (TABLE, 16, INDIRECT, 0), REFUSED),
    "outside RAM": (False, (1 << 40, 32, INDIRECT, 0), REFUSED),
    "and next": (False, (TABLE, 32, INDIRECT | NEXT, 0), REFUSED),
    "address and length": (False, (OTHER_TABLE, 16, INDIRECT, 0), EMPTY),
    "no table": (False, (0x680, 2, 0, 0xFFFF), EMPTY),
    "address in it": (True, (1 << 40, 4, NEXT, 1), REFUSED),
    "loop in it": (True, (0x700, 4, NEXT, 0), REFUSED),
    "table in it": (True, (TABLE, 16, INDIRECT, 0), REFUSED),
    "address and length in it": (True, (0x680, 2, NEXT, 1), SHORT),
    "flags and next in it": (True, (0x700, 4, 0, 0xFFFF), EMPTY),
}


@pytest.mark.parametrize(("inside", "entry", "new"), INDIRECT_FLIPS.values(), ids=INDIRECT_FLIPS)
def test_hostile_20_indirect_table_is_read_once(
    driver: RingDriver, inside: bool, entry: Descriptor, new: Answer
) -> None:
    moments = every_moment(
        lambda: ready(driver, GOOD, (0x600, 4, WRITE, 0)),
        lambda: driver.kick(0),
        lambda: driver.descriptor(TABLE if inside else driver.queues[0].desc, 0, *entry),
        "virtio/queue.py",
    )

    answers = [answer(driver) for _ in moments]

    assert turns(answers) == [new, SERVED]


def test_hostile_20_available_index_changes_while_it_is_read(driver: RingDriver) -> None:
    """It may be read more than once, since the device has to look again; no reading trusts an earlier one."""
    moments = every_moment(
        lambda: ready(driver),
        lambda: driver.kick(0),
        lambda: avail_index(driver, 0x8000),
        "virtio/queue.py",
    )

    for _ in moments:
        assert driver.used(0) in ([], [(0, 4)])

    assert_recovers(driver)


class Requests:
    """The same request to a disk, again and again, whose first bytes are at a fixed place."""

    def __init__(self, disk: Disk, good: bytes, data: Sequence[bytes] = (), room: Sequence[int] = ()) -> None:
        self.disk, self.good = disk, good
        driver = disk.driver
        self.place = driver.allocate(len(good), 1)
        parts = [(self.place, len(good), 0)]
        parts += [(driver.allocate(len(piece), 1), len(piece), 0) for piece in data]
        parts += [(driver.allocate(size, 1), size, WRITE) for size in [*room, 1]]
        last = len(parts) - 1
        self.chain = [(*part[:2], part[2] | NEXT * (n < last), n + 1) for n, part in enumerate(parts)]
        self.status = parts[-1][0]

    def prepare(self) -> None:
        self.disk.driver.start(FEATURES)
        self.disk.board.mem.write(self.place, self.good)
        for n, entry in enumerate(self.chain):
            self.disk.driver.descriptor(self.disk.driver.queues[0].desc, n, *entry)
        self.disk.driver.publish(0, 0)

    def act(self) -> None:
        self.disk.driver.set("QueueNotify", 0)
        self.disk.board.steps.turn()

    def answers(self, evil: bytes, path: Path) -> list[tuple[int, bool]]:
        """(status, whether the image has changed), in the order in which they change with the moment."""

        def prepare() -> None:
            path.write_bytes(CONTENT)
            self.prepare()

        found = []
        change = lambda: self.disk.board.mem.write(self.place, evil)  # noqa: E731
        for _ in every_moment(prepare, self.act, change, "virtio/blk.py"):
            found.append((self.disk.board.mem.read(self.status, 1)[0], path.read_bytes() != CONTENT))
        return turns(found)


@pytest.mark.parametrize(
    ("evil", "refused"),
    [
        (HEADER.pack(T.OUT, 0, 2**55), S.IOERR),
        (HEADER.pack(T.OUT, 0, SECTORS), S.IOERR),
        (HEADER.pack(T.IN, 0, 7), S.IOERR),
        (HEADER.pack(99, 0, 7), S.UNSUPP),
    ],
    ids=["sector that wraps round", "sector behind the end", "direction", "type"],
)
def test_hostile_20_header_of_a_disk_is_read_once(connect: Connect, path: Path, evil: bytes, refused: int) -> None:
    requests = Requests(connect(), HEADER.pack(T.OUT, 0, 7), [bytes(512)])

    assert requests.answers(evil, path) == [(refused, False), (S.OK, True)]


@pytest.mark.parametrize(
    ("evil", "refused"),
    [((2**55, 8, 0), S.IOERR), ((8, SECTORS, 0), S.IOERR), ((8, 0, 0), S.IOERR), ((8, 8, 2), S.UNSUPP)],
    ids=["sector", "too many", "none", "flags"],
)
def test_hostile_20_ranges_of_a_disk_are_read_once(
    connect: Connect, path: Path, evil: tuple[int, int, int], refused: int
) -> None:
    header = HEADER.pack(T.WRITE_ZEROES, 0, 0)
    requests = Requests(connect(), header + SEGMENT.pack(8, 8, 0))

    assert requests.answers(header + SEGMENT.pack(*evil), path) == [(refused, False), (S.OK, True)]


def test_hostile_20_header_of_a_frame_is_read_once(tap: Rig) -> None:
    good = struct.pack("<BBHHHHH", 1, 1, 54, 1460, 34, 16, 0)
    evil = struct.pack("<BBHHHHH", 1, 1, 54, 1460, 0xFFFF, 16, 0)
    place = tap.driver.allocate(72, 1)
    answers = []

    def prepare() -> None:
        tap.start(OFFLOADS)
        tap.net.tap.sent.clear()
        tap.board.mem.write(place, good + bytes(60))
        tap.driver.descriptor(tap.driver.queues[TX].desc, 0, place, 72, 0, 0)
        tap.driver.publish(TX, 0)

    change = lambda: tap.board.mem.write(place, evil)  # noqa: E731
    for _ in every_moment(prepare, lambda: tap.driver.kick(TX), change, "virtio/net.py"):
        assert tap.driver.used(TX) == [(0, 0)]
        answers.append([sent[:12] for sent in tap.net.tap.sent])

    assert turns(answers) == [[], [good]]


# 21 to 25: errors, addresses of devices, what was not agreed on.


def test_hostile_21_nothing_of_a_broken_chain_is_done(disk: Disk, path: Path) -> None:
    """A whole request to write, but for the end of its chain."""
    disk.read(0, 1)
    head = disk.submit(T.OUT, 3, [bytes(512)])
    before = disk.board.mem.read(0, 16 << 20)
    disk.driver.descriptor(disk.driver.queues[0].desc, head + 2, disk.driver.allocate(1, 1), 1, WRITE | NEXT, 0xFFFF)
    changed = disk.board.mem.read(0, 16 << 20)

    disk.driver.kick(0)

    assert disk.driver.needs_reset
    assert (disk.driver.used(0), path.read_bytes()) == ([], CONTENT)
    assert changed != before
    assert disk.board.mem.read(0, 16 << 20) == changed


def test_hostile_21_each_device_gives_nothing_back(each_device: VirtioDevice) -> None:
    """A broken chain behind a good one; and what the device knew of the good one is forgotten with the reset."""
    driver = RingDriver(each_device.board)
    for queue in WORKING[each_device.type_id]:
        driver.start(F.VERSION_1 | each_device.features)
        driver.descriptor(driver.queues[queue].desc, 0, 0x700, 1, 0, 0)
        driver.descriptor(driver.queues[queue].desc, 1, 0x700, 1, NEXT, 1)
        driver.publish(queue, 0)
        driver.publish(queue, 1)

        driver.kick(queue)

        assert driver.needs_reset
        assert driver.used(queue) == [(0, 0)]


# Queues in which a device takes a chain of one byte that it may only read.
WORKING = {
    Type.BLOCK: (0, 1),
    Type.NET: (0, 1),
    Type.ENTROPY: (0,),
    Type.BALLOON: (0, 1, 3, 4),
    Type.CONSOLE: (1, 3),
    Type.VSOCK: (1,),
    Type.FS: (0, 1),
}


def test_hostile_22_every_head_comes_back(each_device: VirtioDevice) -> None:
    """Ten rounds of chains that are too short for anything; no memory is kept."""
    driver = RingDriver(each_device.board)
    for queue in WORKING[each_device.type_id]:
        driver.start(F.VERSION_1 | each_device.features)
        size = driver.queues[queue].size
        for head in range(size):
            driver.descriptor(driver.queues[queue].desc, head, 0x700, 1, 0, 0)
        tracemalloc.start()
        kept = []
        for _ in range(10):
            for head in range(size):
                driver.publish(queue, head)
            for _ in range(4):
                driver.kick(queue)
            assert driver.used(queue) == [(head, 0) for head in range(size)]
            kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()

        assert not driver.needs_reset
        assert kept[-1] < kept[1] + 4096 + 32 * size  # Python keeps some small tuples; eight rounds would show


class Mine:
    """Something on a bus that nobody may touch."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("read by a device")

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError("written by a device")


@pytest.mark.parametrize("flags", [0, WRITE, INDIRECT])
@pytest.mark.parametrize(
    "address",
    [MMIO_BASE, MMIO_BASE + 0x50, MMIO_BASE + 0x9000, PCI_WINDOW.start, PCI_ECAM, IOAPIC, LAPIC, 0xFFFFFFF0],
    ids=hex,
)
def test_hostile_23_address_of_a_device(victim: RingDriver, address: int, flags: int) -> None:
    """The device's own registers, another's, the APICs: a device only ever reaches RAM."""
    for base in (MMIO_BASE + 0x9000, IOAPIC, LAPIC):
        victim.board.memory_bus.add(base, 0x1000, Mine())

    offer(victim, (address, 16, flags, 0))

    assert_refused(victim)


def test_hostile_23_rings_over_its_own_registers(victim: RingDriver) -> None:
    begin(victim, QueueNum=8, **RINGS | {"Device": victim.base})

    assert_refused(victim)


@pytest.mark.parametrize("back", [1, 3])
def test_hostile_24_available_index_goes_back(victim: RingDriver, back: int) -> None:
    for _ in range(3):
        victim.request(0, [b"x"])
    victim.interrupts()

    avail_index(victim, 3 - back)
    victim.kick(0)

    assert_refused(victim)


def test_hostile_24_available_index_goes_back_over_zero(victim: RingDriver) -> None:
    avail_index(victim, -1)
    victim.kick(0)

    assert_refused(victim)


def test_hostile_25_packed_ring_is_not_offered(each_device: VirtioDevice) -> None:
    driver = RingDriver(each_device.board)
    packed = 1 << 34
    driver.set("DeviceFeaturesSel", 1)
    offered = driver.get("DeviceFeatures") << 32
    driver.set("Status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)

    driver.accept(F.VERSION_1 | packed)
    driver.go()

    assert not offered & packed
    assert driver.get("Status") == STATUS.ACKNOWLEDGE | STATUS.DRIVER


# 27: headers in pieces.


def in_pieces(data: bytes, count: int) -> list[bytes]:
    """`data` cut into `count` pieces, all but the last one byte each."""
    return [data[n : n + 1] for n in range(count - 1)] + [data[count - 1 :]]


@pytest.mark.parametrize("count", range(2, 18))
def test_hostile_27_header_of_a_disk_in_pieces(disk: Disk, count: int) -> None:
    head = disk.driver.submit(0, in_pieces(HEADER.pack(T.IN, 0, 7), count), [512, 1])

    assert disk.finish(head) == (S.OK, CONTENT[7 * 512 : 8 * 512], 513)


@pytest.mark.parametrize("count", range(2, 18))
def test_hostile_27_header_of_a_frame_in_pieces(tap: Rig, count: int) -> None:
    data = struct.pack("<BBHHHHH", 1, 1, 54, 1460, 34, 16, 0) + FRAME

    head = tap.send(*in_pieces(data, count))

    assert (tap.driver.used(TX), tap.net.tap.sent) == ([(head, 0)], [data])


@pytest.mark.parametrize("count", range(2, 9))
def test_hostile_27_control_message_in_pieces(board: FakeBoard, count: int) -> None:
    VirtioConsole(ports=2).attach(board)
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | CONSOLE_F.MULTIPORT)

    driver.request(3, in_pieces(struct.pack("<IHH", 0, DEVICE_READY, 1), count))

    assert driver.request(2, writable=[1] * 8) == struct.pack("<IHH", 0, DEVICE_ADD, 1)
