"""What hostile guests do to a socket device: rows 47 to 52 of the list of known attacks, and section 3's points."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from vsocks import BUFFER_SIZE, CID, GUEST_PORT, PORT, ROOM, Guest, Packet

from kvmpy.virtio.queue import DESC_F
from kvmpy.virtio.vsock import RESETS, RX, TX
from kvmpy.virtio.vsock_stream import (
    BUFFER,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    END,
    HEADER,
    HOST_CID,
    INVALID,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    STREAM,
)

RESET = Packet(HOST_CID, CID, PORT, GUEST_PORT, 0, STREAM, RST, 0, 0, 0)
OTHER = GUEST_PORT + 1  # a port of the guest with a connection that must not suffer


def works(guest: Guest) -> bool:
    """Whether another connection does all that it should."""
    host = guest.call(src_port=OTHER)
    guest.send(op=RW, src_port=OTHER, data=b"hello")
    host.sendall(b"hi")
    guest.settle()
    fine = host.recv(64) == b"hello" and [packet.data for packet in guest.got()] == [b"hi"]
    guest.send(op=RST, src_port=OTHER)
    return fine and not guest.driver.needs_reset


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# 47, 48, 49: lengths.


@pytest.mark.parametrize("size", [1, 5, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF - 43, 0xFFFFFFFF - 44])
def test_hostile_47_payload_shorter_than_the_header_says(guest: Guest, size: int) -> None:
    host = guest.call()

    guest.send(op=RW, size=size)

    assert (host.recv(64), guest.got()) == (b"", [RESET])
    assert works(guest)


def test_hostile_47_packet_that_ends_with_ram(guest: Guest) -> None:
    """The header says 64 KiB, the descriptor is the last bytes there are."""
    host = guest.call()
    raw = bytes(Packet(op=RW, size=1 << 16, data=b"secret"))
    place = guest.board.mem.regions[-1].end - len(raw)
    guest.board.mem.write(place, raw)
    ring = guest.driver.queues[TX]
    head = ring.next_desc
    guest.driver.descriptor(ring.desc, head, place, len(raw), 0, 0)
    ring.next_desc += 1
    guest.driver.publish(TX, head)
    guest.driver.kick(TX)
    guest.settle()

    assert (host.recv(64), guest.got()) == (b"", [RESET])
    assert works(guest)


@pytest.mark.parametrize("cut", [0, 1, 43])
def test_hostile_47_packet_without_a_header(guest: Guest, cut: int) -> None:
    """Nobody is meant: the buffer comes back, and nothing else happens."""
    guest.call()
    head = guest.driver.submit(TX, readable=[bytes(Packet(op=RW))[:cut]])
    guest.driver.kick(TX)

    assert (head, 0) in guest.driver.used(TX)
    assert guest.got() == []
    assert works(guest)


def test_hostile_48_more_payload_than_the_header_says(guest: Guest) -> None:
    """2.7.4: a buffer may be larger than what is in it."""
    host = guest.call()

    guest.send(op=RW, size=5, data=b"hello, world")

    assert host.recv(64) == b"hello"


def test_hostile_48_payload_in_what_the_device_may_write(guest: Guest) -> None:
    host = guest.call()
    guest.driver.submit(TX, readable=[bytes(Packet(op=RW, size=100))], writable=[100])
    guest.driver.kick(TX)
    guest.settle()

    assert (host.recv(64), guest.got()) == (b"", [RESET])


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST])
def test_hostile_48_payload_of_a_packet_that_has_none(guest: Guest, op: int) -> None:
    """It goes nowhere."""
    host = guest.call()

    guest.send(op=op, flags=END.RECEIVE, data=b"hidden")
    guest.send(op=RST)

    assert host.recv(64) == b""


@pytest.mark.parametrize("size", [BUFFER + 1, 1 << 20, 8 << 20])
def test_hostile_49_packet_larger_than_the_buffer(guest: Guest, size: int) -> None:
    host = guest.call()

    guest.send(op=RW, data=bytes(size))

    assert (host.recv(64), guest.got()) == (b"", [RESET])
    assert works(guest)


# 50: one side stops.


def test_hostile_50_no_buffers_while_the_host_sends_and_closes(transport: str) -> None:
    """Nothing spins, see Guest.settle, and nothing is lost when there are some."""
    guest = Guest(transport, buffers=1)
    guest.listen()
    guest.send(op=REQUEST)
    guest.taken()
    host = guest.accepted[0]
    host.sendall(bytes(10_000))
    guest.settle()
    idle = guest.rounds
    host.close()
    guest.settle()
    idle = max(idle, guest.rounds)
    guest.give(8)

    packets = guest.taken()
    assert idle <= 3
    assert sum(len(packet.data) for packet in packets) == 10_000
    assert packets[-1].op == SHUTDOWN
    guest.close()


def test_hostile_50_no_credit_while_the_host_sends_and_closes(guest: Guest) -> None:
    host = guest.call(buf_alloc=0)
    host.sendall(bytes(10_000))
    host.close()
    guest.settle()
    asked = [packet.op for packet in guest.got()]
    guest.settle()
    idle = guest.rounds
    guest.send(op=CREDIT_UPDATE)

    packets = guest.got()
    assert (asked, idle) == ([CREDIT_REQUEST], 0)
    assert sum(len(packet.data) for packet in packets) == 10_000
    assert packets[-1].op == SHUTDOWN


def test_hostile_50_no_buffers_for_answers(transport: str) -> None:
    """Packets of the guest wait when there are too many; they are obeyed when it takes the answers (5.10.6.1)."""
    guest = Guest(transport, buffers=0)
    guest.listen()
    for n in range(RESETS + 60):
        guest.driver.submit(TX, readable=[bytes(Packet(op=RW, src_port=n))])
        guest.driver.kick(TX)
        guest.driver.used(TX)
        taken = guest.driver.transport.core.queues[TX]._next_used
    guest.settle()
    idle, kept = guest.rounds, len(guest.device._resets)

    guest.give(100)
    answers = guest.taken()
    guest.give(100)
    answers += guest.taken()

    assert (taken, kept) == (RESETS, RESETS)
    assert idle <= 1
    assert [packet.dst_port for packet in answers] == list(range(RESETS + 60))
    guest.close()


def test_hostile_50_buffers_that_are_too_small(transport: str) -> None:
    """For a header: they come back empty. For a payload: what fits without one is said, and nothing is lost."""
    guest = Guest(transport, buffers=0)
    guest.listen()
    guest.give(8, 43)
    guest.send(op=REQUEST)
    none = guest.driver.used(RX)
    guest.give(2, HEADER.size)
    first = guest.taken()
    guest.accepted[0].sendall(b"hello")
    guest.settle()
    second = guest.taken()
    guest.give(2)

    assert [size for _, size in none] == [0] * len(none)
    assert [packet.op for packet in first + second] == [RESPONSE, CREDIT_UPDATE]
    assert [packet.data for packet in guest.taken()] == [b"hello"]
    guest.close()


def test_hostile_50_host_that_does_not_read(guest: Guest) -> None:
    """It holds what the guest had credit for, the other connections go on."""
    guest.call()
    sent = 0
    while not guest.device._streams[PORT, GUEST_PORT].socket.held >= BUFFER - 4096:
        guest.send(op=RW, data=bytes(4096))
        sent += 4096
    guest.got()
    guest.settle()

    assert guest.rounds == 0
    assert works(guest)


# 51: credit.


def test_hostile_51_more_than_the_credit(guest: Guest) -> None:
    host = guest.call()
    answers: list[Packet] = []
    while not answers or answers[-1].op == CREDIT_UPDATE:
        guest.send(op=RW, data=bytes(1 << 16))
        answers += guest.got()

    assert answers[-1] == RESET
    assert len(read_all(host)) <= 2 * BUFFER + (1 << 20)
    assert works(guest)


def read_all(stream: socket.socket) -> bytes:
    data = b""
    while piece := stream.recv(1 << 20):
        data += piece
    return data


@pytest.mark.parametrize("fwd_cnt", [1, 6, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_hostile_51_guest_has_taken_more_than_was_sent(guest: Guest, fwd_cnt: int) -> None:
    """Such a count is none: there is no credit by it."""
    host = guest.call(buf_alloc=10)
    guest.send(op=CREDIT_UPDATE, buf_alloc=10, fwd_cnt=fwd_cnt)
    host.sendall(bytes(20))
    guest.settle()

    assert [len(packet.data) for packet in guest.got() if packet.op == RW] == [10]
    assert works(guest)


def test_hostile_51_count_that_goes_back(guest: Guest) -> None:
    """Linux sends from several CPUs: an older count may come later."""
    host = guest.call(buf_alloc=100)
    host.sendall(bytes(200))
    guest.settle()
    guest.got()
    guest.send(op=CREDIT_UPDATE, buf_alloc=100, fwd_cnt=60)
    guest.send(op=CREDIT_UPDATE, buf_alloc=100, fwd_cnt=10)
    guest.send(op=CREDIT_UPDATE, buf_alloc=100, fwd_cnt=100)

    assert sum(len(packet.data) for packet in guest.got()) == 100


@pytest.mark.parametrize("buf_alloc", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_hostile_51_any_room(guest: Guest, buf_alloc: int) -> None:
    """A packet is never longer than its buffer, and the room is what counts, also when it shrinks."""
    host = guest.call(buf_alloc=ROOM)
    host.sendall(bytes(BUFFER_SIZE * 2))
    guest.settle()
    before = sum(len(packet.data) for packet in guest.got())
    guest.send(op=CREDIT_UPDATE, buf_alloc=buf_alloc, fwd_cnt=0)
    host.sendall(bytes(BUFFER_SIZE))
    guest.settle()

    after = sum(len(packet.data) for packet in guest.got())
    assert (before, after) == (2 * BUFFER_SIZE, BUFFER_SIZE if buf_alloc > before else 0)
    assert works(guest)


# 52: addresses, kinds, states, numbers.


@pytest.mark.parametrize("cid", [0, 1, 2, CID + 1, 0xFFFFFFFF, CID | 1 << 32, 1 << 63])
@pytest.mark.parametrize("op", [REQUEST, RW, SHUTDOWN, RST])
def test_hostile_52_from_another(guest: Guest, cid: int, op: int) -> None:
    """The answer goes where it came from, the connection that it looks like does not suffer."""
    guest.call()
    guest.send(src_cid=cid, op=op)

    assert guest.got() == ([] if op == RST else [RESET._replace(dst_cid=cid)])
    assert (PORT, GUEST_PORT) in guest.device._streams


@pytest.mark.parametrize("cid", [0, 1, CID, CID + 1, 0xFFFFFFFF, HOST_CID | 1 << 32])
@pytest.mark.parametrize("op", [REQUEST, RW, SHUTDOWN, RST])
def test_hostile_52_to_another(guest: Guest, cid: int, op: int) -> None:
    guest.call()
    guest.send(dst_cid=cid, op=op)

    assert guest.got() == ([] if op == RST else [RESET._replace(src_cid=cid)])
    assert (PORT, GUEST_PORT) in guest.device._streams


@pytest.mark.parametrize("kind", [0, 2, 3, 0xFFFF])
@pytest.mark.parametrize("op", [REQUEST, RW, RST])
def test_hostile_52_unknown_type(guest: Guest, kind: int, op: int) -> None:
    """5.10.6.4.2: an RST must be sent."""
    guest.call()
    guest.send(type=kind, op=op)

    assert guest.got() == ([] if op == RST else [RESET._replace(type=kind)])
    assert (PORT, GUEST_PORT) in guest.device._streams


@pytest.mark.parametrize("op", [INVALID, REQUEST, RESPONSE, 8, 9, 0xFF, 0x100, 0xFFFF])
def test_hostile_52_operation_that_has_no_place(guest: Guest, op: int) -> None:
    host = guest.call()
    guest.send(op=op)

    assert (host.recv(64), guest.got()) == (b"", [RESET])
    assert works(guest)


@pytest.mark.parametrize("op", [INVALID, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xFFFF])
def test_hostile_52_no_such_connection(guest: Guest, op: int) -> None:
    guest.send(op=op, data=b"x")

    assert guest.got() == [RESET]


def test_hostile_52_rst_has_no_answer(guest: Guest) -> None:
    guest.send(*(Packet(op=RST, src_port=port, dst_port=port) for port in (0, 1, PORT, GUEST_PORT, 0xFFFFFFFF)))

    assert guest.got() == []


@pytest.mark.parametrize("op", [REQUEST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8])
def test_hostile_52_answer_that_is_none(guest: Guest, op: int) -> None:
    """To a connection of the host's: it is refused."""
    future = guest.connect()
    (request,) = guest.got()

    guest.answer(request, op=op, flags=END.BOTH)

    with pytest.raises(ConnectionRefusedError):
        future.result(5)
    assert [packet.op for packet in guest.got()] == [RST]


