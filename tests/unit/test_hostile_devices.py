"""What hostile guests do to networks, entropy, balloons and consoles: rows 41 to 46 and 53 to 60 of the list of known
attacks. Rows 47 to 52 are about vsock, which there is none."""

from __future__ import annotations

import errno
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from balloons import ALL, INFLATE, MEMFREE, MEMTOT, PAGE, RAM, STATS, Inflatable, begin, fill, pages, stats, zeros
from consoles import CONTROL_RX, CONTROL_TX, RX, TX, Terminal, hear, say
from disks import Connect
from nics import FRAME, MERGE, OFFLOADS, PLAIN, Rig, header

from kvmpy.console import INPUT_LIMIT, OUTPUT_LIMIT, Console
from kvmpy.core.events import READ, WRITE
from kvmpy.devices.serial import FCR, FIFO_SIZE, IER, IIR, LSR, MCR, Serial, Source
from kvmpy.host.frames import MAX_FRAME
from kvmpy.host.tap import Tap
from kvmpy.testing import ByteSink, FakeBoard, RingDriver
from kvmpy.virtio import balloon as module
from kvmpy.virtio import console
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import T
from kvmpy.virtio.console import DEVICE_ADD, DEVICE_READY, PORT_OPEN, PORT_READY, RESIZE
from kvmpy.virtio.net import BATCH
from kvmpy.virtio.net import RX as NET_RX
from kvmpy.virtio.net import TX as NET_TX
from kvmpy.virtio.queue import NO_INTERRUPT
from kvmpy.virtio.rng import MAX_REQUEST, Rng
from kvmpy.virtio.spec import F

