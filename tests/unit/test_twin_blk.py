"""The twin of a disk's queue in C does what Python does, byte for byte; it leaves to Python what is not ordinary."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.core.memory import GuestMemory, Region
from kvmpy.host.disk import Image
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.blk import BLK_F, HEADER, Blk, S, T
from kvmpy.virtio.queue import DESC, DESC_F, Chain
from kvmpy.virtio.spec import F

SECTORS = 64
CONTENT = b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS))
LOW, HOLE, HIGH = 1 << 20, 1 << 20, 1 << 16  # RAM in two parts
FEATURES = F.VERSION_1 | F.INDIRECT_DESC | BLK_F.FLUSH


class Disk(Blk):
    """Notes what reaches Python."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[int] = []
        self._handlers = {kind: self._noting(kind, handler) for kind, handler in self._handlers.items()}

    def _noting(self, kind: int, handler: Any) -> Any:
        def handle(image: Image, chain: Chain, sector: int, room: int) -> int:
            self.seen.append(kind)
            return int(handler(image, chain, sector, room))

        return handle


class Side:
    """A disk with a driver that is up, with the twin or without."""

    def __init__(self, path: Path, *, pure: bool = False, features: int = FEATURES, size: int = 0, **options: Any):
        path.write_bytes(CONTENT)
        self.path = path
        self.board = FakeBoard(LOW)
        regions = [Region(base, memoryview(bytearray(room))) for base, room in ((0, LOW), (LOW + HOLE, HIGH))]
        self.board.mem = GuestMemory(regions)
        self.device = Disk(path=path, **options)
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvmpy.virtio.blk.PURE", pure)
            self.driver.start(features, [size] if size else None)

    def submit(self, kind: int, sector: int, data: Sequence[bytes] = (), room: Sequence[int] = ()) -> int:
        return self.driver.submit(0, [HEADER.pack(kind, 0, sector), *data], [*room, 1], indirect=True)

    def kick(self, turns: int = 4) -> None:
        self.driver.set("QueueNotify", 0)
        for _ in range(turns):
            self.board.steps.turn()

    @property
    def outcome(self) -> tuple[object, ...]:
        """All that a guest, a host or a person can see of what has happened."""
        ram = [bytes(region.buf) for region in self.board.mem.regions]
        return ram, self.path.read_bytes(), self.driver.get("Status"), self.board.logs, self.board.stops


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    side = Side(tmp_path / "disk.img")
    yield side
    side.device.close()


def test_ordinary_requests_do_not_reach_python(side: Side) -> None:
    read, write = side.submit(T.IN, 3, room=[512, 1024]), side.submit(T.OUT, 8, [b"x" * 100, b"y" * 412])

    side.kick()

    assert side.device.seen == []
    assert side.driver.used(0) == [(read, 1537), (write, 1)]
    assert side.driver.data(0, read) == CONTENT[3 * 512 : 6 * 512] + b"\0"
    assert side.path.read_bytes()[8 * 512 : 9 * 512] == b"x" * 100 + b"y" * 412


def test_python_gets_the_others_in_their_order(side: Side) -> None:
    requests = [
        side.submit(T.OUT, 0, [b"1" * 512]),
        side.submit(T.FLUSH, 0),
        side.submit(T.IN, 0, room=[512]),
        side.submit(T.IN, SECTORS, room=[512]),
        side.submit(T.OUT, 1, [b"2" * 512]),
    ]

    side.kick()

    assert side.device.seen == [T.FLUSH, T.IN]
    assert [head for head, _ in side.driver.used(0)] == requests
    statuses = [side.driver.data(0, head)[-1] for head in requests]
    assert statuses == [S.OK, S.OK, S.OK, S.IOERR, S.OK]


def test_more_than_a_batch(tmp_path: Path) -> None:
    side = Side(tmp_path / "disk.img")
    heads = [side.submit(T.IN, n % SECTORS, room=[512]) for n in range(256)]

    side.kick()

    assert side.device.seen == []
    assert side.driver.used(0) == [(head, 513) for head in heads]


class Flaky(Disk):
    """Answers in its own way, as the example of that name."""

    def answer(self, image: Image, chain: Chain) -> None:
        super().answer(image, chain)


@pytest.mark.parametrize("options", [{"snapshot": True}, {"bandwidth": "10M"}, {"iops": 100}], ids=str)
def test_disks_that_need_python_for_all(tmp_path: Path, options: dict[str, Any]) -> None:
    side = Side(tmp_path / "disk.img", **options)
    side.submit(T.IN, 3, room=[512])

    side.kick()

    assert side.device.seen == [T.IN]


def test_device_that_answers_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.Disk", Flaky)
    side = Side(tmp_path / "disk.img")
    side.submit(T.IN, 3, room=[512])

    side.kick()

    assert side.device.seen == [T.IN]


