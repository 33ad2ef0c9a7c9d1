"""The block device (VIRTIO 1.2, 5.2), driven through its rings, on real files."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.core.errors import ConfigError, NotFoundError
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.blk import BLK_F, HEADER, SEGMENT, UNMAP, Blk, Config, S, T
from kvmpy.virtio.spec import INTERRUPT, F

SECTORS = 256
SIZE = SECTORS * 512
CONTENT = b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS))  # sector n holds n, over and over
FEATURES = F.VERSION_1 | F.INDIRECT_DESC | BLK_F.FLUSH | BLK_F.DISCARD | BLK_F.WRITE_ZEROES
READ_ONLY = F.VERSION_1 | BLK_F.FLUSH


class Disk:
    """A Blk on a FakeBoard, with a driver that is up."""

    def __init__(self, path: Path, features: int = FEATURES, transport: str = "mmio", **options: Any) -> None:
        self.board = FakeBoard(16 << 20, transport)
        self.device = Blk(path=path, **options)
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        self.driver.start(features)

    def submit(
        self, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = (), queue: int = 0
    ) -> int:
        return self.driver.submit(queue, [HEADER.pack(kind, 0, sector), *data], [*room, 1])

    def request(
        self, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = ()
    ) -> tuple[int, bytes, int]:
        """Status, what is in the room for data, and the number of bytes that the device says it has written."""
        head = self.submit(kind, sector, data, room)
        return self.finish(head)

    def finish(self, head: int) -> tuple[int, bytes, int]:
        self.driver.kick(0)
        ((answered, count),) = self.driver.used(0)
        assert answered == head
        answer = self.driver.data(0, head)
        return answer[-1], answer[:-1], count

    def read(self, sector: int, count: int) -> bytes:
        status, data, written = self.request(T.IN, sector, room=[512 * count])
        assert (status, written) == (S.OK, 512 * count + 1)
        return data

    def write(self, sector: int, data: bytes) -> int:
        return self.request(T.OUT, sector, [data])[0]

    def segments(self, kind: int, *segments: tuple[int, int, int]) -> int:
        return self.request(kind, 0, [b"".join(SEGMENT.pack(*segment) for segment in segments)])[0]

    @property
    def config(self) -> Config:
        return Config(bytearray(self.driver.config(offset, 1) for offset in range(Config.SIZE)))

    @property
    def works(self) -> bool:
        return not self.driver.needs_reset and self.read(7, 1) == CONTENT[7 * 512 : 8 * 512]


Connect = Callable[..., Disk]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def connect(path: Path, transport: str, request: pytest.FixtureRequest) -> Connect:
    def connect(features: int = FEATURES, **options: Any) -> Disk:
        disk = Disk(**{"path": path, "features": features, "transport": transport} | options)
        request.addfinalizer(disk.device.close)
        return disk

    return connect


@pytest.fixture
def disk(connect: Connect) -> Disk:
    return connect()


# What drivers do.


def test_read(disk: Disk) -> None:
    assert disk.read(0, 1) == CONTENT[:512]
    assert disk.read(SECTORS - 3, 3) == CONTENT[-3 * 512 :]
    assert disk.read(0, SECTORS) == CONTENT


def test_write(disk: Disk, path: Path) -> None:
    data = os.urandom(3 * 512)

    status, _, written = disk.request(T.OUT, 5, [data])

    assert (status, written) == (S.OK, 1)
    assert path.read_bytes() == CONTENT[: 5 * 512] + data + CONTENT[8 * 512 :]


@pytest.mark.parametrize("cut", [[1, 15, 0, 500, 12, 1000, 24], [16, 1536], [17, 1535], [1552], [8] * 194])
@pytest.mark.parametrize("indirect", [False, True])
def test_write_with_any_layout(disk: Disk, path: Path, cut: list[int], indirect: bool) -> None:
    data = os.urandom(3 * 512)
    stream = HEADER.pack(T.OUT, 0, 9) + data
    ends = [sum(cut[: n + 1]) for n in range(len(cut))]

    head = disk.driver.submit(
        0, [stream[end - n : end] for end, n in zip(ends, cut, strict=True)], [1], indirect=indirect
    )

    assert disk.finish(head)[0] == S.OK
    assert path.read_bytes()[9 * 512 : 12 * 512] == data


@pytest.mark.parametrize("room", [[1537], [512, 1025], [1536, 1], [1, 0, 511, 1024, 1], [1536, 0, 1, 0]])
def test_read_with_any_layout(disk: Disk, room: list[int]) -> None:
    head = disk.driver.submit(0, [HEADER.pack(T.IN, 0, 9)], room)

    assert disk.finish(head) == (S.OK, CONTENT[9 * 512 : 12 * 512], 1537)


def test_more_buffers_than_one_call_takes(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.host.disk.IOV_MAX", 3)
    disk = connect()

    status, data, _ = disk.request(T.IN, 0, room=[100] * 10 + [24])

    assert (status, data) == (S.OK, CONTENT[:1024])


def test_read_of_nothing(disk: Disk) -> None:
    assert disk.request(T.IN, 3) == (S.OK, b"", 1)


@pytest.mark.parametrize("serial", ["", "abc", "12345678901234567890"])
def test_serial(connect: Connect, serial: str) -> None:
    status, answer, written = connect(serial=serial).request(T.GET_ID, room=[20])

    assert (status, written) == (S.OK, 21)
    assert answer == serial.encode().ljust(20, b"\0")


@pytest.mark.parametrize("serial", ["123456789012345678901", "ä", "a\nb", "\0"])
def test_serial_that_cannot_be(path: Path, serial: str) -> None:
    with pytest.raises(ConfigError, match="up to 20 ASCII"):
        Blk(path=path, serial=serial)


def test_config(connect: Connect) -> None:
    disk = connect(F.VERSION_1 | BLK_F.MQ, queues=4)

    config = disk.config

    assert (config.capacity, config.blk_size, config.seg_max, config.num_queues) == (SECTORS, 512, 254, 4)
    assert (config.physical_block_exp, config.min_io_size) == (3, 8)
    assert (config.discard_sector_alignment, config.max_discard_seg, config.max_write_zeroes_seg) == (8, 32, 1)
    assert config.write_zeroes_may_unmap == 1
    assert config.buf[33] == 0
    assert config.buf[57:60] == bytes(3)  # 5.2.4: unused ones are zero


def test_features(connect: Connect) -> None:
    common = BLK_F.SEG_MAX | BLK_F.BLK_SIZE | BLK_F.FLUSH | BLK_F.TOPOLOGY
    assert connect(snapshot=True).device.features == common | BLK_F.DISCARD | BLK_F.WRITE_ZEROES
    assert connect(READ_ONLY, ro=True).device.features == common | BLK_F.RO
    assert connect(READ_ONLY, ro=True, queues=2).device.features == common | BLK_F.RO | BLK_F.MQ


def test_all_queues_are_served(connect: Connect) -> None:
    disk = connect(FEATURES | BLK_F.MQ, queues=16)

    heads = [disk.submit(T.IN, n, room=[512], queue=n) for n in range(16)]
    for n in range(16):
        disk.driver.set("QueueNotify", n)
    disk.board.steps.turn()

    assert [disk.driver.used(n) for n in range(16)] == [[(head, 513)] for head in heads]
    assert [disk.driver.data(n, heads[n])[:512] for n in range(16)] == [
        CONTENT[512 * n : 512 * n + 512] for n in range(16)
    ]


@pytest.mark.parametrize("queues", [0, 17, -1])
def test_queues_that_cannot_be(path: Path, queues: int) -> None:
    with pytest.raises(ConfigError, match="1 to 16"):
        Blk(path=path, queues=queues)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "none"}, "writeback, unsafe, direct"),
        ({"format": "vmdk"}, "raw or qcow2"),
        ({"bandwidth": "fast"}, "10M"),
        ({"iops": 0}, "1 or more"),
    ],
)
def test_options_that_cannot_be(connect: Connect, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connect(**options)


def test_missing_image(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.img: no such file; .*truncate"):
        connect(path=tmp_path / "none.img")


def test_image_is_free_when_the_board_refuses_the_device(path: Path, connect: Connect) -> None:
    board = FakeBoard()
    board.virtio = refuse  # type: ignore[method-assign]

    with pytest.raises(ConfigError):
        Blk(path=path).attach(board)

    assert connect().works


def refuse(device: object) -> None:
    raise ConfigError("no room")


def test_format_is_never_guessed(connect: Connect) -> None:
    """Hostile row 37: a header that the guest writes must not change what its disk is."""
    first = connect()
    first.write(0, b"QFI\xfb\0\0\0\3".ljust(512, b"\0"))
    first.device.close()

    again = connect()

    assert again.config.capacity == SECTORS
    assert again.read(0, 1)[:8] == b"QFI\xfb\0\0\0\3"


# Durability.


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of fdatasync, which still happen."""
    calls: list[int] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return calls