NEXT, WRITABLE, INDIRECT = 1, 2, 4  # flags of a descriptor


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """What is done needs no more than `limit` bytes of the host's memory at any time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


def offer_again_and_again(driver: RingDriver, queue: int, size: int, count: int, flags: int) -> None:
    """A chain that names the same `size` bytes of memory `count` times."""
    table = driver.allocate(16 * count, 16)
    for n in range(count):
        driver.descriptor(table, n, 0, size, flags | NEXT * (n < count - 1), n + 1)
    driver.descriptor(driver.queues[queue].desc, 0, table, 16 * count, INDIRECT, 0)
    driver.publish(queue, 0)


# 41 to 43: frames.


@pytest.mark.parametrize("size", [MAX_FRAME + 1, 65562, 65562 + 12, 1 << 20])
def test_hostile_41_frame_that_is_too_long(rig: Rig, size: int) -> None:
    with bounded(1 << 20):
        offer_again_and_again(rig.driver, NET_TX, 12 + size, 1, 0)
        rig.driver.kick(NET_TX)
    dropped = rig.driver.used(NET_TX), rig.net.tx_dropped
    rig.driver.start(MERGE)
    rig.send(PLAIN + FRAME)

    assert dropped == ([(0, 0)], 1)
    assert rig.wire.frames() == [FRAME]


def test_hostile_41_frame_of_two_gigabytes(rig: Rig) -> None:
    """The same megabytes, many times, are not copied."""
    with bounded(1 << 20):
        offer_again_and_again(rig.driver, NET_TX, 8 << 20, 256, 0)
        rig.driver.kick(NET_TX)

    assert rig.driver.used(NET_TX) == [(0, 0)]
    assert rig.net.tx_dropped == 1


def test_hostile_41_frame_of_four_gigabytes_in_one_descriptor(rig: Rig) -> None:
    with bounded(1 << 20):
        rig.driver.descriptor(rig.driver.queues[NET_TX].desc, 0, 0, 0xFFFFFFFF, 0, 0)
        rig.driver.publish(NET_TX, 0)
        rig.driver.kick(NET_TX)

    assert rig.driver.needs_reset
    rig.start()
    rig.send(PLAIN + FRAME)
    assert rig.wire.frames() == [FRAME]


@pytest.mark.parametrize(
    "readable",
    [[], [b""], [PLAIN[:1]], [PLAIN[:11]], [PLAIN], [PLAIN, FRAME[:1]], [PLAIN, FRAME[:13]]],
    ids=["nothing", "empty", "1 byte", "11 bytes", "only a header", "one byte of a frame", "half an Ethernet header"],
)
def test_hostile_42_frame_that_is_too_short(rig: Rig, readable: list[bytes]) -> None:
    head = rig.driver.submit(NET_TX, readable, [] if readable else [16])
    rig.driver.kick(NET_TX)
    dropped = rig.driver.used(NET_TX)
    rig.send(PLAIN + FRAME)

    assert dropped == [(head, 0)]
    assert (rig.net.tx_dropped, rig.wire.frames()) == (1, [FRAME])


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO, errno.ENOBUFS, errno.EMSGSIZE])
def test_hostile_42_header_that_the_host_refuses(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """The frame is lost; the interface stays."""

    def refuse(fd: int, frame: object) -> int:
        raise OSError(error, os.strerror(error))

    tap = Tap.__new__(Tap)
    tap._fd = -1
    monkeypatch.setattr(os, "writev", refuse)

    assert tap.send([PLAIN, FRAME])


def test_hostile_42_buffers_that_hold_no_frame(rig: Rig) -> None:
    """Of 1, 0 and 11 bytes, and one that can only be read: they come back, and the frame waits for a better one."""
    rig.wire.send(FRAME)
    rig.turn()
    tiny = rig.offer(1, 0, 11)
    read_only = rig.driver.submit(NET_RX, [b"text"])
    rig.driver.kick(NET_RX)
    useless = rig.driver.used(NET_RX)

    rig.offer(100)

    assert useless == [(head, 0) for head in [*tiny, read_only]]
    assert rig.received() == [header() + FRAME]


HEADERS = {
    "checksum behind the frame": (1, 0, 0, 0, 59, 0),
    "checksum far behind": (1, 0, 0, 0, 0xFFFF, 0xFFFF),
    "offset far behind": (1, 0, 0, 0, 0, 0xFFFF),
    "segments of nothing": (1, 1, 54, 0, 34, 16),
    "segments without a checksum": (0, 1, 54, 1460, 0, 0),
    "segments of an unknown kind": (1, 9, 54, 1460, 34, 16),
    "segments of all kinds": (1, 0xFF, 54, 1460, 34, 16),
    "segments of UDP, not offered": (1, 3, 42, 1460, 34, 6),
    "header longer than the frame": (1, 1, 61, 1460, 34, 16),
    "header much longer": (1, 1, 0xFFFF, 1460, 34, 16),
}


@pytest.mark.parametrize("fields", HEADERS.values(), ids=HEADERS)
def test_hostile_43_header_that_makes_no_sense(tap: Rig, fields: tuple[int, ...]) -> None:
    head = tap.send(struct.pack("<BBHHHHH", *fields, 0) + FRAME)

    assert tap.driver.used(NET_TX) == [(head, 0)]
    assert tap.net.tx_dropped == 1
    assert tap.net.tap.sent == []


def test_hostile_43_checksum_of_nothing(tap: Rig) -> None:
    head = tap.send(struct.pack("<BBHHHHH", 1, 0, 0, 0, 0, 0, 0))

    assert (tap.driver.used(NET_TX), tap.net.tap.sent, tap.net.tx_dropped) == ([(head, 0)], [], 1)


@pytest.mark.parametrize("fields", HEADERS.values(), ids=HEADERS)
def test_hostile_43_header_means_nothing_without_offloads(rig: Rig, fields: tuple[int, ...]) -> None:
    rig.send(struct.pack("<BBHHHHH", *fields, 0) + FRAME)

    assert rig.wire.frames() == [FRAME]


def test_hostile_43_offloads_that_were_not_accepted(tap: Rig) -> None:
    """The flag is ignored, segments are dropped."""
    tap.start(MERGE)

    tap.send(struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0) + FRAME)
    tap.send(struct.pack("<BBHHHHH", 1, 1, 54, 1460, 34, 16, 0) + FRAME)

    assert [sent[:2] + sent[12:] for sent in tap.net.tap.sent] == [b"\0\0" + FRAME]
    assert tap.net.tx_dropped == 1


# 44 to 46: floods, and queues that are not there.


def test_hostile_44_no_buffers_for_what_comes(rig: Rig) -> None:
    """Nothing is read, nothing spins, and buffers get all of it going again."""
    rig.wire.send(FRAME, FRAME)
    rig.turn()
    without = rig.waits_for

    rig.offer(100)
    one = rig.received()
    empty = rig.waits_for
    rig.offer(100, 100)

    assert (without, one, empty) == (0, [header() + FRAME], 0)
    assert rig.received() == [header() + FRAME]
    assert rig.waits_for == READ


def test_hostile_44_no_room_for_what_is_sent(rig: Rig) -> None:
    """Frames stay in the ring while the host is slow: all of them arrive, whole and in order, when it reads again."""
    frames = [bytes([n % 251]) * 60_000 for n in range(30)]
    for frame in frames:
        rig.driver.submit(NET_TX, [PLAIN, frame])
    rig.driver.kick(NET_TX)
    stalled, waits_for = len(rig.driver.used(NET_TX)), rig.waits_for

    found = []
    for _ in range(60):
        found += rig.wire.frames()
        rig.turn()

    assert stalled < len(frames)
    assert waits_for & WRITE
    assert found == frames
    assert stalled + len(rig.driver.used(NET_TX)) == len(frames)
    assert rig.waits_for == 0


def test_hostile_44_both_directions_full(rig: Rig) -> None:
    """Each wakes for itself: buffers do not wait for room, nor room for buffers."""
    frames = [bytes([n % 251]) * 60_000 for n in range(30)]
    for frame in frames:
        rig.driver.submit(NET_TX, [PLAIN, frame])
    rig.driver.kick(NET_TX)
    rig.wire.send(FRAME, FRAME)
    rig.turn()

    rig.offer(100)
    got = rig.received()
    rig.turn()
    sent = []
    for _ in range(60):
        sent += rig.wire.frames()
        rig.turn()
    rig.offer(100)

    assert got == [header() + FRAME]
    assert sent == frames
    assert rig.received() == [header() + FRAME]


def test_hostile_45_flood_of_tiny_frames_has_a_quota(plugged: Callable[..., Rig]) -> None:
    """A driver that wants to hear of all hears of so many in one turn of the loop, in each direction, however often it
    tells the device to look; of fewer, where the host is busy."""
    rig = plugged()
    rig.start(MERGE & ~F.EVENT_IDX)
    rig.offer(*[100] * 200)
    rig.wire.send(*[FRAME] * 200)
    for _ in range(200):
        rig.driver.submit(NET_TX, [PLAIN + FRAME])
    received, sent = [], []

    while sum(received) < 200 or sum(sent) < 200:
        rig.driver.kick(NET_RX)
        rig.driver.kick(NET_TX)
        received.append(len(rig.received()))
        sent.append(len(rig.driver.used(NET_TX)))
        assert received[-1] or sent[-1]

    assert max(received) <= 2 * BATCH  # two turns
    assert max(sent) <= 2 * BATCH


def test_hostile_45_flood_without_interrupts_has_a_quota(plugged: Callable[..., Rig]) -> None:
    """A driver that wants to hear of nothing is served for one round of the queue at most, without an interrupt."""
    rig = plugged()
    rig.start(MERGE & ~F.EVENT_IDX)
    rig.board.mem.write(rig.driver.queues[NET_TX].avail, NO_INTERRUPT.to_bytes(2, "little"))
    for _ in range(250):
        rig.driver.submit(NET_TX, [PLAIN + FRAME])

    rig.driver.set("QueueNotify", NET_TX)
    rig.steps.turn()

    assert BATCH <= len(rig.driver.used(NET_TX)) <= 250
    assert rig.driver.interrupts() == 0


def test_hostile_45_kicks_do_not_pile_up(rig: Rig) -> None:
    """A guest that kicks all the time while there is more to do gets one turn for all of it."""
    for _ in range(250):
        rig.driver.submit(NET_TX, [PLAIN + FRAME])
    for _ in range(100):
        rig.driver.set("QueueNotify", NET_TX)

    rig.steps.turn()

    assert len(rig.driver.used(NET_TX)) == BATCH


def test_hostile_45_useless_buffers_have_a_quota(rig: Rig) -> None:
    """Buffers too small for any frame, with frames that wait for a better one."""
    rig.wire.send(FRAME)
    rig.offer(*[1] * 250)

    assert len(rig.driver.used(NET_RX)) == BATCH


def test_hostile_45_throttled_device_does_nothing_meanwhile(connect: Connect) -> None:
    """It waits for one timer, whatever the driver kicks."""
    disk = connect(iops=1)
    for n in range(4):
        disk.submit(T.IN, n, room=[512])
    disk.driver.kick(0)

    waiting = []
    for _ in range(5):
        disk.driver.kick(0)
        waiting.append((len(disk.board.steps._queue), len(disk.board.steps._due)))

    assert waiting == [(0, 1)] * 5


CONTROL = {"CTRL_VQ": 17, "CTRL_RX": 18, "MQ": 22, "CTRL_MAC_ADDR": 23, "HASH_REPORT": 57, "RSS": 60}


@pytest.mark.parametrize("feature", CONTROL.values(), ids=CONTROL)
def test_hostile_46_control_queue_cannot_be_had(tap: Rig, feature: int) -> None:
    """There are no commands to get wrong: neither the feature is taken, nor is there a third queue."""
    driver = tap.driver
    driver.set("Status", 0)
    driver.set("Status", 3)
    driver.accept(F.VERSION_1 | 1 << feature)
    refused = driver.get("Status")
    tap.start(OFFLOADS)
    driver.set("QueueSel", 2)
    driver.set("QueueNum", 8)
    driver.set("QueueReady", 1)
    driver.kick(2)

    assert (refused, driver.get("QueueReady"), driver.needs_reset) == (3, 0, False)
    tap.send(PLAIN + FRAME)
    assert len(tap.net.tap.sent) == 1


# 53: entropy.


@pytest.mark.parametrize(("size", "count"), [(1 << 20, 64), (1 << 20, 2), ((1 << 16) + 1, 1), (4096, 64)])
def test_hostile_53_request_for_more_than_there_is_memory(transport: str, size: int, count: int) -> None:
    """The same page, or all of memory, many times over."""
    board = FakeBoard(4 << 20, transport)
    Rng().attach(board)
    driver = RingDriver(board, free=2 << 20)
    driver.start(F.VERSION_1 | F.INDIRECT_DESC)

    with bounded(1 << 20):
        offer_again_and_again(driver, 0, size, count, WRITABLE)
        driver.kick(0)

    ((_, written),) = driver.used(0)
    assert written == min(size * count, MAX_REQUEST)
    driver.start()
    assert len(driver.request(0, writable=[16])) == 16


def test_hostile_53_many_requests_at_once(transport: str) -> None:
    """Each is bounded, and so is their number in one turn."""
    board = FakeBoard(4 << 20, transport)
    Rng().attach(board)
    driver = RingDriver(board)
    driver.start()
    for head in range(64):
        driver.descriptor(driver.queues[0].desc, head, 2 << 20, 1 << 20, WRITABLE, 0)
        driver.publish(0, head)

    with bounded(1 << 20):
        driver.kick(0)

    assert driver.used(0) == [(head, MAX_REQUEST) for head in range(64)]


# 54 and 55: balloons.


def test_hostile_54_statistics_before_the_queue_is_there(transport: str) -> None:
    """The timer, kicks and a buffer come before DRIVER_OK, and to a driver that has not taken STATS_VQ."""
    board = FakeBoard(RAM, transport)
    device = Balloon(stats=1)
    device.attach(board)
    driver = RingDriver(board)
    board.steps.advance(5)
    driver.kick(STATS)
    driver.prepare(ALL)
    driver.submit(STATS, [stats((MEMFREE, 1))])
    driver.kick(STATS)
    board.steps.advance(5)
    early = device.stats

    begin(driver, F.VERSION_1, [0, 1])
    driver.kick(STATS)
    board.steps.advance(5)

    assert (early, device.stats, driver.needs_reset) == ({}, {}, False)


def test_hostile_54_statistics_as_long_as_can_be(balloon: Inflatable) -> None:
    with bounded(1 << 20):
        balloon.driver.descriptor(balloon.driver.queues[STATS].desc, 0, 0, 0xFFFFFFFF, 0, 0)
        balloon.driver.publish(STATS, 0)
        balloon.driver.kick(STATS)

    assert balloon.driver.needs_reset
    begin(balloon.driver, ALL, [INFLATE])
    assert balloon.driver.request(INFLATE, [pages(700)]) == b""


def test_hostile_54_statistics_of_all_memory(balloon: Inflatable) -> None:
    with bounded(1 << 20):
        balloon.driver.descriptor(balloon.driver.queues[STATS].desc, 0, 0, RAM, 0, 0)
        balloon.driver.publish(STATS, 0)
        balloon.driver.kick(STATS)

    assert len(balloon.device.stats) <= 1  # zeros are tag 0
    assert not balloon.driver.needs_reset


def test_hostile_54_statistics_longer_than_any(balloon: Inflatable) -> None:
    balloon.driver.submit(STATS, [stats((MEMFREE, 1)) * module.MAX_STATS + stats((MEMTOT, 1))])

    balloon.driver.kick(STATS)

    assert balloon.device.stats == {"MEMFREE": 1}


@pytest.mark.parametrize("data", [b"", b"\5", stats((MEMTOT, 1))[:9], stats((99, 1)), bytes(9)])
def test_hostile_54_statistics_that_are_none(balloon: Inflatable, data: bytes) -> None:
    balloon.driver.submit(STATS, [data])

    balloon.driver.kick(STATS)

    assert (balloon.device.stats, balloon.driver.needs_reset) == ({}, False)


def test_hostile_54_second_buffer_for_statistics_comes_back(balloon: Inflatable) -> None:
    balloon.driver.submit(STATS, [stats((MEMFREE, 1))])
    more = [balloon.driver.submit(STATS, [stats((MEMFREE, 2))]) for _ in range(3)]

    balloon.driver.kick(STATS)

    assert balloon.driver.used(STATS) == [(head, 0) for head in more]
    assert balloon.device.stats == {"MEMFREE": 1}


@pytest.mark.parametrize(
    "listed",
    [
        pages(RAM // PAGE),
        pages(0xFFFFFFFF, 0xFFFFFFFE),
        pages(0xD0000),  # the registers of a device
        b"",
        b"\0\2",
        b"\0",
        pages(*range(RAM // PAGE, RAM // PAGE + 2000)),
    ],
    ids=["behind RAM", "the last ones", "registers", "nothing", "half a number", "a byte", "many"],
)
def test_hostile_55_pages_that_are_not_ram(balloon: Inflatable, listed: bytes) -> None:
    fill(balloon.driver, 512, 1)

    answer = balloon.driver.request(INFLATE, [listed])

    assert (answer, balloon.driver.needs_reset, zeros(balloon.driver, 512, 1)) == (b"", False, [])


def test_hostile_55_last_page_first_page_and_the_same_ones_again(balloon: Inflatable) -> None:
    last = RAM // PAGE - 1
    fill(balloon.driver, last, 1)
    fill(balloon.driver, 0, 1)

    balloon.driver.request(INFLATE, [pages(last + 1, last, 0, last, last, 0)])

    assert zeros(balloon.driver, last, 1) + zeros(balloon.driver, 0, 1) == [last, 0]
    assert not balloon.driver.needs_reset


@pytest.mark.parametrize("length", [5, 6, 7])
def test_hostile_55_part_of_a_number_at_the_end(balloon: Inflatable, length: int) -> None:
    fill(balloon.driver, 512, 2)

    balloon.driver.request(INFLATE, [pages(512, 513)[:length]])

    assert zeros(balloon.driver, 512, 2) == [512]


@pytest.mark.parametrize("count", [1, 128])
def test_hostile_55_list_longer_than_any(transport: str, count: int) -> None:
    """All of RAM as a list, and a gigabyte of it: a part counts."""
    board = FakeBoard(8 << 20, transport)
    Balloon().attach(board)
    driver = RingDriver(board)
    driver.start(F.VERSION_1 | F.INDIRECT_DESC)

    with bounded(4 << 20):
        offer_again_and_again(driver, INFLATE, 8 << 20, count, 0)
        driver.kick(INFLATE)

    assert driver.used(INFLATE) == [(0, 0)]
    assert not driver.needs_reset


def test_hostile_55_queue_in_the_balloon(balloon: Inflatable) -> None:
    """The device reads zeros where its rings were, and needs a reset; after that it works."""
    balloon.driver.submit(INFLATE, [pages(*range(16, 32))])
    balloon.driver.kick(INFLATE)
    failed = balloon.driver.needs_reset

    begin(balloon.driver, ALL, [INFLATE])

    assert failed
    assert balloon.driver.request(INFLATE, [pages(700)]) == b""


def test_hostile_55_one_turn_is_bounded(balloon: Inflatable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RANGES", 3)
    for _ in range(3):
        balloon.driver.submit(INFLATE, [pages(512, 514)])

    balloon.driver.kick(INFLATE)
    first = balloon.driver.used(INFLATE)
    balloon.board.steps.turn()

    assert (len(first), len(balloon.driver.used(INFLATE))) == (2, 1)


def test_hostile_55_actual_is_at_most_what_there_is(balloon: Inflatable) -> None:
    balloon.driver.write_config(4, 4, 0xFFFFFFFF)

    assert balloon.device.actual == RAM


@pytest.mark.parametrize(("offset", "size"), [(0, 4), (3, 2), (2, 4), (8, 4), (6, 4), (0, 8), (0xEFC, 4)])
def test_hostile_55_driver_writes_nothing_but_actual(balloon: Inflatable, offset: int, size: int) -> None:
    with balloon.device.lock:
        balloon.device.target(1 << 20)

    balloon.driver.write_config(offset, size, (1 << 8 * size) - 1)

    assert (balloon.driver.config(0, 4), balloon.device.actual) == (256, 0)


# 56 to 60: consoles.


@pytest.mark.parametrize("pieces", [[b"abcdef\n"], [b"ab", b"cd", b"ef\n"], [b"a", b"", b"bc", b"def\n"]])
def test_hostile_56_all_of_a_chain_is_printed(terminal: Terminal, pieces: list[bytes]) -> None:
    """And no byte is written into it."""
    assert terminal.driver.request(TX, pieces) == b""
    assert terminal.owner.data == b"abcdef\n"


def test_hostile_56_one_turn_is_bounded(terminal: Terminal) -> None:
    """A chain that names the same memory again and again, longer than a turn's work."""
    for n in range(3):
        terminal.driver.descriptor(terminal.driver.queues[TX].desc, n, 0, 1 << 17, NEXT * (n < 2), n + 1)
    terminal.driver.publish(TX, 0)

    terminal.driver.kick(TX)
    first, given_back = len(terminal.owner.data), terminal.driver.used(TX)
    terminal.board.steps.turn()

    assert (first, given_back) == (console.BUDGET, [])
    assert (len(terminal.owner.data), terminal.driver.used(TX)) == (3 << 17, [(0, 0)])