def test_hostile_52_answer_to_what_was_not_asked_yet(transport: str) -> None:
    guest = Guest(transport, buffers=0)
    future = guest.connect()
    (stream,) = guest.device._streams.values()
    guest.send(op=RESPONSE, src_port=stream.key[1], dst_port=stream.key[0])

    with pytest.raises(ConnectionRefusedError):
        future.result(5)
    guest.close()


@pytest.mark.parametrize("flags", [0, 4, 0xFFFFFFFC])
def test_hostile_52_unknown_flags(guest: Guest, flags: int) -> None:
    """Of SHUTDOWN: they mean nothing."""
    host = guest.call()
    guest.send(op=SHUTDOWN, flags=flags)
    guest.send(op=RW, data=b"hello")

    assert (host.recv(64), guest.got()) == (b"hello", [])


def test_hostile_52_flood_of_requests(guest: Guest) -> None:
    """There is a limit; beyond it they are refused, no descriptor is lost, and all can be had again."""
    before = descriptors()
    guest.device.limit = 50
    answers = []
    for start in range(0, 10_000, 100):
        guest.send(*(Packet(op=REQUEST, src_port=port) for port in range(start, start + 100)))
        for _ in range(4):
            answers += [packet.op for packet in guest.got()]
    most = descriptors() - before
    guest.send(*(Packet(op=RST, src_port=port) for port in range(50)))
    for host in guest.accepted:
        host.close()

    assert (answers.count(RESPONSE), answers.count(RST)) == (50, 9_950)
    assert (most, descriptors()) == (100, before)
    assert works(guest)


