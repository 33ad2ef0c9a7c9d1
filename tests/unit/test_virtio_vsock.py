"""Streams between guest and host (virtio/vsock.py)."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from vsocks import BUFFER_SIZE, BUFFERS, CID, GUEST_PORT, PORT, ROOM, Guest, Packet

from kvmpy import catalogue
from kvmpy.core.errors import ConfigError, HostError
from kvmpy.testing import FakeBoard
from kvmpy.virtio.spec import Type
from kvmpy.virtio.vsock import EVENT, FIRST_HOST_PORT, LINGER, MAX_CONNECTIONS, RX, TX, Vsock
from kvmpy.virtio.vsock_stream import (
    BUFFER,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    END,
    HEADER,
    HOST_CID,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    STREAM,
    UPDATE,
)

PAYLOAD = BUFFER_SIZE - HEADER.size


def sent(packets: list[Packet]) -> bytes:
    """The bytes of a stream to the guest."""
    return b"".join(packet.data for packet in packets if packet.op == RW)


def read(guest: Guest, stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += stream.recv(size - len(data)) or pytest.fail(f"the end after {len(data)} bytes")
        guest.settle()
    return data


# The device.


def test_what_the_guest_sees(guest: Guest) -> None:
    assert guest.driver.get("Status") & 4
    assert guest.device.type_id == Type.VSOCK == 19
    assert (guest.driver.config(0, 4), guest.driver.config(4, 4)) == (CID, 0)


def test_header_is_as_the_specification_has_it() -> None:
    """5.10.6: 44 bytes, these fields in this order."""
    raw = bytes(Packet(3, 2, 0x1001, 0x1002, 5, 1, RW, 2, 0x40000, 7, b"hello"))

    assert raw == bytes.fromhex(
        "0300000000000000 0200000000000000 01100000 02100000 05000000 0100 0500 02000000 00000400 07000000 68656c6c6f"
    )


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32])
def test_reserved_addresses(cid: int) -> None:
    with pytest.raises(ConfigError, match="use 3 to 4294967294"):
        Vsock(cid)


def test_catalogue(tmp_path: Path) -> None:
    device = catalogue.make(f"virtio-vsock,cid=52,path={tmp_path / 'v.sock'}")

    assert isinstance(device, Vsock)
    assert (device.cid, device.path, catalogue.make("virtio-vsock").cid) == (52, tmp_path / "v.sock", CID)


# Connections.


def test_the_guest_connects(guest: Guest) -> None:
    guest.send(op=REQUEST)

    (answer,) = guest.got()
    assert answer == Packet(HOST_CID, CID, PORT, GUEST_PORT, 0, STREAM, RESPONSE, 0, BUFFER, 0)
    assert len(guest.accepted) == 1


def test_both_directions(guest: Guest) -> None:
    host = guest.call()

    guest.send(op=RW, data=b"from the guest")
    host.sendall(b"from the host")
    guest.settle()

    assert host.recv(64) == b"from the guest"
    assert guest.got() == [Packet(HOST_CID, CID, PORT, GUEST_PORT, 13, STREAM, RW, 0, BUFFER, 14, b"from the host")]


def test_the_host_connects(guest: Guest) -> None:
    host, request = guest.connected()

    host.sendall(b"hello")
    guest.settle()
    guest.answer(request, op=RW, data=b"hi")

    assert request == Packet(HOST_CID, CID, FIRST_HOST_PORT, GUEST_PORT, 0, STREAM, REQUEST, 0, BUFFER, 0)
    assert (sent(guest.got()), host.recv(64)) == (b"hello", b"hi")


def test_nobody_listens_on_the_host(guest: Guest) -> None:
    guest.send(op=REQUEST, dst_port=PORT + 1)

    assert guest.got() == [Packet(HOST_CID, CID, PORT + 1, GUEST_PORT, 0, STREAM, RST, 0, 0, 0)]


def test_nobody_listens_in_the_guest(guest: Guest) -> None:
    future = guest.connect()
    (request,) = guest.got()

    guest.answer(request, op=RST)

    with pytest.raises(ConnectionRefusedError, match="nobody listens at port 5000 of the guest"):
        future.result(5)
    assert guest.got() == []


def test_there_is_no_driver_yet(guest: Guest) -> None:
    guest.driver.set("Status", 0)

    with pytest.raises(ConnectionRefusedError, match="driver is not up"):
        guest.device.connect(GUEST_PORT)


def test_the_host_makes_too_many_connections(guest: Guest) -> None:
    guest.device.limit = 1
    guest.call()

    with pytest.raises(ConnectionRefusedError, match="too many connections"):
        guest.device.connect(GUEST_PORT)


def test_a_device_without_a_machine() -> None:
    with pytest.raises(ConnectionRefusedError):
        Vsock().connect(GUEST_PORT)


def test_the_guest_does_not_answer(guest: Guest) -> None:
    """It is told that the host has given up."""
    future = guest.connect(timeout=0.3)  # until then the guest has seen the request

    with pytest.raises(TimeoutError, match=r"port 5000 of the guest has not answered in 0\.3 s"):
        future.result(5)
    guest.settle()

    assert guest.ops() == [REQUEST, RST]


def test_a_request_that_the_guest_has_not_seen(transport: str) -> None:
    """When the host gives up, it never sees it."""
    guest = Guest(transport, buffers=0)

    future = guest.connect(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.result(5)
    guest.settle()
    guest.give(4)

    assert guest.ops() == []
    guest.close()


def test_the_driver_goes_while_the_host_connects(guest: Guest) -> None:
    future = guest.connect()

    guest.driver.set("Status", 0)

    with pytest.raises(ConnectionRefusedError):
        future.result(5)


@pytest.mark.parametrize("port", [-1, 0xFFFFFFFF, 1 << 32])
def test_ports_that_are_none(guest: Guest, port: int) -> None:
    with pytest.raises(ValueError, match="port"):
        guest.device.connect(port)
    with pytest.raises(ValueError, match="port"):
        guest.device.listen(port, print)


def test_a_port_that_is_taken(guest: Guest) -> None:
    with pytest.raises(ValueError, match="port 1024 of the host is taken"):
        guest.listen()


def test_ports_of_the_host_differ(guest: Guest) -> None:
    _, first = guest.connected()
    _, second = guest.connected()

    assert first.src_port != second.src_port


def test_ports_of_the_host_are_found_again(guest: Guest) -> None:
    """The count begins anew, and passes over those in use."""
    _, first = guest.connected()
    guest.device._ports = iter(range(FIRST_HOST_PORT, FIRST_HOST_PORT + 2))

    _, second = guest.connected()

    assert (first.src_port, second.src_port) == (FIRST_HOST_PORT, FIRST_HOST_PORT + 1)


# Ends.


def test_the_host_closes(guest: Guest) -> None:
    """5.10.6.5: SHUTDOWN of both, confirmed with RST; the tuple can then be used again."""
    host = guest.call()
    host.sendall(b"bye")
    host.close()
    guest.settle()
    packets = guest.got()

    guest.send(op=RST)
    guest.call()

    assert [(packet.op, packet.flags, packet.data) for packet in packets] == [
        (RW, 0, b"bye"),
        (SHUTDOWN, END.BOTH, b""),
    ]


def test_the_host_sends_no_more(guest: Guest) -> None:
    """It can still read."""
    host = guest.call()
    host.shutdown(socket.SHUT_WR)
    guest.settle()
    first = guest.got()

    guest.send(op=RW, data=b"answer")
    heard = host.recv(64)
    host.close()
    guest.settle()
    second = guest.got()

    assert heard == b"answer"
    assert [(packet.op, packet.flags) for packet in first + second] == [(SHUTDOWN, END.SEND), (SHUTDOWN, END.BOTH)]


def test_the_host_reads_no_more(guest: Guest) -> None:
    """The guest is told when it sends the next time; what the host has sent still arrives."""
    host = guest.call()
    host.shutdown(socket.SHUT_RD)
    guest.settle()
    host.sendall(b"last")
    guest.settle()

    guest.send(op=RW, data=b"unheard")

    assert [(packet.op, packet.flags, packet.data) for packet in guest.got()] == [
        (RW, 0, b"last"),
        (SHUTDOWN, END.RECEIVE, b""),
    ]


def test_the_guest_closes(guest: Guest) -> None:
    """What it has sent arrives before the end."""
    host = guest.call()

    guest.send(Packet(op=RW, data=b"bye"), Packet(op=SHUTDOWN, flags=END.BOTH))

    assert (host.recv(64), host.recv(64), guest.ops()) == (b"bye", b"", [RST])


@pytest.mark.parametrize("ends", [[END.SEND, END.RECEIVE], [END.RECEIVE, END.SEND], [END.SEND, END.BOTH]])
def test_the_guest_closes_half_by_half(guest: Guest, ends: list[int]) -> None:
    """Ends are for good (5.10.6.5): they add up."""
    host = guest.call()

    guest.send(*(Packet(op=SHUTDOWN, flags=flags) for flags in ends))

    assert host.recv(64) == b""
    assert guest.ops()[-1] == RST
    guest.send(op=RW, data=b"x")
    assert guest.ops() == [RST]


def test_the_guest_sends_no_more(guest: Guest) -> None:
    """It can still read, and then the host ends it."""
    host = guest.call()
    guest.send(Packet(op=RW, data=b"question"), Packet(op=SHUTDOWN, flags=END.SEND))
    question = read(guest, host, 8), host.recv(1)

    host.sendall(b"answer")
    guest.settle()
    answer = sent(guest.got())
    host.close()
    guest.settle()

    assert (question, answer) == ((b"question", b""), b"answer")
    assert [(packet.op, packet.flags) for packet in guest.got()] == [(SHUTDOWN, END.BOTH)]


def test_the_guest_sends_no_more_while_the_host_is_slow(guest: Guest) -> None:
    """The end comes behind all that was sent before it."""
    host = guest.call()
    size = len(fill_up(guest)) + 10_000

    guest.send(Packet(op=RW, data=bytes(10_000)), Packet(op=SHUTDOWN, flags=END.SEND))

    assert len(read(guest, host, size)) == size
    assert host.recv(64) == b""


def test_the_guest_sends_behind_its_end(guest: Guest) -> None:
    host = guest.call()

    guest.send(Packet(op=SHUTDOWN, flags=END.SEND), Packet(op=RW, data=b"x"))

    assert (host.recv(64), guest.ops()) == (b"", [RST])


def test_the_guest_reads_no_more(guest: Guest) -> None:
    """The host's program hears of it as from any socket."""
    host = guest.call()

    guest.send(op=SHUTDOWN, flags=END.RECEIVE)

    with pytest.raises(BrokenPipeError):
        host.sendall(b"x")
    guest.send(op=RW, data=b"still")
    assert host.recv(64) == b"still"