def test_pure_python(tmp_path: Path) -> None:
    side = Side(tmp_path / "disk.img", pure=True)
    side.submit(T.IN, 3, room=[512])

    side.kick()

    assert side.device.seen == [T.IN]


@pytest.mark.parametrize(
    ("features", "options"), [(FEATURES & ~BLK_F.FLUSH, {}), (FEATURES, {"ro": True})], ids=["no flushes", "read-only"]
)
def test_writes_that_python_decides_on(tmp_path: Path, features: int, options: dict[str, Any]) -> None:
    """A driver that cannot flush expects what it wrote on the disk; one that may not write gets an error."""
    side = Side(tmp_path / "disk.img", features=features, **options)
    side.submit(T.OUT, 3, [b"x" * 512])
    side.submit(T.IN, 3, room=[512])

    side.kick()

    assert side.device.seen == [T.OUT]


def test_resized_disk(side: Side) -> None:
    os.truncate(side.path, (SECTORS + 1) * 512)
    with side.device.lock:
        side.device.resize()
    head = side.submit(T.IN, SECTORS, room=[512])

    side.kick()

    assert side.device.seen == []
    assert side.driver.used(0) == [(head, 513)]


def test_memory_can_be_closed_after_a_reset(tmp_path: Path) -> None:
    """The twin holds guest memory no longer than its driver is up."""
    board = FakeBoard()
    board.mem = GuestMemory.allocate([(0, LOW)])
    (tmp_path / "disk.img").write_bytes(CONTENT)
    device = Blk(path=tmp_path / "disk.img")
    device.attach(board)
    driver = RingDriver(board)
    driver.start(FEATURES)
    driver.request(0, [HEADER.pack(T.IN, 0, 0)], [512, 1])

    driver.set("Status", 0)
    driver.queues.clear()

    board.mem.close()


def test_stopped_queue_is_left_alone(side: Side) -> None:
    side.submit(T.IN, 3, room=[512])
    side.driver.set("QueueSel", 0)
    side.driver.set("QueueReady", 0)

    side.kick()

    assert side.driver.used(0) == []


# Rules that a driver can break, and the edges of what it may do: as without the twin.

R, W, NEXT, INDIRECT = 0, DESC_F.WRITE, DESC_F.NEXT, DESC_F.INDIRECT
END = LOW + HOLE + HIGH
HEAD, DATA, STATUS, TABLE, OTHER = 0x40000, 0x50000, 0x60000, 0x70000, 0x78000
IN_HEAD, OUT_HEAD = HEADER.pack(T.IN, 0, 3), HEADER.pack(T.OUT, 0, 3)
RINGS = 0x10000  # where RingDriver begins: 8 descriptors, the available ring, the used ring
AVAIL, USED = RINGS + 8 * DESC.size, RINGS + 8 * DESC.size + 24
Segment = tuple[int, int, int]  # address, bytes, flags


class Case(NamedTuple):
    """A chain: in the queue's table, or in an indirect one where `table` says how many bytes that has."""

    name: str
    segments: list[Segment]
    table: int | None = None
    header: bytes = IN_HEAD
    pokes: Sequence[tuple[int, bytes]] = ()
    features: int = FEATURES
    ro: bool = False
    served: bool = False  # in C