class Slow:
    """An endpoint that never passes anything on, and knows whether it is to read."""

    paused = False

    def write(self, data: bytes) -> None: ...
    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def close(self) -> None: ...


class Uart:
    """A serial port behind a Console with a slow host."""

    PORT = 0x3F8

    def __init__(self) -> None:
        self.board = FakeBoard()
        self.console = Console(self.board.loop)
        self.serial = Serial(self.console, port=self.PORT, gsi=4)
        self.serial.attach(self.board)
        self.console.connect(self.serial)
        self.serial.on_room = self.console.room
        self.host = Slow()
        self.console.attach(self.host)

    def get(self, register: int) -> int:
        return self.board.ports.read(self.PORT + register, 1)

    def put(self, register: int, value: int) -> None:
        self.board.ports.write(self.PORT + register, 1, value)


DATA, ENABLE, IDENTIFY, MODEM, STATUS = 0, 1, 2, 4, 5  # registers of a UART
HUGE = 100 << 20


def test_hostile_57_input_for_a_guest_that_does_not_read() -> None:
    """A hundred megabytes on standard input: the host reads no more of it than fits, and goes on when there is room."""
    uart = Uart()
    uart.put(IDENTIFY, FCR.ENABLE)
    taken = 0
    with bounded(1 << 20):
        while taken < HUGE and not uart.host.paused:
            uart.console.received(b"x" * 4096)
            taken += 4096
            uart.board.steps.turn()

    assert taken <= INPUT_LIMIT + 4096
    read = bytearray()
    while uart.get(STATUS) & LSR.DR:
        read.append(uart.get(DATA))
        uart.board.steps.turn()
    assert read == b"x" * taken
    assert not uart.host.paused


