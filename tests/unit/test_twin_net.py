"""The twin of a network device's queues in C carries the frames that Python would, and leaves it all that is odd."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nics import BASIC, FRAME, MERGE, OFFLOADS, PLAIN, header

from kvmpy._virtqueue import lib
from kvmpy.core.memory import GuestMemory, Region
from kvmpy.host import frames, netsocket
from kvmpy.host.frames import MAX_FRAME, VLAN_TAG, VNET_HEADER
from kvmpy.host.netsocket import FrameStream
from kvmpy.host.tap import Tap
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.net import GSO_ECN, GSO_TCPV4, GSO_TCPV6, NET_F, RX, TX, Chain, Header, Net
from kvmpy.virtio.queue import DESC
from kvmpy.virtio.spec import F

LOW = 8 << 20
RINGS = 0x10000  # where RingDriver begins


class Plugged(Net):
    """Plugged into one end of a socket pair; notes the sizes of frames that reach Python."""

    def __init__(self, **options: Any) -> None:
        super().__init__("none", mac="02:00:00:00:00:01", **options)
        self.seen: list[int] = []

    def open(self) -> FrameStream | Tap:
        mine, self.far = socket.socketpair()
        self.far.setblocking(False)
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        return FrameStream(mine, "the test")

    def _outgoing(self, chain: Chain) -> Any:
        self.seen.append(chain.size)
        return super()._outgoing(chain)

    def _incoming(self, raw: memoryview) -> Any:
        self.seen.append(len(raw))
        return super()._incoming(raw)


class Datagrams(Tap):
    """A tap whose other end the test holds: here, too, each frame is one message."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._fd = end.detach()
        self.name = "the test"
        self.buffer = memoryview(bytearray(VNET_HEADER + MAX_FRAME + VLAN_TAG))

    def set_offloads(self, flags: int) -> None:
        self.offloads = flags


