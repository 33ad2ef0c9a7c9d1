"""What devices get wrong most: disks, networks, entropy, balloons and consoles (VIRTIO 1.2, 5)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from balloons import ALL, INFLATE, MEMFREE, MEMTOT, PAGE, RAM, STATS, Inflatable, begin, fill, pages, stats, zeros
from consoles import CONTROL_TX, RX, RX1, TX, TX1, Owner, Terminal, hear, say
from disks import CONTENT, FEATURES, READ_ONLY, SECTORS, SIZE, Connect, Disk
from nics import BASIC, FRAME, MAC, MERGE, PLAIN, Rig, header

from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.blk import BLK_F, QUEUE_SIZE, UNMAP, S, T
from kvmpy.virtio.console import CONSOLE_F, DEVICE_READY, PORT_READY, RESIZE
from kvmpy.virtio.net import NET_F
from kvmpy.virtio.net import RX as NET_RX
from kvmpy.virtio.rng import MAX_REQUEST, Rng
from kvmpy.virtio.spec import INTERRUPT, F

# Block device (5.2).


def test_conformance_blk_capacity_counts_512_byte_sectors(disk: Disk, path: Path) -> None:
    """5.2.4: whatever blk_size is."""
    assert disk.config.capacity == SIZE // 512
    assert disk.config.blk_size == 512
    assert 512 << disk.config.physical_block_exp == 4096


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
def test_conformance_blk_data_is_whole_sectors(disk: Disk, path: Path, length: int) -> None:
    """5.2.6.1: data is a multiple of 512 bytes."""
    assert disk.request(T.OUT, 0, [bytes(length)])[0] == S.IOERR
    assert disk.request(T.IN, 0, room=[length])[0] == S.IOERR
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("serial", ["", "abc", "12345678901234567890"])
def test_conformance_blk_get_id_is_20_bytes(connect: Connect, serial: str) -> None:
    """5.2.6: padded with NUL, which a full string does not end with."""
    status, answer, written = connect(serial=serial).request(T.GET_ID, room=[20])

    assert (status, written) == (S.OK, 21)
    assert answer == serial.encode().ljust(20, b"\0")


@pytest.mark.parametrize("accepted", [BLK_F.RO, 0])
def test_conformance_blk_read_only_disk_is_not_written(connect: Connect, path: Path, accepted: int) -> None:
    """5.2.6.2: IOERR for a write, whether the driver has accepted RO or not."""
    disk = connect(READ_ONLY | accepted, ro=True)

    assert disk.write(0, bytes(512)) == S.IOERR
    assert path.read_bytes() == CONTENT


def test_conformance_blk_flush_is_offered(disk: Disk) -> None:
    """5.2.5, 5.2.6.2."""
    disk.driver.set("DeviceFeaturesSel", 0)

    assert disk.driver.get("DeviceFeatures") & BLK_F.FLUSH


def test_conformance_blk_flush_makes_writes_stable(disk: Disk, syncs: list[int]) -> None:
    """5.2.6.2: what was written before is on the medium when FLUSH completes, and not earlier."""
    disk.write(0, bytes(512))
    before = len(syncs)

    assert disk.request(T.FLUSH) == (S.OK, b"", 1)
    assert (before, len(syncs)) == (0, 1)


def test_conformance_blk_after_a_failed_flush_none_succeeds(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """5.2.6.2: data that did not get there is lost, though the host's next fdatasync succeeds."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        first = disk.request(T.FLUSH)[0]

    assert [first, disk.request(T.FLUSH)[0], disk.request(T.FLUSH)[0]] == [S.IOERR] * 3
    assert disk.works
    assert [fields["why"] for _, fields in disk.board.logs] == ["Input/output error"] * 3


def test_conformance_blk_driver_without_flush_gets_write_through(connect: Connect, syncs: list[int]) -> None:
    """5.2.6.2: each write is stable when it completes, if FLUSH was not accepted."""
    disk = connect(FEATURES & ~BLK_F.FLUSH)

    disk.read(0, 1)
    counts = [len(syncs)]
    for action in (
        lambda: disk.write(0, bytes(512)),
        lambda: disk.segments(T.WRITE_ZEROES, (0, 8, 0)),
        lambda: disk.segments(T.DISCARD, (0, 8, 0)),
    ):
        assert action() == S.OK
        counts.append(len(syncs))

    assert counts == [0, 1, 2, 3]


