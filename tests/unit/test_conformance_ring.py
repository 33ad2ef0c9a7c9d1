"""Split virtqueues as the specification has them (VIRTIO 1.2, 2.7): what devices get wrong most, points 10 to 13."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import pytest
from disks import CONTENT, Connect, Disk
from nics import FRAME, PLAIN, Rig
from probe import ALL, Echo
from racing import every_moment

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.blk import HEADER, S, T
from kvmpy.virtio.net import TX
from kvmpy.virtio.queue import DESC_F, Chain, VirtQueue
from kvmpy.virtio.spec import INTERRUPT, F

RAM = 4 << 20
NEXT, WRITE, INDIRECT = int(DESC_F.NEXT), int(DESC_F.WRITE), int(DESC_F.INDIRECT)


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


def word(driver: RingDriver, address: int) -> int:
    return int.from_bytes(driver.board.mem.read(address, 2), "little")


def put_word(driver: RingDriver, address: int, value: int) -> None:
    driver.board.mem.write(address, struct.pack("<H", value & 0xFFFF))


def used_event(driver: RingDriver) -> int:
    """Address of used_event, behind the available ring of queue 0 (2.7.6)."""
    return driver.queues[0].avail + 4 + 2 * driver.queues[0].size


def avail_event(driver: RingDriver) -> int:
    """avail_event, behind the used ring of queue 0 (2.7.8)."""
    return word(driver, driver.queues[0].used + 4 + 8 * driver.queues[0].size)


# 10: the layout of descriptors means nothing.


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([b"hello"], [5]), ([b"h", b"ell", b"", b"o"], [1, 2, 2]), ([b"hello"], [2, 64]), ([b"", b"hello"], [0, 5, 0]),
        ([b"h", b"e", b"l", b"lo"], [1, 1, 1, 2]),
    ],
)  # fmt: skip
def test_conformance_10_any_layout(
    driver: RingDriver, readable: list[bytes], writable: list[int], indirect: bool
) -> None:
    """2.7.4: a device makes no assumptions about how a request is cut into descriptors; 2.7.5: some may be empty."""
    head = driver.submit(0, readable, writable, indirect=indirect)
    driver.kick(0)

    assert driver.used(0) == [(head, 5)]
    assert driver.data(0, head)[:5] == b"hello"


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
@pytest.mark.parametrize("direct", [0, 1, 3])
def test_conformance_10_chain_ends_in_an_indirect_table(driver: RingDriver, direct: int, flags: int) -> None:
    """2.7.5.3.1: descriptors may come before the one that names the table; 2.7.5.3.2: its WRITE flag is ignored."""
    ring = driver.queues[0]
    table, text, room = driver.allocate(32, 16), driver.allocate(5, 1), driver.allocate(5, 1)
    driver.board.mem.write(text, b"hello")
    for n in range(direct):
        driver.descriptor(ring.desc, n, text + n, 1, NEXT, n + 1)
    driver.descriptor(ring.desc, direct, table, 32, flags, 0)
    driver.descriptor(table, 0, text + direct, 5 - direct, NEXT, 1)
    driver.descriptor(table, 1, room, 5, WRITE, 0)
    driver.publish(0, 0)

    driver.kick(0)

    assert driver.used(0) == [(0, 5)]
    assert driver.board.mem.read(room, 5) == b"hello"


def test_conformance_10_descriptors_in_any_order(driver: RingDriver) -> None:
    """2.7.5: `next` leads anywhere in the table, in an indirect one as well."""
    text, room, table = driver.allocate(2, 1), driver.allocate(2, 1), driver.allocate(64, 16)
    driver.board.mem.write(text, b"hi")
    for where in (driver.queues[0].desc, table):
        driver.descriptor(where, 0, text, 1, NEXT, 3)
        driver.descriptor(where, 3, text + 1, 1, NEXT, 1)
        driver.descriptor(where, 1, room, 1, NEXT | WRITE, 2)
        driver.descriptor(where, 2, room + 1, 1, WRITE, 0)
    driver.descriptor(driver.queues[0].desc, 7, table, 64, INDIRECT, 0)

    for head in (0, 7):
        driver.board.mem.write(room, bytes(2))
        driver.publish(0, head)
        driver.kick(0)
        assert driver.used(0) == [(head, 2)]
        assert driver.board.mem.read(room, 2) == b"hi"


@pytest.mark.parametrize("cut", [[1, 15, 0, 500, 12, 1000, 24], [16, 1536], [17, 1535], [1552], [8] * 194])
@pytest.mark.parametrize("indirect", [False, True])
def test_conformance_10_disk_is_written_with_any_layout(disk: Disk, cut: list[int], indirect: bool) -> None:
    """2.7.4 and 5.2.6: header and data may be cut and joined at will."""
    data = bytes(range(256)) * 6
    stream = HEADER.pack(T.OUT, 0, 9) + data
    ends = [sum(cut[: n + 1]) for n in range(len(cut))]

    head = disk.driver.submit(
        0, [stream[end - n : end] for end, n in zip(ends, cut, strict=True)], [1], indirect=indirect
    )

    assert disk.finish(head)[0] == S.OK
    assert disk.read(9, 3) == data


@pytest.mark.parametrize("room", [[1537], [512, 1025], [1536, 1], [1, 0, 511, 1024, 1], [1536, 0, 1, 0]])
def test_conformance_10_disk_is_read_with_any_layout(disk: Disk, room: list[int]) -> None:
    """2.7.4 and 5.2.6: data and status as well."""
    head = disk.driver.submit(0, [HEADER.pack(T.IN, 0, 9)], room)

    assert disk.finish(head) == (S.OK, CONTENT[9 * 512 : 12 * 512], 1537)


# 11: what the used ring says.


def test_conformance_11_used_length_is_what_was_written(driver: RingDriver) -> None:
    """2.7.8.2: neither what was read nor what there was room for."""
    heads = [
        driver.submit(0, [b"hello"]),
        driver.submit(0, [b"hello"], [64]),
        driver.submit(0, [b"hello"], [3]),
    ]

    driver.kick(0)

    assert driver.used(0) == [(heads[0], 0), (heads[1], 5), (heads[2], 3)]


def test_conformance_11_used_length_of_disk_requests(disk: Disk) -> None:
    """2.7.8.2: a read counts its data, all count their status; what is behind a gap does not count."""
    lengths = [
        disk.request(T.IN, 0, room=[1024])[2],
        disk.request(T.OUT, 0, [bytes(512)])[2],
        disk.request(T.FLUSH)[2],
        disk.request(T.IN, 2**40, room=[1024])[2],  # the status, behind room that stays as it was
        disk.request(T.OUT, 2**40, [bytes(512)])[2],
    ]

    assert lengths == [1025, 1, 1, 0, 1]


def test_conformance_11_used_length_of_a_sent_frame_is_0(rig: Rig) -> None:
    """2.7.8.2: nothing is written into it, even where there is room."""
    heads = [rig.send(PLAIN + FRAME), rig.driver.submit(TX, [PLAIN + FRAME], [64])]
    rig.driver.kick(TX)

    assert rig.driver.used(TX) == [(head, 0) for head in heads]
    assert rig.wire.frames() == [FRAME] * 2


def test_conformance_11_entries_are_complete_before_the_index_says_so(driver: RingDriver, device: Echo) -> None:
    """2.7.8.2: at no moment does the driver find an entry behind the index that is not yet there, nor buffers that are
    not yet filled."""
    room = driver.allocate(8, 1)
    seen = []

    def prepare() -> None:
        driver.start(ALL)
        ring = driver.queues[0]
        driver.board.mem.write(0x700, b"hello")
        driver.board.mem.write(room, bytes(8))
        driver.board.mem.write(ring.used, b"\xee" * 70)
        driver.descriptor(ring.desc, 3, 0x700, 5, NEXT, 4)
        driver.descriptor(ring.desc, 4, room, 8, WRITE, 0)
        driver.publish(0, 3)
        put_word(driver, ring.used + 2, 0)

    def look() -> None:
        ring = driver.queues[0]
        done = word(driver, ring.used + 2)
        seen.append((done, driver.board.mem.read(ring.used + 4, 8), driver.board.mem.read(room, 5)) if done else 0)

    for _ in every_moment(prepare, lambda: driver.kick(0), look):
        pass

    assert {entry for entry in seen if entry} == {(1, struct.pack("<II", 3, 5), b"hello")}
    assert 0 in seen


# 12: notifications.


@pytest.mark.parametrize("features", [ALL, F.VERSION_1])
def test_conformance_12_used_flags_are_0(driver: RingDriver, features: int) -> None:
    """2.7.8 and 2.7.10: with EVENT_IDX they must be; without it 0 asks for a kick for each buffer."""
    driver.prepare(features)
    put_word(driver, driver.queues[0].used, 0xFFFF)
    driver.go()

    driver.request(0, [b"x"])

    assert word(driver, driver.queues[0].used) == 0


def test_conformance_12_no_interrupt_flag(driver: RingDriver) -> None:
    """2.7.7.2: without EVENT_IDX the driver's flag decides, and only its bit 0."""
    driver.start(F.VERSION_1)
    told = []

    for flags in (1, 0, 0xFFFF, 0xFFFE):
        put_word(driver, driver.queues[0].avail, flags)
        driver.request(0, [b"x"])
        told.append(driver.interrupts())

    assert told == [0, INTERRUPT.USED_BUFFER, 0, INTERRUPT.USED_BUFFER]