def test_hostile_57_input_for_a_virtio_console_without_buffers(terminal: Terminal) -> None:
    """What the port does not take stays with the host, which is told when it can go on."""
    terminal.owner.rooms = 0
    taken = [terminal.device.receive(bytes(3000)) for _ in range(3)]
    terminal.board.steps.turn()
    told = terminal.owner.rooms

    answer = terminal.driver.request(RX, writable=[1000])

    assert (taken, told) == ([3000, console.INPUT_LIMIT - 3000, 0], 0)
    assert (len(answer), terminal.owner.rooms) == (1000, 1)
    assert terminal.device.receive(bytes(3000)) == 1000


def test_hostile_58_output_while_the_host_does_not_read() -> None:
    """A guest that looks at THRE waits; one that does not loses its bytes, which are counted. No write ever blocks."""
    uart = Uart()
    uart.put(IDENTIFY, FCR.ENABLE)
    for _ in range(OUTPUT_LIMIT):
        uart.put(DATA, ord("x"))
    ready = uart.get(STATUS) & LSR.THRE

    with bounded(1 << 20):
        for _ in range(20_000):
            uart.put(DATA, ord("y"))
    uart.board.steps.turn()

    assert ready == 0
    assert uart.serial.DROPPED == 20_000 - FIFO_SIZE
    uart.console.sent(OUTPUT_LIMIT)
    uart.board.steps.turn()
    assert uart.get(STATUS) & LSR.THRE