def test_flush(disk: Disk, syncs: list[int]) -> None:
    disk.write(0, bytes(512))
    before = len(syncs)

    assert disk.request(T.FLUSH) == (S.OK, b"", 1)
    assert (before, len(syncs)) == (0, 1)


def test_unsafe_does_not_flush(connect: Connect, syncs: list[int]) -> None:
    assert connect(cache="unsafe").request(T.FLUSH)[0] == S.OK
    assert syncs == []


def test_driver_that_cannot_flush_gets_write_through(connect: Connect, syncs: list[int]) -> None:
    disk = connect(FEATURES & ~BLK_F.FLUSH)

    counts = [(disk.read(0, 1) and 0) or len(syncs)]
    for action in (
        lambda: disk.write(0, bytes(512)),
        lambda: disk.segments(T.WRITE_ZEROES, (0, 8, 0)),
        lambda: disk.segments(T.DISCARD, (0, 8, 0)),
    ):
        assert action() == S.OK
        counts.append(len(syncs))

    assert counts == [0, 1, 2, 3]


def test_after_a_failed_flush_none_succeeds(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        first = disk.request(T.FLUSH)[0]

    assert [first, disk.request(T.FLUSH)[0], disk.request(T.FLUSH)[0]] == [S.IOERR] * 3
    assert disk.works
    assert [fields["why"] for _, fields in disk.board.logs] == ["Input/output error"] * 3


# Zeros and holes.


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_write_zeroes(disk: Disk, path: Path, flags: int) -> None:
    assert disk.segments(T.WRITE_ZEROES, (3, 100, flags)) == S.OK
    assert path.read_bytes() == CONTENT[: 3 * 512] + bytes(100 * 512) + CONTENT[103 * 512 :]


def test_write_zeroes_where_the_file_system_cannot(disk: Disk, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.host.disk._fallocate", lambda: lambda *arguments: errno.EOPNOTSUPP)

    assert disk.segments(T.WRITE_ZEROES, (3, 200, 0)) == S.OK
    assert disk.segments(T.DISCARD, (0, 1, 0)) == S.OK
    assert path.read_bytes() == CONTENT[: 3 * 512] + bytes(200 * 512) + CONTENT[203 * 512 :]


def test_discard_gives_space_back(disk: Disk, path: Path) -> None:
    before = path.stat().st_blocks

    assert disk.segments(T.DISCARD, (0, 64, 0), (128, 64, 0)) == S.OK

    assert path.stat().st_blocks <= before - 128
    assert path.stat().st_size == SIZE
    assert disk.read(64, 64) == CONTENT[64 * 512 : 128 * 512]


# Snapshots.


def test_snapshot_leaves_the_file_alone(connect: Connect, path: Path) -> None:
    disk = connect(snapshot=True)

    assert disk.write(1, b"x" * 512) == S.OK
    assert disk.segments(T.WRITE_ZEROES, (4, 2, 0)) == S.OK

    assert disk.read(0, 7) == CONTENT[:512] + b"x" * 512 + CONTENT[1024:2048] + bytes(1024) + CONTENT[3072:3584]
    assert path.read_bytes() == CONTENT


def test_snapshots_of_one_image_do_not_meet(connect: Connect) -> None:
    first, second = connect(snapshot=True), connect(snapshot=True)

    first.write(7, bytes(512))

    assert second.works


# Resizing.


def test_resize(disk: Disk, path: Path) -> None:
    generation = disk.driver.get("ConfigGeneration")
    os.truncate(path, 2 * SIZE)

    with disk.device.lock:
        disk.device.resize()

    assert disk.config.capacity == 2 * SECTORS
    assert disk.driver.interrupts() == INTERRUPT.CONFIGURATION
    assert disk.driver.get("ConfigGeneration") != generation
    assert disk.read(2 * SECTORS - 1, 1) == bytes(512)


def test_resize_to_the_same_size_is_nothing_new(disk: Disk) -> None:
    with disk.device.lock:
        disk.device.resize()

    assert disk.driver.interrupts() == 0


def test_snapshot_cannot_be_resized(connect: Connect) -> None:
    with pytest.raises(ConfigError, match="stop the machine"):
        connect(snapshot=True).device.resize()


# State.


def test_state_and_restore(disk: Disk) -> None:
    state = disk.driver.transport.state()

    disk.driver.set("Status", 0)
    disk.driver.transport.restore(state)

    assert disk.works


def test_requests_that_wait_are_served_after_restore(disk: Disk) -> None:
    head = disk.submit(T.IN, 1, room=[512])
    state = disk.driver.transport.state()

    disk.driver.transport.restore(state)
    disk.board.steps.turn()

    assert disk.driver.used(0) == [(head, 513)]


def test_state_of_a_disk_of_another_size(disk: Disk, path: Path) -> None:
    state = disk.driver.transport.state()
    state["core"]["device"]["capacity"] += 1

    with pytest.raises(ValueError, match="256 sectors"):
        disk.driver.transport.restore(state)


def test_close_gives_the_image_back(disk: Disk, connect: Connect) -> None:
    disk.driver.set("Status", 0)
    disk.device.close()
    disk.device.close()

    assert connect().works


# Limits.


def test_operations_per_second(connect: Connect) -> None:
    disk = connect(iops=10)
    served = []

    for n in range(6):
        disk.submit(T.IN, n, room=[512])
    disk.driver.kick(0)
    served.append(len(disk.driver.used(0)))
    disk.driver.kick(0)  # asking again does not help
    served.append(len(disk.driver.used(0)))
    for _ in range(4):
        disk.board.steps.advance(0.1)
        disk.board.steps.turn()
        served.append(len(disk.driver.used(0)))

    assert served == [2, 0, 1, 1, 1, 1]
    assert disk.driver.interrupts() == INTERRUPT.USED_BUFFER


def test_bytes_per_second(connect: Connect) -> None:
    disk = connect(bandwidth="64K")

    for _ in range(8):
        disk.submit(T.IN, 0, room=[32 << 10])
    disk.driver.kick(0)
    served = [len(disk.driver.used(0))]
    for _ in range(40):
        disk.board.steps.advance(0.1)
        disk.board.steps.turn()
        served.append(len(disk.driver.used(0)))

    assert sum(served) == 8
    assert sum(served[:21]) == 5  # one at once, on credit, and then two a second
    assert max(served) == 1


def test_throttled_queue_does_nothing_meanwhile(connect: Connect) -> None:
    disk = connect(iops=1)
    for n in range(4):
        disk.submit(T.IN, n, room=[512])
    disk.driver.kick(0)

    turns = [len(disk.board.steps._queue) for _ in range(3) if disk.board.steps.turn() is None]

    assert turns == [0, 0, 0]
    assert len(disk.board.steps._due) == 1


def test_no_queue_starves_under_a_limit(connect: Connect) -> None:
    disk = connect(FEATURES | BLK_F.MQ, queues=2, iops=10)
    for queue in (0, 1):
        for n in range(20):
            disk.submit(T.IN, n, room=[512], queue=queue)
        disk.driver.kick(queue)

    for _ in range(20):
        disk.board.steps.advance(0.1)
        disk.board.steps.turn()

    assert min(len(disk.driver.used(0)), len(disk.driver.used(1))) >= 8


def test_limit_outlives_a_reset(connect: Connect) -> None:
    disk = connect(iops=1)
    for n in range(3):
        disk.submit(T.IN, n, room=[512])
    disk.driver.kick(0)

    disk.driver.start(FEATURES)
    head = disk.submit(T.IN, 7, room=[512])
    disk.driver.kick(0)
    early = disk.driver.used(0)
    disk.board.steps.advance(1)
    disk.board.steps.turn()

    assert (early, disk.driver.used(0)) == ([], [(head, 513)])


# What hostile guests do; the numbers are rows of the list of known attacks.


@pytest.mark.parametrize("kind", [T.IN, T.OUT])
@pytest.mark.parametrize("sector", [SECTORS, SECTORS + 1, 2**55, 2**55 - 1, 2**63, 2**64 - 1, 2**64 - 2])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hostile_28_sector_beyond_the_end(disk: Disk, path: Path, kind: int, sector: int, count: int) -> None:
    data, room = [([], [512] * count), ([bytes(512)] * count, [])][kind == T.OUT]

    assert disk.request(kind, sector, data, room)[0] == S.IOERR
    assert path.read_bytes() == CONTENT
    assert disk.works


@pytest.mark.parametrize("kind", [T.IN, T.OUT])
def test_hostile_29_request_that_ends_beyond_the_end(disk: Disk, path: Path, kind: int) -> None:
    data, room = [([], [512] * 3), ([bytes(512)] * 3, [])][kind == T.OUT]

    assert disk.request(kind, SECTORS - 2, data, room)[0] == S.IOERR
    assert path.read_bytes() == CONTENT
    assert disk.works


@pytest.mark.parametrize("length", [1, 511, 513])
def test_hostile_30_length_that_is_no_sectors(disk: Disk, path: Path, length: int) -> None:
    assert disk.request(T.OUT, 0, [bytes(length)])[0] == S.IOERR
    assert disk.request(T.IN, 0, room=[length])[0] == S.IOERR
    assert path.read_bytes() == CONTENT
    assert disk.works


SEGMENTS = {
    "no sectors": ([(0, 0, 0)], S.IOERR),
    "beyond the end": ([(SECTORS, 1, 0)], S.IOERR),
    "far beyond the end": ([(2**55 - 1, 8, 0)], S.IOERR),
    "wraps round": ([(2**64 - 1, 2, 0)], S.IOERR),
    "ends beyond the end": ([(SECTORS - 1, 2, 0)], S.IOERR),
    "longer than allowed": ([(0, 0xFFFFFFFF, 0)], S.IOERR),
    "second one is bad": ([(0, 8, 0), (SECTORS, 1, 0)], S.IOERR),
    "too many": ([(0, 8, 0)] * 33, S.IOERR),
    "none": ([], S.IOERR),
    "unknown flag": ([(0, 8, 2)], S.UNSUPP),
    "all flags": ([(0, 8, 0xFFFFFFFF)], S.UNSUPP),
}


@pytest.mark.parametrize("kind", [T.DISCARD, T.WRITE_ZEROES])
@pytest.mark.parametrize(("segments", "status"), SEGMENTS.values(), ids=SEGMENTS)
def test_hostile_31_bad_ranges(
    disk: Disk, path: Path, kind: int, segments: list[tuple[int, int, int]], status: int
) -> None:
    assert disk.segments(kind, *segments) == status
    assert path.read_bytes() == CONTENT
    assert disk.works


def test_hostile_31_unmap_is_no_flag_of_discard(disk: Disk, path: Path) -> None:
    assert disk.segments(T.DISCARD, (0, 8, UNMAP)) == S.UNSUPP
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", [T.DISCARD, T.WRITE_ZEROES])
@pytest.mark.parametrize("length", [1, 15, 17])
def test_hostile_31_part_of_a_range(disk: Disk, path: Path, kind: int, length: int) -> None:
    assert disk.request(kind, 0, [bytes(length)])[0] == S.IOERR
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", [T.DISCARD, T.WRITE_ZEROES])
def test_hostile_31_feature_was_not_accepted(connect: Connect, path: Path, kind: int) -> None:
    disk = connect(F.VERSION_1)

    assert disk.segments(kind, (0, 8, 0)) == S.UNSUPP
    assert path.read_bytes() == CONTENT


def test_hostile_32_write_to_a_read_only_disk(connect: Connect, path: Path) -> None:
    disk = connect(READ_ONLY, ro=True)

    assert disk.write(0, bytes(512)) == S.IOERR
    assert disk.segments(T.WRITE_ZEROES, (0, 8, 0)) == S.UNSUPP
    assert disk.segments(T.DISCARD, (0, 8, 0)) == S.UNSUPP
    assert disk.request(T.FLUSH)[0] == S.OK
    assert path.read_bytes() == CONTENT
    assert disk.works


def test_hostile_32_read_only_descriptor(connect: Connect, path: Path) -> None:
    connect(READ_ONLY, ro=True)
    flags = [
        Path(f"/proc/self/fdinfo/{link.name}").read_text()
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink() and link.readlink() == path
    ]

    assert [int(text.split()[3], 8) & os.O_ACCMODE for text in flags] == [os.O_RDONLY]


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 10, 12, 14, 0x8000_0000, 0x8000_0001, 0xFFFF_FFFF])
def test_hostile_33_unknown_type(disk: Disk, path: Path, kind: int) -> None:
    assert disk.request(kind, 0, [bytes(512)])[0] == S.UNSUPP
    assert disk.request(kind, 0, room=[512])[0] == S.UNSUPP
    assert path.read_bytes() == CONTENT
    assert disk.works