def test_the_guest_resets(guest: Guest) -> None:
    host = guest.call()

    guest.send(op=RST)

    assert (host.recv(64), guest.ops()) == (b"", [])


def test_both_close_at_once(guest: Guest) -> None:
    """Each answers the other's SHUTDOWN; nobody answers an RST."""
    host = guest.call()
    host.close()
    guest.send(op=SHUTDOWN, flags=END.BOTH)
    first = guest.ops()
    guest.send(op=RST)

    assert RST in first
    assert guest.ops() == []


def test_the_guest_does_not_confirm_the_end(guest: Guest) -> None:
    """It is told with an RST that its time is over (5.10.6.5)."""
    guest.call().close()
    guest.settle()
    first = guest.ops()

    guest.board.steps.advance(LINGER - 1)
    guest.settle()
    early = guest.ops()
    guest.board.steps.advance(2)
    guest.settle()

    assert (first, early, guest.ops()) == ([SHUTDOWN], [], [RST])
    assert guest.device._streams == {}


def test_ends_that_are_confirmed_leave_no_timer(guest: Guest) -> None:
    for _ in range(3):
        guest.call().close()
        guest.settle()
        guest.got()
        guest.send(op=RST)

    guest.board.steps.advance(2 * LINGER)
    guest.settle()

    assert (guest.ops(), guest.board.steps._due) == ([], [])