def test_conformance_blk_unmap_is_no_flag_of_discard(disk: Disk, path: Path) -> None:
    """5.2.6.2: UNSUPP; of write zeroes it is one."""
    assert disk.segments(T.DISCARD, (0, 8, UNMAP)) == S.UNSUPP
    assert path.read_bytes() == CONTENT
    assert disk.segments(T.WRITE_ZEROES, (0, 8, UNMAP)) == S.OK
    assert disk.read(0, 8) == bytes(8 * 512)


@pytest.mark.parametrize("kind", [T.DISCARD, T.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [2, 1 << 31, 0xFFFFFFFE])
def test_conformance_blk_unknown_flags(disk: Disk, path: Path, kind: int, flags: int) -> None:
    """5.2.6.2: UNSUPP."""
    assert disk.segments(kind, (0, 8, flags)) == S.UNSUPP
    assert path.read_bytes() == CONTENT


def test_conformance_blk_seg_max_leaves_room_for_header_and_status(disk: Disk) -> None:
    """5.2.4: so many data buffers fit into a chain of the queue's size."""
    seg_max = disk.config.seg_max

    assert seg_max <= QUEUE_SIZE - 2
    assert disk.request(T.IN, 0, room=[512] * seg_max)[:2] == (S.OK, CONTENT[: 512 * seg_max])


def test_conformance_blk_unused_fields_are_0(connect: Connect) -> None:
    """5.2.4: unused0, unused1, and the fields of features that are not offered."""
    config = connect(queues=4).config

    assert (config.buf[33], bytes(config.buf[57:60])) == (0, bytes(3))
    assert bytes(config.buf[8:12]) == bytes(4)  # size_max
    assert bytes(config.buf[16:20]) == bytes(4)  # geometry
    assert config.buf[32] == 0  # writeback, of CONFIG_WCE


def test_conformance_blk_ranges_as_the_configuration_says(disk: Disk) -> None:
    """5.2.4, 5.2.6.1: as many segments, as long as max_..._sectors, are done."""
    config = disk.config

    assert disk.segments(T.DISCARD, *[(8 * n, 8, 0) for n in range(config.max_discard_seg)]) == S.OK
    assert disk.segments(T.WRITE_ZEROES, *[(0, 8, 0)] * config.max_write_zeroes_seg) == S.OK
    assert disk.segments(T.WRITE_ZEROES, *[(0, 8, 0)] * (config.max_write_zeroes_seg + 1)) == S.IOERR
    assert min(config.max_discard_sectors, config.max_write_zeroes_sectors) >= SECTORS


# Network device (5.1).


@pytest.mark.parametrize("features", [BASIC, MERGE])
def test_conformance_net_header_is_12_bytes(rig: Rig, features: int) -> None:
    """5.1.6: with VERSION_1, mergeable buffers or not, in both directions; 5.1.6.4.1: num_buffers is 1 then."""
    rig.start(features)
    rig.offer(1526, 1526)

    rig.send(PLAIN + FRAME)
    rig.wire.send(FRAME)
    rig.turn()

    assert rig.wire.frames() == [FRAME]
    assert rig.received() == [struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, 1) + FRAME]
    assert rig.driver.interrupts() == INTERRUPT.USED_BUFFER


def test_conformance_net_all_buffers_but_the_last_get_full(rig: Rig) -> None:
    """5.1.6.4.1: with MRG_RXBUF, num_buffers counts those of a frame."""
    frame = bytes(n % 251 for n in range(1000))
    rig.offer(400, 300, 320, 400)

    rig.wire.send(frame, FRAME)
    rig.turn()

    data = header(3) + frame
    assert rig.received() == [data[:400], data[400:700], data[700:], header() + FRAME]