H, D, S1 = (HEAD, 16, R), (DATA, 512, W), (STATUS, 1, W)
OUT = [H, (DATA, 512, R), S1]
CASES = [
    Case("ordinary", [H, D, S1], served=True),
    Case("ordinary write", OUT, header=OUT_HEAD, served=True),
    Case("indirect", [H, D, S1], table=48, served=True),
    Case("anywhere", [(HEAD, 7, R), (HEAD + 7, 9, R), (DATA, 511, W), (STATUS, 2, W)], served=True),
    Case("header and data", [(HEAD, 528, R), S1], header=OUT_HEAD + b"x" * 512, served=True),
    Case("nothing in between", [(END, 0, R), H, (0, 0, R), (END, 0, W), D, S1, (LOW, 0, W)], served=True),
    Case("at the end of RAM", [H, (END - 512, 512, W), S1], served=True),
    Case("over the end of RAM", [H, (END - 511, 512, W), S1]),
    Case("over the end of a part", [H, (LOW - 511, 512, W), S1]),
    Case("in the hole", [H, (LOW + 1, 512, W), S1]),
    Case("nothing, behind the end of RAM", [H, D, (END + 1, 0, W), S1]),
    Case("around the end of all", [H, ((1 << 64) - 256, 512, W), S1]),
    Case("status nowhere", [H, D, (END, 1, W)]),
    Case("header nowhere", [(LOW, 16, R), D, S1]),
    Case("short header", [(HEAD, 15, R), D, S1]),
    Case("no header", [D, S1]),
    Case("no status", [H]),
    Case("no data", [H, S1]),
    Case("no bytes at all", [(HEAD, 0, R)]),
    Case("part of a sector", [H, (DATA, 511, W), S1]),
    Case("data for a read", [H, (DATA, 512, R), D, S1]),
    Case("room in a write", [H, (DATA, 512, R), D, S1], header=OUT_HEAD),
    Case("write without status", [H, (DATA, 512, R)], header=OUT_HEAD),
    Case("last sector", [H, D, S1], header=HEADER.pack(T.IN, 0, SECTORS - 1), served=True),
    Case("behind the last sector", [H, D, S1], header=HEADER.pack(T.IN, 0, SECTORS)),
    Case("over the last sector", [H, (DATA, 1024, W), S1], header=HEADER.pack(T.IN, 0, SECTORS - 1)),
    Case("sector of all ones", [H, D, S1], header=HEADER.pack(T.IN, 0, (1 << 64) - 1)),
    Case("sector that wraps", [H, D, S1], header=HEADER.pack(T.IN, 0, 1 << 55)),
    Case("unknown request", [H, D, S1], header=HEADER.pack(2, 0, 3)),
    Case("type with a high bit", [H, D, S1], header=HEADER.pack(1 << 31, 0, 3)),
    Case("write to a read-only disk", OUT, header=OUT_HEAD, ro=True),
    Case("write without flushes", OUT, header=OUT_HEAD, features=FEATURES & ~BLK_F.FLUSH),
    Case("readable behind writable", [H, D, (HEAD, 0, R), S1]),
    Case("nothing writable, then readable", [(DATA, 0, W), H, D, S1]),
    Case("table of another length", [H, D, S1], table=56),
    Case("table of nothing", [H, D, S1], table=0),
    Case("table longer than the queue", [H, D, S1], table=16 * 9),
    Case("table as long as the queue", [H, D, S1], table=16 * 8, served=True),
    Case("table without the feature", [H, D, S1], table=48, features=FEATURES & ~F.INDIRECT_DESC),
    Case("table nowhere", [H, D, S1], table=48, pokes=[(RINGS, DESC.pack(LOW - 32, 48, INDIRECT, 0))]),
    Case("table and more", [H, D, S1], table=48, pokes=[(RINGS, DESC.pack(TABLE, 48, INDIRECT | NEXT, 1))]),
    Case("writable table", [H, D, S1], table=48, pokes=[(RINGS, DESC.pack(TABLE, 48, INDIRECT | W, 1))], served=True),
    Case("table in a table", [H, (OTHER, 32, INDIRECT)], table=32),
    Case("table behind descriptors", [H, (OTHER, 32, INDIRECT)], served=True),
    Case("chain as long as the queue", [H, *[(DATA, 0, W)] * 5, D, S1], served=True),
    Case("longer than the queue", [H, *[(HEAD, 0, R)] * 6, (OTHER, 32, INDIRECT)]),
    Case("loop", [H, D, S1], pokes=[(RINGS + 32, DESC.pack(STATUS, 1, W | NEXT, 0))]),
    Case("loop of writable ones", [H, D, S1], pokes=[(RINGS + 32, DESC.pack(STATUS, 1, W | NEXT, 1))]),
    Case("next one is none", [H, D, S1], pokes=[(RINGS + 16, DESC.pack(DATA, 512, W | NEXT, 8))]),
    Case("next one is none of the table", [H, D, (0, 0, W), S1], table=48),
    Case("more than 4 GiB", [H, *[(DATA, 0xFFFFFFFF, W)] * 2, S1]),
    Case("head is none", [H, D, S1], pokes=[(AVAIL + 4, b"\x08\x00")]),
    Case("one more than the queue has", [H, D, S1], pokes=[(AVAIL + 2, b"\x09\x00")]),
    Case("all of the queue", [H, D, S1], pokes=[(AVAIL + 2, b"\x08\x00")], served=True),
    Case("index goes back", [H, D, S1], pokes=[(AVAIL + 2, b"\xff\xff")]),
    Case("unknown flags", [(HEAD, 16, 0xFFF8), (DATA, 512, 0x8002), S1], served=True),
    Case("data over its own header", [H, (HEAD - 100, 512, W), S1], served=True),
    Case("data over the rings", [H, (RINGS, 512, W), S1], served=True),
    Case("data over the used ring", [H, (USED - 8, 512, W), S1], served=True),
    Case("status over the available ring", [H, D, (AVAIL + 2, 1, W)], served=True),
    Case("status over the header", [H, D, (HEAD, 1, W)], served=True),
]


