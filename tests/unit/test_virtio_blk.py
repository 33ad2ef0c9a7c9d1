"""The block device (VIRTIO 1.2, 5.2), driven through its rings, on real files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from disks import CONTENT, FEATURES, READ_ONLY, SECTORS, SIZE, Connect, Disk, failing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.core.errors import ConfigError, NotFoundError
from kvmpy.testing import FakeBoard
from kvmpy.virtio.blk import BLK_F, UNMAP, Blk, S, T
from kvmpy.virtio.spec import INTERRUPT, F

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


def test_more_buffers_than_one_call_takes(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.host.disk.IOV_MAX", 3)
    disk = connect()

    status, data, _ = disk.request(T.IN, 0, room=[100] * 10 + [24])

    assert (status, data) == (S.OK, CONTENT[:1024])


def test_read_of_nothing(disk: Disk) -> None:
    assert disk.request(T.IN, 3) == (S.OK, b"", 1)


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


# Durability.


def test_unsafe_does_not_flush(connect: Connect, syncs: list[int]) -> None:
    assert connect(cache="unsafe").request(T.FLUSH)[0] == S.OK
    assert syncs == []


# Zeros and holes.


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_write_zeroes(disk: Disk, path: Path, flags: int) -> None:
    assert disk.segments(T.WRITE_ZEROES, (3, 100, flags)) == S.OK
    assert path.read_bytes() == CONTENT[: 3 * 512] + bytes(100 * 512) + CONTENT[103 * 512 :]


def test_write_zeroes_where_the_file_system_cannot(disk: Disk, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.host.syscalls.fallocate", failing(errno.EOPNOTSUPP))

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