def test_conformance_12_no_interrupt_flag_means_nothing_with_event_idx(driver: RingDriver) -> None:
    """2.7.7.2: used_event alone decides."""
    put_word(driver, driver.queues[0].avail, 1)

    driver.request(0, [b"x"])

    assert driver.interrupts() == INTERRUPT.USED_BUFFER


def test_conformance_12_interrupt_at_the_used_event(driver: RingDriver) -> None:
    """2.7.7.2: an interrupt follows the entry of this index, no other."""
    told = []
    for wanted in (0, 2, 2, 2):
        put_word(driver, used_event(driver), wanted)
        driver.request(0, [b"x"])
        told.append(driver.interrupts())

    assert told == [INTERRUPT.USED_BUFFER, 0, INTERRUPT.USED_BUFFER, 0]


@pytest.mark.parametrize(("kind", "size"), [("plain", 1), ("plain", 4), ("plain", 256), ("disk", 4)])
def test_conformance_12_interrupt_formula(flood: Flood, kind: str, size: int) -> None:
    """2.7.7.2: iff (u16)(new - event - 1) < (u16)(new - old); with 256 entries the indices wrap."""
    driver = flood(kind, size)
    rng = random.Random(size)
    old, wrong = 0, []

    for _ in range(1000):
        count = rng.randint(1, size)
        new = old + count & 0xFFFF
        event = rng.choice([old, new, old - 1, new - 1, old + count // 2, rng.randrange(1 << 16)]) & 0xFFFF
        put_word(driver, used_event(driver), event)
        before = driver.pulses
        more_available(driver, count)
        driver.kick(0)
        if driver.pulses - before != ((new - event - 1) % 65536 < (new - old) % 65536):
            wrong.append((old, new, event))
        old = new

    assert wrong == []


class Sink(Echo):
    """Gives everything back as it is."""

    def __init__(self, size: int) -> None:
        self.queue_sizes = (size,)

    def notify(self, index: int, queue: VirtQueue) -> None:
        for chain in queue.available():
            self.served += 1
            queue.push(chain)


Flood = Callable[..., RingDriver]


@pytest.fixture
def flood(transport: str, connect: Connect) -> Flood:
    """Makes a driver whose ring has a head in each place, so that only the index is left to be moved. Each is a whole
    request: of a Sink, or that for a sector of a disk, whose requests may have another reader."""

    def flood(kind: str, size: int, features: int = ALL) -> RingDriver:
        if kind == "disk":
            driver = connect().driver
        else:
            board = FakeBoard(transport=transport)
            Sink(size).attach(board)
            driver = RingDriver(board)
        driver.start(features, [size])
        ring = driver.queues[0]
        driver.board.mem.write(0x700, HEADER.pack(T.IN, 0, 7))
        request = [(0x700, 16, NEXT), (0x1000, 512, NEXT | WRITE), (0x1200, 1, WRITE)]
        for n, (address, count, flags) in enumerate(request):
            driver.descriptor(0x800, n, address, count, flags, n + 1)
        for n in range(size):
            first = (0x800, 16 * len(request), INDIRECT) if kind == "disk" else (0x700, 1, 0)
            driver.descriptor(ring.desc, n, *first, 0)
        driver.board.mem.write(ring.avail + 4, struct.pack(f"<{size}H", *range(size)))
        return driver

    return flood


def more_available(driver: RingDriver, count: int) -> None:
    ring = driver.queues[0]
    ring.next_avail = ring.next_avail + count & 0xFFFF
    put_word(driver, ring.avail + 2, ring.next_avail)


def test_conformance_12_avail_event_is_where_the_device_stopped(driver: RingDriver) -> None:
    """2.7.10.1: the driver kicks when it makes the next entry available."""
    before = avail_event(driver)
    for _ in range(3):
        driver.submit(0, [b"x"])

    driver.kick(0)

    assert (before, avail_event(driver)) == (0, 3)


def test_conformance_12_entry_that_comes_while_the_device_stops(driver: RingDriver, device: Echo) -> None:
    """2.7.10.1: a driver that looks at avail_event at any moment, and kicks only if it is asked to, is served."""
    late = driver.allocate(1, 1)

    def prepare() -> None:
        device.served = 0
        driver.start(ALL)
        for n in (0, 1):
            driver.descriptor(driver.queues[0].desc, n, late, 1, 0, 0)
        driver.publish(0, 0)

    def add() -> None:
        index = driver.queues[0].next_avail
        driver.publish(0, 1)
        if avail_event(driver) == index:
            driver.board.steps.call_soon(lambda: driver.set("QueueNotify", 0))

    moments = 0
    for _ in every_moment(prepare, lambda: driver.kick(0), add, "virtio/queue.py"):
        driver.board.steps.turn()
        driver.board.steps.turn()
        assert device.served == 2 or driver.queues[0].next_avail == 1
        moments += 1

    assert moments > 100


def test_conformance_12_spurious_kicks(driver: RingDriver, device: Echo) -> None:
    """2.7.13: a kick without anything new is harmless, and no reason for an interrupt."""
    driver.request(0, [b"x"])
    driver.interrupts()

    for _ in range(5):
        driver.kick(0)

    assert (device.served, driver.used(0), driver.interrupts()) == (1, [], 0)


def test_conformance_12_one_interrupt_for_all_that_was_served(driver: RingDriver) -> None:
    """2.7.7.2 leaves it to the device: one for each round, not for each buffer."""
    before = driver.pulses
    for _ in range(5):
        driver.submit(0, [b"x"])

    driver.kick(0)

    assert (driver.pulses - before, len(driver.used(0))) == (1, 5)


def test_conformance_12_nothing_is_lost_without_a_second_kick(driver: RingDriver, device: Echo) -> None:
    """2.7.13: what was left in the ring is served with what comes later."""
    device.busy = True
    driver.submit(0, [b"x"])
    driver.kick(0)
    device.busy = False
    driver.submit(0, [b"y"])

    driver.kick(0)

    assert len(driver.used(0)) == 2


# 13: indices count modulo 2^16.


FLOODS = [("plain", size, features) for size in (1, 2, 4, 256) for features in (ALL, int(F.VERSION_1))]


@pytest.mark.parametrize(("kind", "size", "features"), [*FLOODS, ("disk", 4, ALL), ("disk", 256, ALL)])
def test_conformance_13_indices_wrap(flood: Flood, kind: str, size: int, features: int) -> None:
    """2.7.6 and 2.7.8: 70000 requests and more, on queues of all sizes; each entry is used in its turn."""
    driver = flood(kind, size, features)
    ring = driver.queues[0]
    rounds = -(-70_000 // size)
    indices = []

    for _ in range(rounds):
        more_available(driver, size)
        driver.kick(0)
        indices.append(word(driver, ring.used + 2))
    driver.board.steps.turn()  # behind a full round the device looks once more

    assert indices == [(n + 1) * size % 65536 for n in range(rounds)]
    assert avail_event(driver) == rounds * size % 65536 * bool(features & F.EVENT_IDX)
    entries = struct.unpack(f"<{2 * size}I", driver.board.mem.read(ring.used + 4, 8 * size))
    assert entries == tuple(value for head in range(size) for value in (head, 513 * (kind == "disk")))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_conformance_13_requests_of_all_layouts_over_the_wrap(transport: str, size: int) -> None:
    """2.7.13: the answer is right on both sides of the wrap, in a ring whose entries are used at different times."""
    board = FakeBoard(RAM, transport)
    Echo().attach(board)
    driver = RingDriver(board)
    driver.start(ALL, [size, size])
    ring = driver.queues[0]
    for n in range(65_536 // size - 3):
        driver.descriptor(ring.desc, 0, 0x700, 1, 0, 0)
        for _ in range(size):
            driver.publish(0, 0)
        driver.kick(0)
        ring.next_used = word(driver, ring.used + 2)
        assert ring.next_used == (n + 1) * size % 65536

    for n in range(8 * size):
        text = b"%d" % n
        head = driver.submit(0, [text], [8], indirect=True)
        driver.kick(0)
        assert driver.used(0) == [(head, len(text))]
        assert driver.data(0, head)[: len(text)] == text


def test_conformance_13_chains_come_back_in_any_order(board: FakeBoard) -> None:
    """2.7.13: a device gives back what is done first, unless IN_ORDER was agreed on, which is not offered."""
    device = Backwards()
    device.attach(board)
    driver = RingDriver(board)
    driver.start(ALL)
    heads = [driver.submit(0, [b"x"]) for _ in range(5)]

    driver.kick(0)

    assert driver.used(0) == [(head, 0) for head in reversed(heads)]


class Backwards(Echo):
    """Gives back what came last first."""

    def notify(self, index: int, queue: VirtQueue) -> None:
        chains: Sequence[Chain] = list(queue.available())
        for chain in reversed(chains):
            queue.push(chain)


@pytest.mark.parametrize("queues", [2, 16])
def test_conformance_13_queues_count_for_themselves(connect: Connect, queues: int) -> None:
    """2.7: each queue has indices of its own."""
    disk = connect(queues=queues)

    for queue in range(queues):
        for _ in range(queue + 1):
            disk.submit(T.IN, 7, room=[512], queue=queue)
        disk.driver.kick(queue)

    assert [len(disk.driver.used(queue)) for queue in range(queues)] == list(range(1, queues + 1))