def offer(side: Side, case: Case) -> None:
    """Build the rings of `case`, and kick."""
    write, descriptor = side.board.mem.write, side.driver.descriptor
    write(HEAD, case.header)
    for n, (address, length, flags) in enumerate([(DATA, 512, W), (STATUS, 1, W)]):
        descriptor(OTHER, n, address, length, flags | (NEXT if n == 0 else 0), n + 1)
    for n, (address, length, flags) in enumerate(case.segments):
        last = flags == INDIRECT or n + 1 == len(case.segments)
        table = RINGS if case.table is None else TABLE
        descriptor(table, n, address, length, flags | (0 if last else NEXT), n + 1)
    if case.table is not None:
        descriptor(RINGS, 0, TABLE, case.table, INDIRECT, 0)
    for address, data in [(AVAIL + 4, b"\0\0"), (AVAIL + 2, b"\1\0"), *case.pokes]:
        write(address, data)
    side.kick()


@pytest.mark.parametrize("ring", [0, F.EVENT_IDX], ids=["flags", "event_idx"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rules_and_edges(tmp_path: Path, case: Case, ring: int) -> None:
    options: dict[str, Any] = {"features": case.features | ring, "size": 8, "ro": case.ro}
    python, twin = (Side(tmp_path / str(pure), pure=pure, **options) for pure in (True, False))

    offer(python, case)
    offer(twin, case)

    assert twin.outcome == python.outcome
    assert case.served == (len(twin.device.seen) < len(python.device.seen))


# Any rings, hostile ones among them, come out as they do without the twin.

LENGTHS = st.sampled_from([0, 1, 15, 16, 17, 496, 511, 512, 513, 1024, 1536])
ADDRESSES = st.sampled_from(
    [0, 1, RINGS, RINGS + 0x80, RINGS + 0x100, 0x40000, 0x40001, LOW - 512, LOW - 1, LOW, LOW + HOLE - 1, LOW + HOLE]
) | st.sampled_from([END - 512, END, (1 << 64) - 1, (1 << 64) - 512])
KINDS = st.sampled_from([T.IN, T.IN, T.IN, T.OUT, T.OUT, T.OUT, T.FLUSH, T.GET_ID, T.DISCARD, 77])
PLACES = st.sampled_from([0, 1, 2, 30, SECTORS - 2, SECTORS - 1, SECTORS, 1 << 55, (1 << 64) - 1])


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[bytes], list[int], bool]:
    """Readable buffers, sizes of the writable ones, and whether there is an indirect table: mostly sensible."""
    kind = draw(KINDS)
    bytes_ = 512 * draw(st.integers(0, 3)) if draw(st.integers(0, 9)) else draw(LENGTHS)
    readable = HEADER.pack(kind, draw(st.sampled_from([0, 1])), draw(PLACES)) + (
        bytes([draw(st.integers(1, 255))]) * bytes_ if kind == T.OUT else b""
    )
    room = 1 + (bytes_ if kind == T.IN else 20 if kind == T.GET_ID else 0)
    cuts = sorted(draw(st.lists(st.integers(0, len(readable)), max_size=2)))
    pieces = [readable[a:b] for a, b in zip([0, *cuts], [*cuts, len(readable)], strict=True)]
    holes = sorted(draw(st.lists(st.integers(0, room), max_size=2)))
    rooms = [b - a for a, b in zip([0, *holes], [*holes, room], strict=True)]
    return pieces, rooms, draw(st.booleans())


descriptors = st.builds(
    DESC.pack, ADDRESSES, LENGTHS | st.just(0xFFFFFFFF) | st.just(32), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8]),
    st.integers(0, 9),
)  # fmt: skip
pokes = st.tuples(st.integers(0, 24), descriptors) | st.tuples(
    st.integers(16 * 8, 16 * 8 + 0x60), st.binary(min_size=1, max_size=2)
)  # a descriptor, or bytes of the other rings


@settings(max_examples=300)
@given(
    st.sampled_from([F.EVENT_IDX | F.INDIRECT_DESC, F.INDIRECT_DESC, F.EVENT_IDX, 0]),
    st.lists(st.tuples(st.lists(requests(), max_size=3), st.lists(pokes, max_size=2)), min_size=1, max_size=4),
    st.booleans(),
)
def test_twin_and_python_agree(
    tmp_path_factory: pytest.TempPathFactory, ring: int, rounds: list[Any], read_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("twins")
    features = F.VERSION_1 | BLK_F.FLUSH | ring
    sides = [Side(folder / f"{pure}.img", pure=pure, features=features, size=8, ro=read_only) for pure in (True, False)]
    for batch, changes in rounds:
        for side in sides:
            for readable, writable, indirect in batch:
                side.driver.submit(0, readable, writable, indirect=indirect and bool(ring & F.INDIRECT_DESC))
            for at, value in changes:
                side.board.mem.write(RINGS + (16 * at if len(value) == DESC.size else at), value)
            side.kick()
        python, twin = (side.outcome for side in sides)
        assert twin == python
    for side in sides:
        side.device.close()