def test_hostile_58_virtio_console_while_the_host_does_not_read(terminal: Terminal) -> None:
    """The guest waits, and what it has written comes later."""
    machine_console = Console(terminal.board.loop)
    machine_console.connect(terminal.device)
    machine_console.attach(Slow())
    port = terminal.device.ports[0]
    port.on_data, port.on_room = machine_console.write, machine_console.room
    pieces = OUTPUT_LIMIT // console.PIECE
    for _ in range(pieces + 4):
        terminal.driver.submit(TX, [bytes(console.PIECE)])

    terminal.driver.kick(TX)
    for _ in range(3):
        terminal.board.steps.turn()
    waiting = len(terminal.driver.used(TX))
    machine_console.sent(OUTPUT_LIMIT)
    for _ in range(3):
        terminal.board.steps.turn()

    assert (waiting, len(terminal.driver.used(TX))) == (pieces, 4)


def test_hostile_59_interrupt_storm_of_a_uart() -> None:
    """Each interrupt is the guest's own doing, and reading IIR takes it back."""
    uart = Uart()
    line = uart.board.lines[4]
    uart.put(MODEM, MCR.OUT2)

    for n in range(10_000):
        uart.put(ENABLE, IER.ETBEI)
        assert line.level
        assert IIR.ID.of(uart.get(IDENTIFY)) == Source.THR_EMPTY
        assert IIR.ID.of(uart.get(IDENTIFY)) == Source.NONE
        assert (line.level, line.edges) == (False, n + 1)
        uart.put(ENABLE, 0)