class Tapped(Plugged):
    """Plugged into a tap."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.features |= NET_F.OFFLOADS

    def open(self) -> Tap:
        mine, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far.setblocking(False)
        return Datagrams(mine)


class Side:
    """A network device with a driver that is up, with the twin or without."""

    def __init__(
        self, *, pure: bool = False, features: int = MERGE, size: int = 0, kind: type[Plugged] = Plugged, **options: Any
    ):
        self.board = FakeBoard()
        self.board.mem = GuestMemory([Region(0, memoryview(bytearray(LOW)))])
        self.net = kind(**options)
        self.net.attach(self.board)
        self.driver = RingDriver(self.board)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvmpy.virtio.net.PURE", pure)
            self.driver.start(features, [size, size] if size else None)
        self.wire = b""  # all that has come out of it

    def settle(self) -> None:
        """Until nothing happens any more, the other end reading all the time."""
        for _ in range(16):
            self.board.steps.turn()
            for fd in list(self.board.steps.watched):
                self.board.steps.ready(fd)
            self.drain()

    def drain(self) -> None:
        try:
            while data := self.net.far.recv(1 << 20):
                self.wire += data
        except OSError:
            return

    def send(self, *readable: bytes, indirect: bool = False) -> int:
        return self.driver.submit(TX, readable, indirect=indirect)

    def kick(self) -> None:
        for index in (RX, TX):
            self.driver.set("QueueNotify", index)
        self.settle()

    def arrive(self, *frames: bytes) -> None:
        """From a stream socket."""
        self.net.far.sendall(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))

    @property
    def outcome(self) -> tuple[object, ...]:
        """All that a guest, the other end or a person can see of what has happened."""
        ram = bytes(self.board.mem.regions[0].buf)
        counts = self.net.tx_dropped, self.net.rx_dropped, self.net.link
        return ram, self.wire, counts, self.driver.get("Status"), self.board.logs, [*self.board.steps.watched.values()]

    def close(self) -> None:
        self.net.close()
        self.net.far.close()


@pytest.fixture
def side() -> Iterator[Side]:
    side = Side()
    yield side
    side.close()


@pytest.fixture
def sides() -> Iterator[list[Side]]:
    """Python alone, and with the twin."""
    sides = [Side(pure=True), Side()]
    yield sides
    for side in sides:
        side.close()


def wired(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def test_numbers_are_those_of_python() -> None:
    assert (lib.LENGTH, lib.VNET_HEADER) == (netsocket.LENGTH, frames.VNET_HEADER)
    assert (lib.ETH_HEADER, lib.MAX_FRAME) == (frames.ETH_HEADER, frames.MAX_FRAME)


def test_ordinary_frames_do_not_reach_python(side: Side) -> None:
    heads = [side.send(PLAIN, FRAME), side.send(PLAIN + FRAME[:20], FRAME[20:], indirect=True)]
    room = [side.driver.submit(RX, writable=[12, 100]), side.driver.submit(RX, writable=[40])]
    room += [side.driver.submit(RX, writable=[40])]
    side.arrive(FRAME, FRAME)

    side.kick()

    assert side.net.seen == []
    assert side.wire == wired(FRAME, FRAME)
    assert side.driver.used(TX) == [(head, 0) for head in heads]
    assert side.driver.used(RX) == [(room[0], 72), (room[1], 40), (room[2], 32)]
    assert side.driver.data(RX, room[0])[:72] == header(1) + FRAME
    assert (side.driver.data(RX, room[1]) + side.driver.data(RX, room[2]))[:72] == header(2) + FRAME


def test_more_than_the_socket_takes(side: Side) -> None:
    """A frame that went out in part is finished before the next one."""
    packets = [bytes([n]) * 60000 for n in range(8)]
    for packet in packets:
        side.send(PLAIN, packet)

    side.driver.set("QueueNotify", TX)
    side.board.steps.turn()
    before = len(side.driver.used(TX))
    side.settle()

    assert 0 < before < len(packets)
    assert side.wire == wired(*packets)
    assert side.net.seen == []


def test_frames_in_pieces(side: Side) -> None:
    stream = wired(FRAME, b"\1" * 14, b"\2" * 1500)
    heads = [side.driver.submit(RX, writable=[2000]) for _ in range(3)]
    side.kick()

    for at in range(0, len(stream), 7):
        side.net.far.send(stream[at : at + 7])
        side.board.steps.ready(next(iter(side.board.steps.watched)))
    side.settle()

    assert side.driver.used(RX) == [(head, 12 + size) for head, size in zip(heads, (60, 14, 1500), strict=True)]
    assert side.net.seen == []


@pytest.mark.parametrize("options", [{"pcap": True}, {"tx_ops": 1000}, {"rx_bandwidth": "10M"}], ids=str)
def test_networks_that_need_python_for_all(tmp_path: Path, options: dict[str, Any]) -> None:
    side = Side(**{key: tmp_path / "x.pcap" if key == "pcap" else value for key, value in options.items()})
    side.send(PLAIN, FRAME)

    side.kick()
    side.close()

    assert side.net.seen == [72]


@pytest.mark.parametrize("way", [TX, RX], ids=["sending", "receiving"])
def test_other_end_hangs_up(sides: list[Side], way: int) -> None:
    for side in sides:
        side.net.far.close()
        side.driver.submit(way, *([PLAIN, FRAME], []) if way == TX else ([], [2000]))
        side.driver.set("QueueNotify", way)
        side.board.steps.turn()
        side.settle()

    python, twin = (side.outcome for side in sides)
    assert twin == python
    assert not sides[1].net.link


@pytest.mark.parametrize("features", [BASIC, MERGE], ids=["one chain", "several"])
def test_frame_that_the_first_chain_is_too_small_for(features: int) -> None:
    sides = [Side(pure=pure, features=features) for pure in (True, False)]
    for side in sides:
        for room in (20, 2000, 2000):
            side.driver.submit(RX, writable=[room])
        side.arrive(FRAME, FRAME)
        side.kick()

    python, twin = (side.outcome for side in sides)
    assert twin == python
    assert sides[1].net.rx_dropped == (2 if features == BASIC else 0)
    for side in sides:
        side.close()


def test_cable_is_pulled_out(sides: list[Side]) -> None:
    for side in sides:
        side.driver.submit(RX, writable=[2000])
        side.kick()
        with side.net.lock:
            side.net.set_link(False)
        side.arrive(FRAME)
        side.send(PLAIN, FRAME)
        side.kick()

    python, twin = (side.outcome for side in sides)
    assert twin == python
    assert sides[1].wire == b""


def test_reset_lets_go_of_memory() -> None:
    board = FakeBoard()
    board.mem = GuestMemory.allocate([(0, 1 << 20)])
    net = Plugged()
    net.attach(board)
    driver = RingDriver(board)
    driver.start(MERGE)

    driver.set("Status", 0)
    driver.queues.clear()

    board.mem.close()
    net.close()
    net.far.close()


# Whatever either end does: as without the twin.

SIZES = st.sampled_from([0, 1, 13, 14, 15, 60, 1514, 1518, 1519, 4000, 65549, 65550])
ROOMS = st.sampled_from([0, 1, 11, 12, 13, 40, 72, 1526, 4096, 66000])
FEATURES = [MERGE, BASIC, MERGE & ~F.EVENT_IDX, MERGE & ~F.INDIRECT_DESC, MERGE | NET_F.MTU]
Step = tuple[Any, ...]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    places = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


cuts = st.lists(st.integers(0, 200), max_size=3)
outgoing = st.tuples(st.just("send"), st.integers(0, 12) | st.just(12), SIZES, cuts, st.booleans())
offered = st.tuples(st.just("offer"), st.lists(ROOMS, min_size=1, max_size=3), st.booleans())
arriving = st.tuples(st.just("arrive"), SIZES.filter(lambda size: 0 < size <= frames.MAX_FRAME))
GARBAGE = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\1\0\x0e", b"\0\0"]  # no length of a frame, and half of one
descriptors = st.builds(
    DESC.pack,
    st.sampled_from([0, RINGS, RINGS + 0x100, 0x40000, LOW - 512, LOW - 1, LOW, (1 << 64) - 1]),
    st.sampled_from([0, 1, 12, 16, 32, 33, 60, 512, 513, 0xFFFFFFFF]),
    st.integers(0, 7),
    st.integers(0, 9),
)
poke = st.tuples(st.just("poke"), st.integers(0, 48), descriptors)
index = st.tuples(
    st.just("poke"),
    st.sampled_from([*range(128, 148), *range(344, 364)]),
    st.integers(0, 20).map(lambda n: bytes([n, 0])),
)
kick = st.just(("kick",))


def play(side: Side, step: Step) -> None:
    match step:
        case "send", head, size, places, indirect:
            indirect = indirect and bool(side.driver.features & F.INDIRECT_DESC)
            side.send(*cut(PLAIN[:head] + bytes([size % 251 + 1]) * size, places), indirect=indirect)
        case "tap send", head, size, places:
            side.send(*cut(head + bytes([size % 251 + 1]) * size, places))
        case "offer", rooms, indirect:
            indirect = indirect and bool(side.driver.features & F.INDIRECT_DESC)
            side.driver.submit(RX, writable=rooms, indirect=indirect)
        case "arrive", size:
            side.arrive(bytes([size % 250 + 1]) * size)
        case "message", data:
            with suppress(BlockingIOError):  # the queue of datagrams is short
                side.net.far.send(data)
        case "garbage", data:
            side.net.far.send(data)
        case "poke", at, data:
            side.board.mem.write(RINGS + (16 if len(data) == DESC.size else 2) * at, data)
        case _:
            side.kick()


@settings(max_examples=250)
@given(
    st.sampled_from(FEATURES),
    st.lists(st.one_of(outgoing, outgoing, offered, offered, arriving, arriving, kick, poke, index), max_size=24),
    st.sampled_from(GARBAGE),
)
def test_twin_and_python_agree(features: int, steps: list[Step], garbage: bytes) -> None:
    mtu = 1500 if features & NET_F.MTU else None
    sides = [Side(pure=pure, features=features, size=16, mtu=mtu) for pure in (True, False)]
    for step in [*steps, ("kick",), ("offer", [2000], False), ("garbage", garbage), ("kick",)]:
        for side in sides:
            play(side, step)
        if step[0] == "kick":
            python, twin = (side.outcome for side in sides)
            assert twin == python
    for side in sides:
        side.close()


# A tap: frames have headers, with which they may be unfinished.

headers = st.builds(
    lambda *fields: bytes(Header(*fields)),
    st.sampled_from([0, 1, 1, 1, 2, 3, 0xFF]),
    st.sampled_from([0, 0, 0, GSO_TCPV4, GSO_TCPV6, GSO_TCPV4 | GSO_ECN, GSO_TCPV6 | GSO_ECN, 2, 3, GSO_ECN, 0xFF]),
    st.sampled_from([0, 14, 54, 60, 61, 0xFFFF]),
    st.sampled_from([0, 1, 1448, 1448]),
    st.sampled_from([0, 34, 42, 43, 0xFFFF]),
    st.sampled_from([0, 16, 17, 0xFFFF]),
    st.sampled_from([0, 1, 7]),
)
unfinished = st.tuples(st.just("tap send"), headers, SIZES, cuts)
message = st.tuples(st.just("message"), st.builds(lambda head, size: head + b"\x5a" * size, headers, SIZES))
short = st.tuples(st.just("message"), st.binary(min_size=1, max_size=13))
TAP_FEATURES = [OFFLOADS, MERGE, BASIC, MERGE | NET_F.CSUM, OFFLOADS & ~NET_F.MRG_RXBUF, OFFLOADS | NET_F.MTU]
TAP_FEATURES += [MERGE | NET_F.GUEST_CSUM, MERGE | NET_F.CSUM | NET_F.HOST_TSO4, OFFLOADS & ~NET_F.HOST_ECN]


@settings(max_examples=250)
@given(
    st.sampled_from(TAP_FEATURES),
    st.lists(
        st.one_of(unfinished, unfinished, offered, offered, message, message, short, kick, poke, index), max_size=24
    ),
)
def test_twin_and_python_agree_on_a_tap(features: int, steps: list[Step]) -> None:
    mtu = 1500 if features & NET_F.MTU else None
    sides = [Side(pure=pure, features=features, size=16, kind=Tapped, mtu=mtu) for pure in (True, False)]
    for step in [*steps, ("kick",)]:
        for side in sides:
            play(side, step)
        if step[0] == "kick":
            python, twin = (side.outcome for side in sides)
            assert twin == python
    for side in sides:
        side.close()


TSO = Header(1, GSO_TCPV4, 54, 1448, 34, 16, 0)
ONLY_CSUM, NO_CSUM = MERGE | NET_F.CSUM | NET_F.GUEST_CSUM, MERGE
TAP_CASES = {
    "whole": (NO_CSUM, Header(0, 0, 0, 0, 0, 0, 0), 60),
    "flags of the other way": (OFFLOADS, Header(2, 0, 0, 0, 0, 0, 0), 60),
    "flags without the feature": (NO_CSUM, Header(2, 0, 0, 0, 0, 0, 0), 60),
    "checksum without the feature": (NO_CSUM, Header(1, 0, 0, 0, 34, 16, 0), 60),
    "checksum": (ONLY_CSUM, Header(1, 0, 0, 0, 34, 16, 0), 60),
    "checksum at the end": (ONLY_CSUM, Header(1, 0, 0, 0, 42, 16, 0), 60),
    "checksum behind the end": (ONLY_CSUM, Header(1, 0, 0, 0, 43, 16, 0), 60),
    "checksum that wraps": (ONLY_CSUM, Header(1, 0, 0, 0, 0xFFFF, 0xFFFF, 0), 60),
    "segments": (OFFLOADS, TSO, 4000),
    "segments without the feature": (ONLY_CSUM, TSO, 4000),
    "segments with their checksum": (OFFLOADS, Header(0, GSO_TCPV4, 54, 1448, 34, 16, 0), 4000),
    "segments of no size": (OFFLOADS, Header(1, GSO_TCPV4, 54, 0, 34, 16, 0), 4000),
    "header longer than the frame": (OFFLOADS, Header(1, GSO_TCPV4, 61, 1448, 34, 16, 0), 60),
    "unknown segments": (OFFLOADS, Header(1, 3, 54, 1448, 34, 16, 0), 4000),
    "number of buffers": (NO_CSUM, Header(0, 0, 0, 0, 0, 0, 7), 60),
    "longer than the MTU": (OFFLOADS | NET_F.MTU, Header(0, 0, 0, 0, 0, 0, 0), 1519),
    "segments longer than the MTU": (OFFLOADS | NET_F.MTU, TSO, 4000),
    "too short": (OFFLOADS, Header(0, 0, 0, 0, 0, 0, 0), 13),
    "as long as can be": (OFFLOADS, TSO, MAX_FRAME),
    "longer": (OFFLOADS, TSO, MAX_FRAME + 1),
    "longer with a tag": (OFFLOADS, TSO, MAX_FRAME + VLAN_TAG),
}


@pytest.mark.parametrize("case", TAP_CASES.values(), ids=TAP_CASES)
def test_unfinished_frames(case: tuple[int, Header, int]) -> None:
    """Each way; what one of them may not carry is dropped."""
    features, head, size = case
    mtu = 1500 if features & NET_F.MTU else None
    sides = [Side(pure=pure, features=features, kind=Tapped, mtu=mtu) for pure in (True, False)]
    for side in sides:
        side.send(bytes(head), b"x" * size)
        side.driver.submit(RX, writable=[70000])
        side.net.far.send(bytes(head) + b"x" * size)
        side.kick()

    python, twin = (side.outcome for side in sides)
    assert twin == python
    assert len(sides[1].net.seen) == sides[1].net.tx_dropped + sides[1].net.rx_dropped
    for side in sides:
        side.close()


def test_unfinished_frames_do_not_reach_python() -> None:
    side = Side(kind=Tapped, features=OFFLOADS)
    unfinished = bytes(Header(1, GSO_TCPV4, 54, 1448, 34, 16, 0)), bytes(4000)
    head = side.send(*unfinished)
    room = side.driver.submit(RX, writable=[5000])
    side.net.far.send(b"".join(unfinished))

    side.kick()

    assert side.net.seen == []
    assert side.wire == b"".join(unfinished)
    assert (side.driver.used(TX), side.driver.used(RX)) == ([(head, 0)], [(room, 4012)])
    assert side.driver.data(RX, room)[:12] == bytes(Header(1, GSO_TCPV4, 54, 1448, 34, 16, 1))
    side.close()
