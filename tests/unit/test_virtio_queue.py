"""Split virtqueues as a driver, well-behaved or not, would use them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.core.buffers import pieces
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.queue import DESC_F, Chain, VirtQueue
from kvmpy.virtio.spec import INTERRUPT, F, Type

ALL = F.VERSION_1 | F.EVENT_IDX | F.INDIRECT_DESC


class Echo(VirtioDevice):
    """Writes back what it reads; while `busy` it leaves everything where it is."""

    type_id = Type.ENTROPY
    queue_sizes = (8, 8)
    busy = False
    served = 0

    def notify(self, index: int, queue: VirtQueue) -> None:
        for chain in queue.available() if not self.busy else ():
            self.served += 1
            chain.write(chain.read())
            queue.push(chain)


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
    driver = RingDriver(board)
    driver.start(ALL)
    return driver


def test_pieces_of_buffers() -> None:
    buffers = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]

    assert [bytes(piece) for piece in pieces(buffers, 2, 3)] == [b"c", b"de"]
    assert pieces(buffers, 7, 3) == []


def test_chain_writes_in_order_and_counts() -> None:
    room = [memoryview(bytearray(2)), memoryview(bytearray(3))]
    chain = Chain(0, [], room)

    assert chain.write(b"abc") == 3
    assert chain.write(b"defg") == 2
    assert (b"".join(room), chain.written) == (b"abcde", 5)


def test_chain_with_a_gap_counts_what_is_whole() -> None:
    chain = Chain(0, [], [memoryview(bytearray(8))])

    chain.write(b"!", at=7)
    before = chain.written
    chain.write(b"abcdefg", at=0)

    assert (before, chain.written) == (0, 7)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    ("readable", "writable"), [([b"hello"], [5]), ([b"h", b"ell", b"", b"o"], [1, 2, 2]), ([b"hello"], [2, 64])]
)
def test_layout_of_descriptors_means_nothing(
    driver: RingDriver, readable: list[bytes], writable: list[int], indirect: bool
) -> None:
    head = driver.submit(0, readable, writable, indirect=indirect)
    driver.kick(0)

    assert driver.used(0) == [(head, 5)]
    assert driver.data(0, head)[:5] == b"hello"


def test_chain_may_end_in_one_indirect_table(driver: RingDriver) -> None:
    ring = driver.queues[0]
    table, text, room = driver.allocate(16, 16), driver.allocate(2, 1), driver.allocate(2, 1)
    driver.board.mem.write(text, b"hi")
    driver.descriptor(ring.desc, 0, text, 2, DESC_F.NEXT, 1)
    driver.descriptor(
        ring.desc, 1, table, 16, DESC_F.INDIRECT | DESC_F.WRITE, 0
    )  # WRITE means nothing here (2.7.5.3.2)
    driver.descriptor(table, 0, room, 2, DESC_F.WRITE, 0)
    driver.publish(0, 0)

    driver.kick(0)

    assert driver.used(0) == [(0, 2)]
    assert driver.board.mem.read(room, 2) == b"hi"


@pytest.mark.parametrize("features", [ALL, F.VERSION_1])
def test_indices_wrap(driver: RingDriver, features: int) -> None:
    driver.start(features, [2, 2])
    text, room = driver.allocate(1, 1), driver.allocate(1, 1)
    driver.descriptor(driver.queues[0].desc, 0, text, 1, DESC_F.NEXT, 1)
    driver.descriptor(driver.queues[0].desc, 1, room, 1, DESC_F.WRITE, 0)

    for _ in range(70_000):
        driver.publish(0, 0)
        driver.transport.core.notify(0)

    assert driver.transport.core.device.served == 70_000
    assert not driver.needs_reset


def test_queue_of_one_entry(driver: RingDriver) -> None:
    driver.start(ALL, [1, 1])

    heads = [driver.submit(0, [b"x"], indirect=True) for _ in range(1)]
    driver.kick(0)

    assert driver.used(0) == [(heads[0], 0)]


def test_interrupt_only_when_the_driver_wants_one(driver: RingDriver) -> None:
    driver.start(F.VERSION_1)
    driver.board.mem.write(driver.queues[0].avail, struct.pack("<H", 1))  # VIRTQ_AVAIL_F_NO_INTERRUPT

    driver.submit(0, [b"x"])
    driver.kick(0)
    silent = driver.interrupts()
    driver.board.mem.write(driver.queues[0].avail, struct.pack("<H", 0))
    driver.submit(0, [b"x"])
    driver.kick(0)

    assert (silent, driver.interrupts()) == (0, INTERRUPT.USED_BUFFER)


def test_interrupt_at_the_used_event(driver: RingDriver) -> None:
    used_event = driver.queues[0].avail + 4 + 2 * driver.queues[0].size
    seen = []
    for wanted in (0, 2, 2, 2):  # behind the entry of this index comes the interrupt
        driver.board.mem.write(used_event, struct.pack("<H", wanted))
        driver.submit(0, [b"x"])
        driver.kick(0)
        seen.append(driver.interrupts())

    assert seen == [INTERRUPT.USED_BUFFER, 0, INTERRUPT.USED_BUFFER, 0]


def test_one_interrupt_for_all_that_was_served(driver: RingDriver) -> None:
    before = driver.pulses
    for _ in range(5):
        driver.submit(0, [b"x"])

    driver.kick(0)

    assert (driver.pulses - before, len(driver.used(0))) == (1, 5)


def test_kick_is_asked_for_where_the_device_stopped(driver: RingDriver) -> None:
    ring = driver.queues[0]
    for _ in range(3):
        driver.submit(0, [b"x"])

    driver.kick(0)

    (avail_event,) = struct.unpack("<H", driver.board.mem.read(ring.used + 4 + 8 * ring.size, 2))
    assert avail_event == 3


def test_nothing_is_lost_without_a_kick(driver: RingDriver, device: Echo) -> None:
    """What is made available while the device looks is served without a second kick."""
    device.busy = True
    driver.submit(0, [b"x"])
    driver.kick(0)
    device.busy = False
    driver.submit(0, [b"y"])

    driver.kick(0)

    assert len(driver.used(0)) == 2


def test_what_is_there_before_the_driver_is_up_is_served_then(driver: RingDriver) -> None:
    driver.set("Status", 0)
    driver.set("Status", 3)
    driver.accept(ALL)
    driver.queues = []
    driver.set("QueueSel", 0)
    driver.add_queue(8)
    head = driver.submit(0, [b"x"], [1])
    driver.kick(0)
    early = driver.used(0)

    driver.set("Status", 15)
    driver.board.steps.turn()

    assert (early, driver.used(0)) == ([], [(head, 1)])


def test_second_cpu_that_never_stops_gets_one_round_at_a_time(driver: RingDriver, device: Echo) -> None:
    for _ in range(8):
        driver.submit(0, [b"x"])
    driver.set("QueueNotify", 0)
    served = []
    for _ in range(3):
        driver.board.steps.turn()
        served.append(device.served)
        for _ in range(8):
            driver.submit(0, [b"x"])

    assert served == [8, 16, 24]


def descriptors(*entries: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    return list(entries)


HOSTILE = {
    "next beyond the table": descriptors((0, 16, DESC_F.NEXT, 8)),
    "next far beyond": descriptors((0, 16, DESC_F.NEXT, 0xFFFF)),
    "loop of one": descriptors((0, 16, DESC_F.NEXT, 0)),
    "loop of two": descriptors((0, 16, DESC_F.NEXT, 1), (0, 16, DESC_F.NEXT, 0)),
    "loop of writable ones": descriptors((0, 16, DESC_F.NEXT | DESC_F.WRITE, 0)),
    "not RAM": descriptors((1 << 40, 16, 0, 0)),
    "end beyond RAM": descriptors(((4 << 20) - 8, 16, 0, 0)),
    "wraps round 2^64": descriptors((2**64 - 8, 16, 0, 0)),
    "as long as can be": descriptors((0, 0xFFFFFFFF, DESC_F.WRITE, 0)),
    "the device's own registers": descriptors((0xD000_0000, 16, DESC_F.WRITE, 0)),
    "readable behind writable": descriptors((0, 4, DESC_F.NEXT | DESC_F.WRITE, 1), (0, 4, 0, 0)),
    "indirect and next": descriptors((0x800, 16, DESC_F.INDIRECT | DESC_F.NEXT, 1), (0, 4, 0, 0)),
    "indirect of no entries": descriptors((0x800, 0, DESC_F.INDIRECT, 0)),
    "indirect of half an entry": descriptors((0x800, 24, DESC_F.INDIRECT, 0)),
    "indirect larger than the queue": descriptors((0x800, 16 * 9, DESC_F.INDIRECT, 0)),
    "indirect of 65536 entries": descriptors((0x800, 16 << 16, DESC_F.INDIRECT, 0)),
    "indirect outside RAM": descriptors((1 << 40, 16, DESC_F.INDIRECT, 0)),
}


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE)
def test_bad_descriptors_need_a_reset(driver: RingDriver, entries: list[tuple[int, int, int, int]]) -> None:
    for n, entry in enumerate(entries):
        driver.descriptor(driver.queues[0].desc, n, *entry)
    driver.publish(0, 0)

    driver.kick(0)

    assert driver.needs_reset
    assert driver.used(0) == []
    assert driver.interrupts() == INTERRUPT.CONFIGURATION
    assert len(driver.board.logs) == 1


def test_after_the_reset_it_works_again(driver: RingDriver) -> None:
    driver.publish(0, 99)
    driver.kick(0)
    failed = driver.needs_reset

    driver.start(ALL)

    assert (failed, driver.needs_reset) == (True, False)
    assert driver.request(0, [b"hello"], [5]) == b"hello"


def test_indirect_table_in_an_indirect_table(driver: RingDriver) -> None:
    driver.descriptor(driver.queues[0].desc, 0, 0x800, 16, DESC_F.INDIRECT, 0)
    driver.descriptor(0x800, 0, 0x900, 16, DESC_F.INDIRECT, 0)
    driver.publish(0, 0)

    driver.kick(0)

    assert driver.needs_reset


def test_indirect_must_be_negotiated(driver: RingDriver) -> None:
    driver.start(F.VERSION_1)
    driver.submit(0, [b"x"], indirect=True)

    driver.kick(0)

    assert driver.needs_reset


@pytest.mark.parametrize("head", [8, 0x100, 0xFFFF])
def test_head_beyond_the_table(driver: RingDriver, head: int) -> None:
    driver.publish(0, head)

    driver.kick(0)

    assert driver.needs_reset


@pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
def test_more_available_than_the_queue_has(driver: RingDriver, index: int) -> None:
    driver.board.mem.write(driver.queues[0].avail + 2, struct.pack("<H", index))

    driver.kick(0)

    assert driver.needs_reset


@pytest.mark.parametrize("size", [0, 3, 16, 0xFFFF, 0xFFFFFFFF])
def test_size_that_cannot_be(driver: RingDriver, size: int) -> None:
    driver.set("Status", 0)
    driver.set("Status", 3)
    driver.accept(ALL)
    driver.set("QueueNum", size)
    driver.set("QueueReady", 1)
    driver.set("Status", 15)

    assert driver.needs_reset


@pytest.mark.parametrize(("register", "address"), [("Desc", 8), ("Driver", 1), ("Device", 2), ("Desc", 1 << 30)])
def test_rings_where_they_cannot_be(driver: RingDriver, register: str, address: int) -> None:
    driver.set("Status", 0)
    driver.set("Status", 3)
    driver.accept(ALL)
    driver.set(f"Queue{register}Low", address)
    driver.set("QueueReady", 1)
    driver.set("Status", 15)

    assert driver.needs_reset


descriptor = st.tuples(
    st.sampled_from([0, 0x1000, 0x8000, (4 << 20) - 16, 4 << 20, 0xD000_0000, 1 << 63]) | st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 16, 48, 4096, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
    st.integers(0, 7) | st.integers(0, 0xFFFF),
    st.integers(0, 9) | st.integers(0, 0xFFFF),
)


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(descriptor, min_size=8, max_size=8),
    inner=st.lists(descriptor, min_size=8, max_size=8),
    heads=st.lists(st.integers(0, 8), min_size=1, max_size=12),
    features=st.sampled_from([ALL, F.VERSION_1]),
)
def test_any_descriptors_are_survived(
    table: list[tuple[int, int, int, int]], inner: list[tuple[int, int, int, int]], heads: list[int], features: int
) -> None:
    """The device answers or needs a reset, after which it answers; it never raises."""
    board = FakeBoard(4 << 20)
    Echo().attach(board)
    driver = RingDriver(board, free=0x200000)
    driver.start(features)
    for n in range(8):
        driver.descriptor(driver.queues[0].desc, n, *table[n])
        driver.descriptor(0x1000, n, *inner[n])
    for head in heads:
        driver.publish(0, head)

    driver.kick(0)
    driver.start(features)

    assert driver.request(0, [b"hello"], [5]) == b"hello"


def test_state_and_restore(driver: RingDriver, device: Echo) -> None:
    driver.request(0, [b"before"], [6])
    device.busy = True
    head = driver.submit(0, [b"after"], [5])
    driver.kick(0)
    state = driver.transport.state()

    driver.set("Status", 0)
    driver.transport.restore(state)
    device.busy = False
    driver.kick(0)

    assert driver.used(0) == [(head, 5)]
    assert driver.data(0, head) == b"after"


@pytest.mark.parametrize(
    "change", [{"queues": []}, {"queues": [{}, {}]}, {"device": {"version": 99}}], ids=["none", "empty", "version"]
)
def test_state_that_is_not_ours(driver: RingDriver, change: dict[str, object]) -> None:
    state = driver.transport.state()
    state["core"] |= change

    with pytest.raises(ValueError):
        driver.transport.restore(state)
