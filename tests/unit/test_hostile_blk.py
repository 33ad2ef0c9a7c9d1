"""What hostile guests do to disks: rows 28 to 40 of the list of known attacks (row 38, images that lie: see
test_hostile_qcow2.py)."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
from disks import CONTENT, READ_ONLY, SECTORS, SIZE, Connect, Disk

from kvmpy.virtio.blk import HEADER, SEGMENT, UNMAP, S, T
from kvmpy.virtio.spec import F


@pytest.mark.parametrize("kind", [T.IN, T.OUT])
@pytest.mark.parametrize("sector", [SECTORS, SECTORS + 1, 2**55, 2**55 - 1, 2**63, 2**64 - 1, 2**64 - 2])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hostile_28_sector_beyond_the_end(disk: Disk, path: Path, kind: int, sector: int, count: int) -> None:
    data, room = [([], [512] * count), ([bytes(512)] * count, [])][kind == T.OUT]

    assert disk.request(kind, sector, data, room)[0] == S.IOERR
    assert path.read_bytes() == CONTENT
    assert disk.works


@pytest.mark.parametrize("kind", [T.IN, T.OUT])
@pytest.mark.parametrize("count", [2, 3, 100])
def test_hostile_29_sum_of_the_buffers_ends_beyond_the_end(disk: Disk, path: Path, kind: int, count: int) -> None:
    """Each buffer would fit into the last sector."""
    data, room = [([], [512] * count), ([bytes(512)] * count, [])][kind == T.OUT]

    assert disk.request(kind, SECTORS - 1, data, room)[0] == S.IOERR
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
    """Requests that were on their way touch neither the image nor memory, when their turn on the event loop comes."""
    disk.submit(T.OUT, 0, [bytes(512)])
    disk.submit(T.IN, 7, room=[512])
    before = disk.board.mem.read(0, 16 << 20)
    disk.driver.set("QueueNotify", 0)

    disk.driver.set("Status", 0)
    disk.board.steps.turn()

    assert path.read_bytes() == CONTENT
    assert disk.board.mem.read(0, 16 << 20) == before


def test_hostile_36_limit_that_ends_after_a_reset(connect: Connect) -> None:
    disk = connect(iops=1)
    for n in range(4):
        disk.submit(T.IN, n, room=[512])
    disk.driver.kick(0)
    before = disk.board.mem.read(0, 16 << 20)

    disk.driver.set("Status", 0)
    disk.board.steps.advance(5)
    disk.board.steps.turn()

    assert disk.board.mem.read(0, 16 << 20) == before


def test_hostile_37_format_is_never_guessed(connect: Connect) -> None:
    """A header that the guest writes does not change what its disk is."""
    first = connect()
    first.write(0, b"QFI\xfb\0\0\0\3".ljust(512, b"\0"))
    first.device.close()

    again = connect()

    assert again.config.capacity == SECTORS
    assert again.read(0, 1)[:8] == b"QFI\xfb\0\0\0\3"


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


@pytest.mark.parametrize("engine", ["python"], indirect=True)
def test_hostile_40_host_input_output_error(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO in each direction."""

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        patch.setattr(os, "preadv", fail)
        refused = [disk.write(0, b"x" * 512), disk.request(T.IN, 0, room=[512])[0]]

    assert refused == [S.IOERR] * 2
    assert disk.write(0, b"y" * 512) == S.OK
    assert disk.works


def test_hostile_40_image_cut_short(disk: Disk, path: Path) -> None:
    os.truncate(path, 8 * 512)

    assert disk.request(T.IN, 9, room=[512])[0] == S.IOERR
    assert disk.works