def test_hostile_52_connections_that_come_and_go(guest: Guest) -> None:
    """Ports of the guest and of the host are used again and again."""
    before = descriptors()
    for _ in range(300):
        guest.call().close()
        guest.send(op=SHUTDOWN, flags=END.BOTH)
        guest.got()
        guest.got()
        host, request = guest.connected()
        guest.answer(request, op=SHUTDOWN, flags=END.BOTH)
        host.close()
        assert [packet.op for packet in guest.got()] == [RST]

    assert descriptors() == before
    assert (guest.device._streams, guest.device._retired, guest.device._parting) == ({}, set(), {})


def test_hostile_52_no_descriptors_left(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", fail)
        guest.send(op=REQUEST)
        refused = guest.got()
        with pytest.raises(OSError, match="Too many open files"):
            guest.device.connect(GUEST_PORT)

    assert refused == [RESET]
    assert works(guest)


def test_hostile_52_ports_are_numbers_in_names(reachable: Guest, tmp_path: Path) -> None:
    """Nothing that a guest asks for leads to another file than `path`_PORT."""
    reachable.send(*(Packet(op=REQUEST, dst_port=port) for port in (0, 0x2F2F2E2E, 0xFFFFFFFF)))

    assert reachable.ops() == [RST] * 3


# 20: the header is read once.


def test_hostile_20_header_that_changes_while_it_is_read(guest: Guest) -> None:
    """Its length was checked: what it says later does not count. Here header and payload are the same bytes."""
    host = guest.call()
    raw = bytes(Packet(op=RW, size=44))
    at = guest.driver.allocate(len(raw), 1)
    guest.board.mem.write(at, raw)
    ring = guest.driver.queues[TX]
    head = ring.next_desc
    guest.driver.descriptor(ring.desc, head, at, len(raw), DESC_F.NEXT, head + 1)
    guest.driver.descriptor(ring.desc, head + 1, at, len(raw), 0, 0)
    ring.next_desc += 2
    guest.driver.publish(TX, head)
    guest.driver.kick(TX)

    assert host.recv(64) == raw


@pytest.mark.parametrize("seed", range(20))
def test_hostile_random_packets(guest: Guest, seed: int) -> None:
    """Whatever comes: no exception, nothing spins, no descriptor is lost, and the device works."""
    before, chance = descriptors(), random.Random(seed)
    for _ in range(150):
        guest.send(*(some_packet(chance, guest) for _ in range(chance.randrange(1, 5))))
        if guest.accepted and chance.random() < 0.5:
            poke(chance, chance.choice(guest.accepted))
        guest.got()
    for host in guest.accepted:
        host.close()
    for stream in list(guest.device._streams.values()):
        host_port, guest_port = stream.key
        guest.send(src_port=guest_port, dst_port=host_port, op=CREDIT_UPDATE, fwd_cnt=stream._sent)
    for _ in range(64):
        guest.got()
    guest.board.steps.advance(10)
    guest.settle()
    guest.got()

    assert works(guest)
    assert guest.device._streams == {}
    assert descriptors() <= before + len(guest.device._retired) + 2


def some_packet(chance: random.Random, guest: Guest) -> Packet:
    return Packet(
        src_cid=chance.choice([CID] * 9 + [2]),
        src_port=chance.randrange(4),
        dst_port=chance.choice([PORT] * 9 + [1]),
        size=chance.choice([-1] * 9 + [5000]),
        type=chance.choice([STREAM] * 19 + [2]),
        op=chance.choice([REQUEST] * 3 + [RW] * 5 + list(range(9))),
        flags=chance.randrange(4),
        buf_alloc=chance.choice([ROOM] * 3 + [0, 10]),
        fwd_cnt=chance.choice([0, 100, 0xFFFFFFFF]),
        data=os.urandom(chance.choice([0, 1, 100, 3000])),
    )


def poke(chance: random.Random, host: socket.socket) -> None:
    """The host's program does something as well, and does not wait for anything."""
    deeds: Sequence[Callable[[], object]] = (
        lambda: host.setblocking(False),
        lambda: host.send(bytes(chance.randrange(9000))),
        lambda: host.recv(4096),
        lambda: host.shutdown(socket.SHUT_WR),
        host.close,
    )
    with suppress(OSError):
        deeds[0]()
        chance.choice(deeds)()


# Section 3.


def test_conformance_vsock_every_packet_tells_credit(guest: Guest) -> None:
    """5.10.6.3: buf_alloc and fwd_cnt are valid in each packet of a stream."""
    host = guest.call()
    guest.send(op=RW, data=b"12345")
    guest.send(op=CREDIT_REQUEST)
    host.sendall(b"x")
    host.recv(64)
    host.close()
    guest.settle()

    packets = guest.got()
    assert [packet.op for packet in packets] == [CREDIT_UPDATE, RW, SHUTDOWN]
    assert {(packet.buf_alloc, packet.fwd_cnt) for packet in packets} == {(BUFFER, 5)}


def test_conformance_vsock_address_is_no_reserved_one(guest: Guest) -> None:
    """5.10.4: the upper half is zero."""
    assert struct.pack("<II", guest.driver.config(0, 4), guest.driver.config(4, 4)) == struct.pack("<Q", CID)


def test_conformance_vsock_tx_goes_on_without_rx(transport: str) -> None:
    """5.10.6.1.2: packets of the guest are taken while there is no buffer for the device's."""
    guest = Guest(transport, buffers=1)
    guest.listen()
    guest.send(op=REQUEST)
    host = guest.accepted[0]
    for _ in range(100):
        guest.send(op=RW, data=bytes(1000))
        guest.driver.used(TX)
        assert len(host.recv(1000)) == 1000
    guest.close()