def test_conformance_net_buffers_of_a_frame_come_back_at_once(
    plugged: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5.1.6.4.1: a driver that has seen the first one takes the others without waiting. (In C: one `publish`.)"""
    monkeypatch.setattr("kvmpy.virtio.net.PURE", True)
    rig = plugged()
    rig.start()
    rig.offer(40, 40)
    ring = rig.driver.queues[NET_RX].used
    queue = rig.net.queues[NET_RX]
    push = queue.push
    indices = []

    def spy(*chains: object) -> None:
        before = rig.board.mem.read(ring + 2, 2)
        push(*chains)
        indices.append((before, rig.board.mem.read(ring + 2, 2)))

    queue.push = spy
    rig.wire.send(FRAME)
    rig.turn()

    assert indices == [(b"\0\0", b"\2\0")]


def test_conformance_net_frame_without_mergeable_buffers_fits_into_one(rig: Rig) -> None:
    """5.1.6.3.1: a frame that does not is dropped."""
    rig.start(BASIC)
    rig.offer(71, 200)

    rig.wire.send(FRAME, FRAME[:59])
    for _ in range(3):
        rig.turn()

    assert rig.received() == [header() + FRAME[:59]]
    assert rig.net.rx_dropped == 1


@pytest.mark.parametrize("flags", [2, 4, 0x80, 0xFE])
def test_conformance_net_unknown_flags_are_ignored(tap: Rig, flags: int) -> None:
    """5.1.6.2.2: they, and without NEEDS_CSUM the fields of the checksum."""
    tap.send(struct.pack("<BBHHHHH", flags, 0, 0, 0, 0xFFFF, 0xFFFF, 0xFFFF) + FRAME)

    (sent,) = tap.net.tap.sent
    assert (sent[0], sent[12:]) == (0, FRAME)


def test_conformance_net_flags_are_0_without_guest_csum(tap: Rig) -> None:
    """5.1.6.4.1: what the host has checked is told only to a driver that asked for it; half done ones never come."""
    tap.start(MERGE)
    tap.offer(100, 100, 100)
    tap.net.tap.incoming = [
        struct.pack("<BBHHHHH", flags, kind, 0, 0, 0, 0, 0) + FRAME for flags, kind in ((1, 0), (2, 0), (0, 1))
    ]

    tap.turn()

    assert tap.received() == [header() + FRAME]
    assert tap.net.rx_dropped == 2


def test_conformance_net_configuration(plugged: Callable[..., Rig]) -> None:
    """5.1.4: mac as it was given, LINK_UP in status, mtu."""
    driver = plugged(mtu=1400).driver

    assert bytes(driver.config(n, 1) for n in range(6)).hex(":") == MAC
    assert (driver.config(6, 2), driver.config(8, 2), driver.config(10, 2)) == (1, 1, 1400)


def test_conformance_net_status_follows_the_link(rig: Rig) -> None:
    """5.1.4.1: with an interrupt for the change."""
    rig.wire.peer.close()

    rig.turn()

    assert rig.driver.config(6, 2) == 0
    assert rig.driver.interrupts() & INTERRUPT.CONFIGURATION


def test_conformance_net_longest_frame_is_that_of_the_mtu(plugged: Callable[..., Rig]) -> None:
    """5.1.4.1: with MTU accepted none is longer, but for its Ethernet header and a VLAN tag."""
    rig = plugged(mtu=100)
    rig.start(MERGE | NET_F.MTU)
    rig.offer(1526, 1526)

    rig.wire.send(bytes(119), bytes(118))
    rig.turn()

    assert rig.received() == [header() + bytes(118)]


def test_conformance_net_no_control_queue(tap: Rig) -> None:
    """5.1.3: CTRL_VQ, and all that needs it, is not offered; 5.1.2: there are two queues."""
    control = [17, 18, 19, 21, 22, 23, 57, 59, 60, 61]
    offered = 0
    for half in (0, 1):
        tap.driver.set("DeviceFeaturesSel", half)
        offered |= tap.driver.get("DeviceFeatures") << 32 * half
    tap.driver.set("QueueSel", 2)

    assert [bit for bit in control if offered & 1 << bit] == []
    assert tap.driver.get("QueueNumMax") == 0


DEPENDENT = {
    "HOST_TSO4": (NET_F.HOST_TSO4, NET_F.CSUM),
    "HOST_TSO6": (NET_F.HOST_TSO6, NET_F.CSUM),
    "HOST_ECN": (NET_F.HOST_ECN | NET_F.CSUM, NET_F.HOST_TSO6),
    "GUEST_TSO4": (NET_F.GUEST_TSO4, NET_F.GUEST_CSUM),
    "GUEST_TSO6": (NET_F.GUEST_TSO6, NET_F.GUEST_CSUM),
    "GUEST_ECN": (NET_F.GUEST_ECN | NET_F.GUEST_CSUM, NET_F.GUEST_TSO4),
}


@pytest.mark.parametrize(("alone", "needed"), DEPENDENT.values(), ids=DEPENDENT)
def test_conformance_net_features_that_need_others(tap: Rig, alone: int, needed: int) -> None:
    """5.1.3.1, 2.2.1: a driver must not accept them without; FEATURES_OK then stays 0 (the host's kernel would refuse
    such offloads, and the link would be gone for good)."""
    answers = []
    for features in (alone, alone | needed):
        tap.driver.set("Status", 0)
        tap.driver.set("Status", 3)
        tap.driver.accept(F.VERSION_1 | features)
        answers.append(tap.driver.get("Status"))

    assert answers == [3, 11]


# Entropy device (5.4).


@pytest.fixture
def rng(transport: str) -> RingDriver:
    board = FakeBoard(transport=transport)
    Rng().attach(board)
    driver = RingDriver(board)
    driver.start()
    return driver


@pytest.mark.parametrize("room", [[1], [32], [1, 31], [0, 5, 0]])
def test_conformance_rng_at_least_one_byte(rng: RingDriver, room: list[int]) -> None:
    """5.4.6.2: one or more random bytes; all there is room for, if that is not much."""
    assert len(rng.request(0, writable=room)) == sum(room)


def test_conformance_rng_answers_a_long_request_in_part(rng: RingDriver) -> None:
    """5.4.6.2 allows it."""
    answer = rng.request(0, writable=[MAX_REQUEST + 1])

    assert len(answer) == MAX_REQUEST
    assert len(set(answer)) == 256


def test_conformance_rng_writes_only_where_it_may(rng: RingDriver) -> None:
    """5.4.6.1 forbids the driver other buffers: nothing happens to them."""
    rng.board.mem.write(0x700, b"text")
    rng.descriptor(rng.queues[0].desc, 0, 0x700, 4, 1, 1)
    rng.descriptor(rng.queues[0].desc, 1, 0x704, 4, 2, 0)
    rng.publish(0, 0)
    rng.kick(0)

    assert rng.used(0) == [(0, 4)]
    assert rng.board.mem.read(0x700, 4) == b"text"
    assert rng.board.mem.read(0x704, 4) != bytes(4)


# Balloon device (5.5).


def test_conformance_balloon_page_numbers_count_4_kib(balloon: Inflatable) -> None:
    """5.5.6: whatever the guest's page size."""
    fill(balloon.driver, 512, 8)

    assert balloon.driver.request(INFLATE, [pages(515, 514, 518)]) == b""
    assert zeros(balloon.driver, 512, 8) == [514, 515, 518]


def test_conformance_balloon_configuration_is_little_endian(balloon: Inflatable) -> None:
    """5.5.4, 5.5.6: num_pages is the host's, actual the driver's."""
    with balloon.device.lock:
        balloon.device.target(0x102 * PAGE)
    balloon.driver.write_config(4, 4, 0x0301)

    assert [balloon.driver.config(n, 1) for n in range(8)] == [2, 1, 0, 0, 1, 3, 0, 0]
    assert balloon.device.actual == 0x301 * PAGE
    assert balloon.driver.interrupts() & INTERRUPT.CONFIGURATION


def test_conformance_balloon_pages_are_used_without_being_deflated(balloon: Inflatable) -> None:
    """5.5.6.1: the device does not rely on the driver to say so first; they read as zeros and keep what is written."""
    fill(balloon.driver, 512, 1)
    balloon.driver.request(INFLATE, [pages(512)])
    empty = balloon.board.mem.read(512 * PAGE, PAGE)

    fill(balloon.driver, 512, 1)

    assert empty == bytes(PAGE)
    assert balloon.board.mem.read(512 * PAGE, PAGE) == b"x" * PAGE


def test_conformance_balloon_keeps_one_buffer_of_statistics(balloon: Inflatable) -> None:
    """5.5.6.3: it comes back when new ones are wanted, which the driver then brings in it."""
    first = balloon.driver.submit(STATS, [stats((MEMFREE, 1))])
    balloon.driver.kick(STATS)
    balloon.board.steps.advance(9)
    early = balloon.driver.used(STATS)
    balloon.board.steps.advance(2)
    back, told = balloon.driver.used(STATS), balloon.driver.interrupts()
    balloon.driver.submit(STATS, [stats((MEMTOT, 2))])
    balloon.driver.kick(STATS)

    assert (early, back, told) == ([], [(first, 0)], INTERRUPT.USED_BUFFER)
    assert balloon.device.stats == {"MEMTOT": 2}
    assert balloon.driver.used(STATS) == []


def test_conformance_balloon_statistics_in_any_order(balloon: Inflatable) -> None:
    """5.5.6.3: unknown tags are skipped, the layout means nothing."""
    data = stats((MEMTOT, RAM), (0xFFFF, 7), (10, 8), (MEMFREE, 1 << 63))
    balloon.driver.submit(STATS, [data[:15], data[15:]])

    balloon.driver.kick(STATS)

    assert balloon.device.stats == {"MEMTOT": RAM, "MEMFREE": 1 << 63}


def test_conformance_balloon_queues_of_features_that_were_not_accepted(balloon: Inflatable) -> None:
    """5.5.2: without STATS_VQ there is no queue for statistics."""
    begin(balloon.driver, F.VERSION_1, [0, 1, 2])

    balloon.driver.request(2, [stats((MEMFREE, 1))])

    assert balloon.device.stats == {}
    assert ALL != F.VERSION_1


# Console device (5.3).


def test_conformance_console_no_emergency_write(terminal: Terminal) -> None:
    """5.3.4: emerg_wr works before DRIVER_OK where EMERG_WRITE is offered, which it is not: the write is ignored."""
    terminal.driver.set("Status", 0)
    terminal.driver.set("DeviceFeaturesSel", 0)

    terminal.driver.write_config(8, 4, ord("x"))

    assert not terminal.driver.get("DeviceFeatures") & 1 << 2
    assert (terminal.owner.data, terminal.driver.config(8, 4)) == (b"", 0)


def test_conformance_console_size(terminal: Terminal) -> None:
    """5.3.4: cols and rows, which SIZE makes valid; a change of them interrupts."""
    with terminal.device.lock:
        terminal.device.resize(132, 43)

    assert (terminal.driver.config(0, 2), terminal.driver.config(2, 2), terminal.driver.config(4, 4)) == (132, 43, 1)
    assert terminal.driver.interrupts() == INTERRUPT.CONFIGURATION


def test_conformance_console_size_of_a_port_is_told(switchboard: Terminal) -> None:
    """5.3.6.2: with MULTIPORT by a message, to a driver that has said it is ready, and with the newest size."""
    switchboard.device.resize(1, 1)
    early = hear(switchboard.driver)
    say(switchboard.driver, 0, PORT_READY, 1)
    hear(switchboard.driver)

    switchboard.device.resize(80, 25)
    switchboard.device.resize(100, 30)

    assert early == []
    assert hear(switchboard.driver) == [(0, RESIZE, struct.pack("<HH", 100, 30))]


def test_conformance_console_transmitted_buffers_come_back_empty(terminal: Terminal) -> None:
    """5.3.6: used length 0 whatever was printed, and even where there was room."""
    heads = [terminal.driver.submit(TX, [b"abc", b"def\n"]), terminal.driver.submit(TX, [b"g"], [16])]
    terminal.driver.kick(TX)

    assert terminal.driver.used(TX) == [(head, 0) for head in heads]
    assert terminal.owner.data == b"abcdef\ng"


def test_conformance_console_received_bytes_are_counted(terminal: Terminal) -> None:
    """5.3.6: as much as there is, into buffers of any layout."""
    heads = [terminal.driver.submit(RX, writable=sizes) for sizes in ([2, 1], [8], [8])]
    terminal.driver.kick(RX)

    terminal.device.receive(b"hello")
    terminal.board.steps.turn()

    assert terminal.driver.used(RX) == [(heads[0], 3), (heads[1], 2)]


def test_conformance_console_without_multiport_there_is_one_port(switchboard: Terminal) -> None:
    """5.3.2, 5.3.5: if MULTIPORT is not accepted the control queues and those of other ports are not there."""
    driver, text = switchboard.driver, Owner()
    switchboard.device.ports[0].on_data = text.take
    driver.start(F.VERSION_1 | CONSOLE_F.SIZE)

    driver.request(TX, [b"console"])
    driver.submit(TX1, [b"agent"])
    driver.submit(CONTROL_TX, [struct.pack("<IHH", 0, DEVICE_READY, 1)])
    driver.submit(RX1, writable=[16])
    for queue in (TX1, CONTROL_TX, RX1):
        driver.kick(queue)

    assert (text.data, switchboard.owner.data) == (b"console", b"")
    assert [driver.used(queue) for queue in (TX1, CONTROL_TX, RX1)] == [[], [], []]
    assert hear(driver) == []


def test_conformance_console_single_port_has_two_queues(terminal: Terminal) -> None:
    """5.3.2: MULTIPORT is offered only with more ports than one, and max_nr_ports says how many."""
    terminal.driver.set("DeviceFeaturesSel", 0)

    assert not terminal.driver.get("DeviceFeatures") & CONSOLE_F.MULTIPORT
    assert len(terminal.driver.queues) == 2