@pytest.mark.parametrize(("room", "written"), [(0, 1), (1, 2), (19, 20), (20, 21), (21, 20), (4096, 20)])
def test_hostile_34_room_for_the_serial(connect: Connect, room: int, written: int) -> None:
    disk = connect(serial="abcdefghijklmnopqrst")

    status, answer, count = disk.request(T.GET_ID, room=[room])

    assert (status, count) == (S.OK, written)
    assert answer == b"abcdefghijklmnopqrst"[:room].ljust(room, b"\0")


def test_hostile_34_serial_without_status(disk: Disk) -> None:
    disk.driver.submit(0, [HEADER.pack(T.GET_ID, 0, 0)])

    disk.driver.kick(0)

    assert [count for _, count in disk.driver.used(0)] == [0]
    assert disk.works


OUT = HEADER.pack(T.OUT, 0, 0)
IN = HEADER.pack(T.IN, 0, 0)
BAD_LAYOUTS: dict[str, tuple[list[bytes], list[int]]] = {
    "status of no bytes": ([OUT, bytes(512)], [0]),
    "status of 4096 bytes": ([OUT, bytes(512)], [4096]),
    "status not writable": ([OUT, bytes(512), bytes(1)], []),
    "header writable": ([], [16, 512, 1]),
    "header of 8 bytes": ([OUT[:8]], [1]),
    "header of 15 bytes": ([OUT[:15]], [1]),
    "header of no bytes": ([b""], [1]),
    "write with room": ([OUT], [512, 1]),
    "read with data": ([IN, bytes(512)], [1]),
    "read and write": ([IN, bytes(512)], [512, 1]),
    "read without status": ([IN], [512]),
    "flush with data": ([HEADER.pack(T.FLUSH, 0, 0), bytes(512)], [1]),
    "flush with room": ([HEADER.pack(T.FLUSH, 0, 0)], [512, 1]),
    "serial with data": ([HEADER.pack(T.GET_ID, 0, 0), bytes(20)], [20, 1]),
    "discard with room": ([HEADER.pack(T.DISCARD, 0, 0), SEGMENT.pack(0, 8, 0)], [512, 1]),
    "nothing to read, nothing to write": ([b""], [0]),
}