@pytest.mark.parametrize("fifos", [0, FCR.ENABLE])
def test_hostile_59_loopback_without_end(fifos: int) -> None:
    """What does not fit is an overrun; nothing leaves the port."""
    sink = ByteSink()
    serial = Serial(sink, port=0x3F8, gsi=4)
    board = FakeBoard()
    serial.attach(board)
    board.ports.write(0x3F8 + IDENTIFY, 1, fifos)
    board.ports.write(0x3F8 + MODEM, 1, MCR.LOOP)

    with bounded(1 << 16):
        for _ in range(20_000):
            board.ports.write(0x3F8 + DATA, 1, 0x55)
    status = board.ports.read(0x3F8 + STATUS, 1)
    count = 0
    while board.ports.read(0x3F8 + STATUS, 1) & LSR.DR:
        board.ports.read(0x3F8 + DATA, 1)
        count += 1

    assert status & LSR.OE
    assert (count, sink.data) == (FIFO_SIZE if fifos else 1, b"")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        struct.pack("<IHH", 0, DEVICE_READY, 1)[:7],
        struct.pack("<IHH", 2, PORT_READY, 1),
        struct.pack("<IHH", 3, PORT_OPEN, 1),
        struct.pack("<IHH", 31, PORT_OPEN, 1),
        struct.pack("<IHH", 0xFFFFFFFF, PORT_READY, 1),
        struct.pack("<IHH", 0, 8, 1),
        struct.pack("<IHH", 0, 0xFFFF, 0xFFFF),
        struct.pack("<IHH", 0, RESIZE, 1),
        struct.pack("<IHH", 1, DEVICE_ADD, 1),
    ],
)
def test_hostile_60_message_that_means_nothing(switchboard: Terminal, message: bytes) -> None:
    """Cut, about ports that are not there, of no known event, or such as only the device sends."""
    switchboard.driver.request(CONTROL_TX, [message])

    assert hear(switchboard.driver) == []
    assert not switchboard.driver.needs_reset