def test_output_is_left_when_the_guest_has_gone(guest: Guest) -> None:
    """A program that reads slowly gets all of it, and then the end."""
    host = guest.call()
    fill, data = fill_up(guest), os.urandom(BUFFER // 2)
    guest.send(op=RW, data=data)
    guest.send(op=SHUTDOWN, flags=END.BOTH)
    last = guest.got()[-1]

    got = b""
    while piece := host.recv(1 << 16):
        got += piece
        guest.settle()

    assert last.op == RST
    assert got == fill + data
    assert guest.device._retired == set()


def test_output_is_left_when_nobody_reads(guest: Guest) -> None:
    host = guest.call()
    fill_up(guest)
    guest.send(Packet(op=RW, data=bytes(100)), Packet(op=SHUTDOWN, flags=END.BOTH))
    kept = len(guest.device._retired)
    with pytest.raises(BrokenPipeError):
        host.sendall(b"x")

    host.close()
    guest.settle()

    assert (kept, guest.device._retired) == (1, set())


def fill_up(guest: Guest, room: int = ROOM) -> bytes:
    """What the guest has sent when the socket of a program that does not read is full, and the device begins to keep
    what comes."""
    (stream,) = guest.device._streams.values()
    data = b""
    while not stream.socket.held:
        guest.send(op=RW, data=bytes(4096), buf_alloc=room)
        data += bytes(4096)
    return data


# Credit (5.10.6.3).


def test_the_host_sends_no_more_than_the_guest_has_room_for(guest: Guest) -> None:
    host = guest.call(buf_alloc=10_000)
    host.sendall(bytes(range(200)) * 100)
    guest.settle()
    first = guest.got()
    silent = guest.got()

    guest.send(op=CREDIT_UPDATE, buf_alloc=10_000, fwd_cnt=4_000)
    second = guest.got()
    guest.send(op=CREDIT_UPDATE, buf_alloc=30_000, fwd_cnt=14_000)
    third = guest.got()

    assert [len(sent(packets)) for packets in (first, second, third)] == [10_000, 4_000, 6_000]
    assert sent(first + second + third) == bytes(range(200)) * 100
    assert (first[-1].op, silent, second[-1].op) == (CREDIT_REQUEST, [], CREDIT_REQUEST)


def test_the_guest_has_no_credit_at_all(guest: Guest) -> None:
    """It is asked for some, once; the answer that there is none changes nothing."""
    host = guest.call(buf_alloc=0)
    host.sendall(b"hello")
    guest.settle()
    first = guest.ops()
    guest.send(op=CREDIT_UPDATE, buf_alloc=0)
    second = guest.ops()
    guest.send(op=CREDIT_UPDATE, buf_alloc=5)

    assert (first, second, sent(guest.got())) == ([CREDIT_REQUEST], [], b"hello")


def test_the_guest_is_not_asked_again(guest: Guest) -> None:
    """While it has not answered, whatever else happens on the connection."""
    host = guest.call(buf_alloc=0)
    size = len(fill_up(guest, room=0))
    host.sendall(b"hello")
    guest.settle()
    first = guest.ops()

    read(guest, host, size)

    assert first.count(CREDIT_REQUEST) == 1
    assert CREDIT_REQUEST not in guest.ops()


def test_the_guest_asks_for_credit(guest: Guest) -> None:
    host = guest.call()
    guest.send(op=RW, data=b"hello")
    guest.send(op=CREDIT_REQUEST)

    (answer,) = guest.got()
    assert host.recv(5) == b"hello"
    assert (answer.op, answer.buf_alloc, answer.fwd_cnt) == (CREDIT_UPDATE, BUFFER, 5)


def test_the_guest_is_told_of_room_before_it_has_none(guest: Guest) -> None:
    host = guest.call()
    told = 0
    for n in range(1, 2 * BUFFER // 4096 + 1):
        guest.send(op=RW, data=bytes(4096))
        read(guest, host, 4096)
        told = ([told] + [packet.fwd_cnt for packet in guest.got() if packet.op == CREDIT_UPDATE])[-1]
        assert 4096 * n - told < UPDATE


def test_no_credit_for_what_the_host_has_not_taken(guest: Guest) -> None:
    host = guest.call()
    filled = len(fill_up(guest))
    guest.send(op=RW, data=bytes(50_000))
    guest.send(op=CREDIT_REQUEST)
    full = guest.got()[-1]
    read(guest, host, filled + 50_000)
    guest.settle()
    guest.send(op=CREDIT_REQUEST)
    empty = guest.got()[-1]

    assert full.fwd_cnt < filled
    assert empty.fwd_cnt == filled + 50_000


def test_counters_wrap(guest: Guest) -> None:
    """5.10.6.3: they run freely, with 32 bits."""
    host = guest.call()
    (stream,) = guest.device._streams.values()
    stream._sent = stream._taken = stream._received = stream._told = 0xFFFFFFF0

    host.sendall(bytes(40))
    guest.settle()
    out, left = guest.got(), stream._credit
    guest.send(op=RW, data=bytes(40), fwd_cnt=0x18)
    guest.send(op=CREDIT_REQUEST, fwd_cnt=0x18)
    (update,) = guest.got()

    assert (len(sent(out)), left, stream._credit) == (40, ROOM - 40, ROOM)
    assert (update.fwd_cnt, len(host.recv(64))) == (0x18, 40)


# Buffers.


def test_large_transfers_arrive_as_they_were_sent(guest: Guest) -> None:
    host = guest.call()
    data = os.urandom(3 << 18)
    given, got, taken = 0, b"", b""
    host.setblocking(False)
    while len(got) < len(data) or len(taken) < len(data):
        if given < len(data):
            given += host.send(data[given : given + (1 << 16)])
        guest.send(op=RW, data=data[len(taken) : len(taken) + (1 << 14)], fwd_cnt=len(got))
        got += sent(guest.got())
        host.settimeout(5)
        taken += read(guest, host, len(data[len(taken) : len(taken) + (1 << 14)]))

    assert got == data
    assert taken == data


def test_the_host_waits_for_buffers(transport: str) -> None:
    guest = Guest(transport, buffers=0)
    guest.listen()
    guest.send(op=REQUEST)
    host = guest.accepted[0]
    host.sendall(b"hello")
    guest.settle()
    nothing = guest.taken()
    guest.give(2)

    assert (nothing, [packet.op for packet in guest.taken()]) == ([], [RESPONSE, RW])
    guest.close()


@pytest.mark.parametrize("layout", [[44, 4096], [1, 43, 100, 100, 4096], [44, 0, 4096]])
def test_buffers_in_pieces(transport: str, layout: list[int]) -> None:
    """2.7.4: how a buffer is cut means nothing. Linux before 6.2 gives header and payload apart."""
    guest = Guest(transport, buffers=1)
    guest.listen()
    guest.send(op=REQUEST)
    guest.taken()
    guest.driver.submit(RX, writable=layout)
    guest.driver.kick(RX)

    guest.accepted[0].sendall(bytes(range(250)))
    guest.settle()

    assert sent(guest.taken()) == bytes(range(250))
    guest.close()


def test_packets_in_pieces(guest: Guest) -> None:
    host = guest.call()
    raw = bytes(Packet(op=RW, data=b"hello"))
    guest.driver.submit(TX, readable=[raw[:1], raw[1:43], raw[43:46], raw[46:]])
    guest.driver.kick(TX)

    assert host.recv(64) == b"hello"


def test_streams_take_turns(guest: Guest) -> None:
    """One that has much to send does not keep others waiting."""
    busy, other = guest.call(src_port=1), guest.call(src_port=2)
    busy.sendall(bytes(BUFFERS * PAYLOAD + 20_000))
    guest.settle()
    other.sendall(b"hello")
    guest.settle()
    first = guest.taken()
    guest.give(4)

    assert [packet.dst_port for packet in first] == [1] * BUFFERS
    assert [packet.dst_port for packet in guest.taken()] == [1, 2, 1, 1]


def test_many_connections(transport: str) -> None:
    """Thousands at once, in both directions."""
    guest = Guest(transport)
    guest.listen()
    guest.device.limit = count = min(guest.device.limit, 2000)
    for start in range(0, count, 100):
        guest.send(*(Packet(op=REQUEST, src_port=port) for port in range(start, min(start + 100, count))))
        for _ in range(4):
            guest.got()
    for host in guest.accepted:
        host.sendall(b"x")
    guest.settle()
    answered = set()
    while packets := guest.got():
        answered |= {packet.dst_port for packet in packets if packet.op == RW}
    guest.send(*(Packet(op=RW, src_port=port, data=b"y") for port in range(100)))

    assert count >= 200
    assert answered == set(range(count))
    assert all(host.recv(2) == b"y" for host in guest.accepted[:100])
    guest.close()


def test_limit_follows_from_the_descriptors_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda what: (1024, 4096))
    few = Vsock().limit
    monkeypatch.setattr("resource.getrlimit", lambda what: (1 << 20, 1 << 20))

    assert (few, Vsock().limit) == (256, MAX_CONNECTIONS)


# The UNIX socket.


def dial(guest: Guest, line: bytes = b"CONNECT 5000\n") -> socket.socket:
    client = guest.keep(socket.socket(socket.AF_UNIX))
    client.connect(str(guest.device.path))
    client.sendall(line)
    guest.settle()
    return client


def test_a_client_connects(reachable: Guest) -> None:
    client = dial(reachable)
    (request,) = reachable.got()
    reachable.answer(request, op=RESPONSE)

    answer = client.recv(64)
    client.sendall(b"hello")
    reachable.settle()
    reachable.answer(request, op=RW, data=b"hi")

    assert (request.op, request.dst_port) == (REQUEST, GUEST_PORT)
    assert answer == b"OK %d\n" % request.src_port
    assert (sent(reachable.got()), client.recv(64)) == (b"hello", b"hi")


def test_a_client_that_does_not_wait_for_the_answer(reachable: Guest) -> None:
    client = dial(reachable, b"CONNECT 5000\nhello")
    (request,) = reachable.got()
    reachable.answer(request, op=RESPONSE)

    assert (sent(reachable.got()), client.recv(3)) == (b"hello", b"OK ")


def test_a_line_in_pieces(reachable: Guest) -> None:
    client = dial(reachable, b"CONN")
    for piece in (b"ECT 50", b"00", b"\r\n"):
        client.sendall(piece)
        reachable.settle()

    assert [packet.dst_port for packet in reachable.got()] == [5000]


def test_a_client_whom_the_guest_refuses(reachable: Guest) -> None:
    client = dial(reachable)
    (request,) = reachable.got()
    reachable.answer(request, op=RST)

    assert client.recv(64) == b""


def test_a_client_that_does_not_wait_for_the_guest(reachable: Guest) -> None:
    dial(reachable).close()
    reachable.settle()

    assert reachable.ops() == [REQUEST, RST]


def test_a_client_before_there_is_a_driver(reachable: Guest) -> None:
    reachable.driver.set("Status", 0)

    assert dial(reachable).recv(64) == b""


@pytest.mark.parametrize(
    "line",
    [b"\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"CONNECT 99999999999\n", b"x" * 32,
     b"CONNECT 1 2\n", b"connect 1\n", b"CONNECT \xd9\xa1\n", b"CONNECT " + b"0" * 100 + b"\n"],
)  # fmt: skip
def test_lines_that_mean_nothing(reachable: Guest, line: bytes) -> None:
    client = dial(reachable, line)

    assert (ends(client), reachable.got(), len(reachable.device._listener or ())) == (True, [], 0)


def ends(client: socket.socket) -> bool:
    """Whether the other side has gone, be it with something left unread."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_leaves_without_a_word(reachable: Guest) -> None:
    dial(reachable, b"CONN").close()
    reachable.settle()

    assert len(reachable.device._listener or ()) == 0


def test_the_guest_connects_to_a_program_with_a_socket(reachable: Guest) -> None:
    listener = listen_at(reachable, PORT)
    reachable.send(op=REQUEST)
    program = reachable.keep(listener.accept()[0])
    reachable.send(op=RW, data=b"hello")
    program.sendall(b"hi")
    reachable.settle()

    assert program.recv(64) == b"hello"
    assert [packet.op for packet in reachable.got()] == [RESPONSE, RW]


def listen_at(guest: Guest, port: int) -> socket.socket:
    listener = guest.keep(socket.socket(socket.AF_UNIX))
    listener.bind(f"{guest.device.path}_{port}")
    listener.listen(1)
    return listener


def test_there_is_no_program_with_a_socket(reachable: Guest) -> None:
    listen_at(reachable, PORT).close()

    reachable.send(Packet(op=REQUEST), Packet(op=REQUEST, dst_port=PORT + 1))

    assert reachable.ops() == [RST, RST]


def test_a_program_that_has_no_time(reachable: Guest) -> None:
    """Nothing waits: further connections are refused."""
    listen_at(reachable, PORT)

    reachable.send(*(Packet(op=REQUEST, src_port=port) for port in range(8)))

    assert set(reachable.ops()) == {RESPONSE, RST}


def test_too_many_clients(reachable: Guest) -> None:
    """Those beyond the limit wait, and nothing spins meanwhile."""
    reachable.device.limit = 2
    clients = [dial(reachable, b"") for _ in range(3)]
    waiting = len(reachable.device._listener or ())
    clients[0].close()
    clients[2].sendall(b"CONNECT 5000\n")
    reachable.settle()
    reachable.board.steps.advance(0.2)
    reachable.settle()

    assert (waiting, reachable.ops()) == (2, [REQUEST])


def test_the_socket_goes_with_the_device(transport: str, tmp_path: Path) -> None:
    guest = Guest(transport, tmp_path / "v.sock")
    client = dial(guest, b"CONN")
    there = (tmp_path / "v.sock").is_socket()

    guest.close()

    assert (there, (tmp_path / "v.sock").exists()) == (True, False)
    assert client.fileno() == -1


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(HostError, match=r'cannot listen on ".*file": Address already in use; name another path'):
        Vsock(path=tmp_path / "file").attach(FakeBoard())


# Resets and state.


def test_a_reset_ends_all_connections(guest: Guest) -> None:
    host = guest.call()
    guest.send(op=RW, data=b"before")

    guest.driver.set("Status", 0)
    guest.settle()
    guest.start()
    guest.send(op=RW, data=b"after")

    assert (host.recv(64), host.recv(64), guest.ops()) == (b"before", b"", [RST])
    guest.call()


def test_a_reset_loses_nothing_that_the_guest_has_sent(guest: Guest) -> None:
    host = guest.call()
    size = len(fill_up(guest))

    guest.driver.set("Status", 0)

    assert len(read(guest, host, size)) == size
    assert host.recv(64) == b""


@pytest.mark.parametrize("waiting", ["for input", "for an answer", "for room", "for the end"])
def test_a_wake_up_that_comes_after_a_reset(guest: Guest, waiting: str) -> None:
    """A vCPU resets the device while the event loop waits for its lock."""
    host = guest.call()
    if waiting == "for an answer":
        guest.connect()
    elif waiting == "for room":
        fill_up(guest)
    elif waiting == "for the end":
        host.shutdown(socket.SHUT_WR)
        guest.settle()
    late = [callback for callback, _ in guest.board.steps._watched.values()]

    guest.driver.set("Status", 0)
    for callback in late:
        callback()

    assert late
    assert guest.device.speakers == {}
    guest.start()
    guest.settle()
    guest.call()


def test_a_client_that_comes_while_the_machine_ends(reachable: Guest) -> None:
    """The event loop waits for the lock meanwhile."""
    dial(reachable, b"CONN")
    late = [callback for callback, _ in reachable.board.steps._watched.values()]

    reachable.device.close()
    for callback in late:
        callback()
    reachable.board.steps.advance(1)

    assert (len(late), reachable.board.steps.watched) == (2, {})


def test_a_driver_that_breaks_the_receive_queue(guest: Guest) -> None:
    """It is seen when the host sends."""
    host = guest.call()
    guest.driver.publish(RX, 0xFFFF)
    guest.driver.kick(RX)
    for _ in range(BUFFERS + 1):
        host.sendall(b"x")
        guest.settle()

    assert guest.driver.needs_reset
    assert ends(host)


def test_a_driver_that_breaks_the_queue_ends_all_connections(guest: Guest) -> None:
    """The host's programs need not wait until it is reset."""
    host, future = guest.call(), guest.connect()
    guest.driver.publish(TX, 0xFFFF)
    guest.driver.kick(TX)

    assert guest.driver.needs_reset
    assert host.recv(64) == b""
    with pytest.raises(ConnectionRefusedError):
        future.result(5)
    with pytest.raises(ConnectionRefusedError):
        guest.device.connect(GUEST_PORT)


def test_a_restored_guest_is_told(guest: Guest) -> None:
    """5.10.6.7: its connections are gone, those that listen stay."""
    host = guest.call()
    event = guest.driver.submit(EVENT, writable=[4])
    guest.driver.kick(EVENT)
    quiet = guest.driver.used(EVENT)
    core = guest.driver.transport.core

    with guest.device.lock:
        core.restore(core.state())
    guest.settle()

    assert (quiet, guest.driver.used(EVENT)) == ([], [(event, 4)])
    assert guest.driver.data(EVENT, event) == struct.pack("<I", 0)
    assert host.recv(64) == b""
    guest.send(op=RW, data=b"x")
    assert guest.ops() == [RST]
    guest.call()


def test_a_restored_guest_is_told_as_soon_as_it_listens(guest: Guest) -> None:
    core = guest.driver.transport.core
    with guest.device.lock:
        core.restore(core.state())
    guest.settle()

    event = guest.driver.submit(EVENT, writable=[4])
    guest.driver.kick(EVENT)
    later = guest.driver.submit(EVENT, writable=[4])
    guest.driver.kick(EVENT)

    assert guest.driver.used(EVENT) == [(event, 4)]
    assert later != event


def test_state_of_another_version(guest: Guest) -> None:
    with pytest.raises(ValueError, match="version"):
        guest.device.restore({"version": 0})