@pytest.mark.parametrize(("readable", "writable"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_hostile_35_bad_layout(disk: Disk, path: Path, readable: list[bytes], writable: list[int]) -> None:
    head = disk.driver.submit(0, readable, writable)

    disk.driver.kick(0)

    ((answered, count),) = disk.driver.used(0)
    assert (answered, count) == (head, min(1, sum(writable)) if sum(writable) <= 1 else 0)
    assert disk.driver.data(0, head)[-1:] in (b"", bytes([S.IOERR]))
    assert path.read_bytes() == CONTENT
    assert disk.works


def test_hostile_35_every_head_comes_back(disk: Disk) -> None:
    for _ in range(2560):
        disk.driver.submit(0, [OUT[:8]])
        disk.driver.transport.core.notify(0)

    assert len(disk.driver.used(0)) == 2560
    assert disk.works


def test_hostile_36_nothing_happens_after_a_reset(disk: Disk, path: Path) -> None:
    disk.submit(T.OUT, 0, [bytes(512)])
    disk.driver.set("QueueNotify", 0)  # and before the event loop's turn
    disk.driver.set("Status", 0)
    disk.board.steps.turn()

    assert path.read_bytes() == CONTENT


def test_hostile_39_config_is_read_only(disk: Disk) -> None:
    before = bytes(disk.config.buf)

    for offset in (0, 4, 8, 32, 0x3C, 0xEFC, 0xEFF):
        for size in (1, 2, 4, 8):
            disk.driver.write_config(offset, size, 2 ** (8 * size) - 1)

    assert bytes(disk.config.buf) == before
    assert disk.works


def test_hostile_40_file_size_limit(connect: Connect, path: Path) -> None:
    """EFBIG: the image is sparse, and the host refuses to let it grow."""
    os.truncate(path, 2 * SIZE)
    disk = connect()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
    try:
        refused = disk.write(SECTORS, b"x" * 512)
        inside = disk.write(0, b"y" * 512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert (refused, inside) == (S.IOERR, S.OK)
    assert disk.write(SECTORS, b"z" * 512) == S.OK
    assert disk.read(SECTORS, 1) == b"z" * 512
    assert [fields["why"] for _, fields in disk.board.logs] == [os.strerror(errno.EFBIG)]


def test_hostile_40_disk_full(disk: Disk) -> None:
    """No room for more behind a first part that fitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        refused = disk.write(0, b"x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert refused == S.IOERR
    assert disk.read(0, 1) == b"x" * 512
    assert disk.write(0, b"y" * 4096) == S.OK
    assert disk.read(0, 8) == b"y" * 4096
    assert [fields["why"] for _, fields in disk.board.logs] == [os.strerror(errno.EFBIG)]


def test_hostile_40_image_cut_short(disk: Disk, path: Path) -> None:
    os.truncate(path, 8 * 512)

    assert disk.request(T.IN, 9, room=[512])[0] == S.IOERR
    assert disk.works


# Any sequence of requests has the effect that it would have on a plain array.


def ranges(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(0, SECTORS - 1).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(1, min(limit, SECTORS - start)))
    )


ACTIONS = st.lists(
    st.tuples(st.sampled_from([T.IN, T.OUT, T.WRITE_ZEROES, T.DISCARD]), ranges(200), st.integers(1, 255)), max_size=12
)


@pytest.mark.parametrize("options", [{}, {"snapshot": True}, {"cache": "direct"}], ids=str)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_like_an_array(path: Path, options: dict[str, Any], actions: list[tuple[int, tuple[int, int], int]]) -> None:
    path.write_bytes(CONTENT)
    disk = Disk(path, **options)
    model = bytearray(CONTENT)

    for kind, (start, count), number in actions:
        where = slice(512 * start, 512 * (start + count))
        act(disk, model, kind, where, number)

    assert disk.read(0, SECTORS) == model
    disk.device.close()
    assert path.read_bytes() == (CONTENT if "snapshot" in options else model)


def act(disk: Disk, model: bytearray, kind: int, where: slice, number: int) -> None:
    start, count = where.start // 512, (where.stop - where.start) // 512
    if kind == T.IN:
        assert disk.read(start, count) == model[where]
    elif kind == T.OUT:
        data = bytes([number]) * (512 * count)
        assert disk.write(start, data) == S.OK
        model[where] = data
    elif kind == T.WRITE_ZEROES:
        assert disk.segments(kind, (start, count, number & UNMAP)) == S.OK
        model[where] = bytes(512 * count)
    else:
        assert disk.segments(kind, (start, count, 0)) == S.OK
        seen = disk.read(start, count)
        assert all(seen[n : n + 512] in (bytes(512), model[where][n : n + 512]) for n in range(0, len(seen), 512))
        model[where] = seen  # 5.2.6.2: its content may be anything