def test_hostile_60_message_in_pieces_and_more(switchboard: Terminal) -> None:
    message = struct.pack("<IHH", 0, DEVICE_READY, 1)

    switchboard.driver.request(CONTROL_TX, [message[:1], message[1:5], message[5:] + bytes(4096)])

    assert [number for number, _, _ in hear(switchboard.driver)] == [0, 1]


def test_hostile_60_messages_without_end(switchboard: Terminal) -> None:
    """A driver that asks and never listens costs no more than one answer of each kind."""
    for _ in range(500):
        say(switchboard.driver, 0, DEVICE_READY, 1)
        say(switchboard.driver, 1, PORT_READY, 1)

    assert len(hear(switchboard.driver)) == 4


@pytest.mark.parametrize("room", [0, 1, 3, 7])
def test_hostile_60_buffer_too_small_for_the_message(switchboard: Terminal, room: int) -> None:
    say(switchboard.driver, 1, PORT_READY, 1)

    assert switchboard.driver.request(CONTROL_RX, writable=[room]) == b"\1\0\0\0\7\0\1"[:room]
    assert not switchboard.driver.needs_reset


def test_hostile_60_queues_of_a_port_that_is_not_there(switchboard: Terminal) -> None:
    switchboard.driver.submit(7, [b"x"])

    switchboard.driver.kick(7)
    switchboard.driver.kick(6)

    assert (switchboard.driver.used(7), switchboard.driver.needs_reset) == ([], False)


def test_hostile_60_driver_changes_no_configuration(terminal: Terminal) -> None:
    for offset in range(0, 12, 4):
        terminal.driver.write_config(offset, 4, 0xFFFFFFFF)

    assert [terminal.driver.config(offset, 4) for offset in (0, 4, 8)] == [0, 1, 0]


def test_hostile_60_port_that_opens_and_closes_without_end(switchboard: Terminal) -> None:
    for _ in range(200):
        say(switchboard.driver, 1, PORT_OPEN, 1)
        say(switchboard.driver, 1, PORT_OPEN, 0)

    assert switchboard.owner.rooms == 200
    assert (hear(switchboard.driver), switchboard.device.ports[1].listening) == ([], False)
