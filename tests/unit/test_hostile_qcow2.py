"""qcow2 images that lie about themselves (rows 37 and 38 of the list of known attacks): one line that names the file
and the field, or EIO, nothing else."""

from __future__ import annotations

import random
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvmpy.core.errors import HostError, ImageError, KvmpyError, NotFoundError
from kvmpy.host.qcow2 import Qcow2
from kvmpy.testing import FakeBoard
from kvmpy.virtio.blk import Blk

CLUSTER = 512
BITS = 9
SIZE = 32 * CLUSTER
HEADER_LENGTH = 112
COPIED = 1 << 63
COMPRESSED = 1 << 62

# Field of the header: its offset, its width.
FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}

# Clusters of the image: one of each kind of table, data, compressed data, a snapshot of nothing.
REFCOUNT_TABLE, REFCOUNT_BLOCK, L1, L2, DATA, PACKED, SNAPSHOTS, SNAPSHOT_L1, END = range(1, 10)


def image(version: int = 3, **fields: int) -> bytearray:
    """A small image in which everything has a place; `fields` of its header are overwritten."""
    header = {
        "magic": 0x514649FB, "version": version, "cluster_bits": BITS, "size": SIZE, "l1_size": 1,
        "l1_table_offset": L1 * CLUSTER, "refcount_table_offset": REFCOUNT_TABLE * CLUSTER,
        "refcount_table_clusters": 1, "nb_snapshots": 1, "snapshots_offset": SNAPSHOTS * CLUSTER,
    }  # fmt: skip
    header |= {"refcount_order": 4, "header_length": HEADER_LENGTH} if version == 3 else {}
    data = bytearray(END * CLUSTER)
    struct.pack_into(">Q", data, REFCOUNT_TABLE * CLUSTER, REFCOUNT_BLOCK * CLUSTER)
    struct.pack_into(f">{END}H", data, REFCOUNT_BLOCK * CLUSTER, *[1] * END)
    struct.pack_into(">Q", data, L1 * CLUSTER, L2 * CLUSTER | COPIED)
    struct.pack_into(">QQ", data, L2 * CLUSTER, DATA * CLUSTER | COPIED, PACKED * CLUSTER | COMPRESSED)
    data[DATA * CLUSTER : (DATA + 1) * CLUSTER] = bytes([1]) * CLUSTER
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(bytes([2]) * CLUSTER) + packer.flush()
    data[PACKED * CLUSTER : PACKED * CLUSTER + len(packed)] = packed
    struct.pack_into(">QIHH", data, SNAPSHOTS * CLUSTER, SNAPSHOT_L1 * CLUSTER, 1, 1, 1)
    for name, value in (header | fields).items():
        at, width = FIELDS[name]
        data[at : at + width] = value.to_bytes(width, "big")
    return data


def use(path: Path, data: bytes, *, read_only: bool = False) -> KvmpyError | list[OSError]:
    """Do all that can be done with an image; the error that refuses it, or those of the operations."""
    path.write_bytes(data)
    try:
        disk = Qcow2(path, read_only=read_only, unsafe=True)
    except KvmpyError as error:
        return error
    room = bytearray(4 * CLUSTER)
    sector = memoryview(bytes(CLUSTER))
    end = disk.size - CLUSTER
    failed = []
    for operation in (
        lambda: disk.readv(0, [memoryview(room)[: min(len(room), disk.size)]]),
        lambda: disk.readv(end, [memoryview(room)[:CLUSTER]]),
        lambda: read_only or disk.writev(0, [sector]),
        lambda: read_only or disk.writev(min(CLUSTER, end), [sector]),
        lambda: read_only or disk.writev(end, [sector]),
        lambda: read_only or disk.discard(0, min(disk.size, 64 * CLUSTER)),
        lambda: read_only or disk.write_zeroes(0, min(disk.size, 64 * CLUSTER), True),
        disk.flush,
        disk.close,
    ):
        try:
            operation()
        except OSError as error:
            failed.append(error)
    return failed


def fine(result: KvmpyError | list[OSError]) -> bool:
    """Whether that is how to fail: a line with a remedy, or I/O errors."""
    if isinstance(result, KvmpyError):
        return bool(result.remedy) and "\n" not in str(result) and isinstance(result, ImageError)
    return all(type(error) is OSError for error in result)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.qcow2"


@pytest.mark.parametrize("version", [2, 3])
def test_the_image_itself_is_good(path: Path, version: int) -> None:
    path.write_bytes(image(version))
    disk = Qcow2(path)
    room = bytearray(3 * CLUSTER)

    disk.readv(0, [memoryview(room)])
    disk.close()

    assert room == bytes([1]) * CLUSTER + bytes([2]) * CLUSTER + bytes(CLUSTER)
    assert use(path, image(version)) == []


# Where a field is absurd only beside another one, which is named then.
SAID_INSTEAD = {
    ("l1_size", 1 << 20): "l1_table_offset 0x600",
    ("size", (1 << 63) - 512): "l1_size 1",
    ("refcount_table_clusters", END): "refcount_table_offset 0x200",
    ("nb_snapshots", 65536): "snapshots_offset",
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 0), ("version", 1), ("version", 4), ("cluster_bits", 0), ("cluster_bits", 8),
        ("cluster_bits", 22), ("cluster_bits", 63), ("cluster_bits", 0xFFFFFFFF), ("size", 0), ("size", 513),
        ("l1_size", 0), ("l1_size", 0xFFFFFFFF), ("l1_size", 1 << 20), ("size", (1 << 63) - 512),
        ("l1_table_offset", 0), ("l1_table_offset", 1), ("l1_table_offset", 1 << 62),
        ("l1_table_offset", END * CLUSTER), ("refcount_table_offset", 0), ("refcount_table_offset", 513),
        ("refcount_table_offset", 0xFFFFFFFFFFFFFE00), ("refcount_table_clusters", 0),
        ("refcount_table_clusters", 0xFFFFFFFF), ("refcount_table_clusters", END), ("nb_snapshots", 0xFFFFFFFF),
        ("nb_snapshots", 65536), ("snapshots_offset", 7), ("snapshots_offset", 1 << 60), ("refcount_order", 7),
        ("refcount_order", 0xFFFFFFFF), ("header_length", 0), ("header_length", 103), ("header_length", 0xFFFFFFF8),
        ("header_length", 109), ("compression_type", 1), ("compression_type", 255), ("backing_file_offset", 8),
        ("backing_file_offset", 1 << 63),
    ],
)  # fmt: skip
def test_hostile_38_absurd_field(path: Path, field: str, value: int, read_only: bool) -> None:
    fields = {"backing_file_size": 8, field: value}
    result = use(path, image(**fields), read_only=read_only)

    assert isinstance(result, ImageError)
    assert str(path) in result.what
    assert re.search(SAID_INSTEAD.get((field, value), field), result.what)
    assert result.remedy


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"magic": 0}, "no qcow2 image"),
        ({"crypt_method": 1}, "encrypted"),
        ({"crypt_method": 2}, "encrypted"),
        ({"incompatible_features": 1 << 4}, "extended L2"),
        ({"incompatible_features": 1 << 5}, "unknown incompatible_features 0x20"),
        ({"incompatible_features": 1 << 63}, "unknown incompatible_features"),
        ({"incompatible_features": 1 << 3}, "compression_type 0"),
        ({"backing_file_offset": 256, "backing_file_size": 0}, "backing_file_size 0"),
        ({"backing_file_offset": 256, "backing_file_size": 1024}, "backing_file_size 1024"),
        ({"backing_file_offset": 256, "backing_file_size": 4}, "does not print"),
    ],
)
def test_hostile_38_refused(path: Path, fields: dict[str, int], said: str) -> None:
    result = use(path, image(**fields), read_only=True)

    assert said in str(result)
    assert fine(result)


def test_hostile_37_external_data_file_is_refused(path: Path) -> None:
    result = use(path, image(incompatible_features=1 << 2), read_only=True)

    assert "external data file" in str(result)
    assert fine(result)


def backed(name: bytes) -> bytearray:
    """An image over the qcow2 image `name`."""
    at = CLUSTER - len(name)
    data = image(backing_file_offset=at, backing_file_size=len(name))
    data[at:CLUSTER] = name
    struct.pack_into(">II8s", data, HEADER_LENGTH, 0xE2792ACA, 5, b"qcow2")  # the backing file's format
    return data


def test_hostile_37_backing_file_is_not_opened_unasked(path: Path) -> None:
    path.write_bytes(backed(b"/etc/shadow"))

    with pytest.raises(ImageError, match="which is opened only when asked for"):
        Blk(path=path, format="qcow2").attach(FakeBoard())


def test_hostile_38_image_that_backs_itself(path: Path) -> None:
    path.write_bytes(backed(path.name.encode()))

    with pytest.raises(ImageError, match="a cycle"):
        Qcow2(path, backing=True)


def test_hostile_38_images_that_back_each_other(path: Path) -> None:
    path.write_bytes(backed(b"other.qcow2"))
    (path.parent / "other.qcow2").write_bytes(backed(path.name.encode()))

    with pytest.raises(ImageError, match="a cycle"):
        Qcow2(path, backing=True)


@pytest.mark.parametrize("counted", [0, 0xFFFF])
def test_hostile_38_reference_counts_that_lie(path: Path, counted: int) -> None:
    """Nothing but a later repair depends on the counts of clusters that are in use."""
    data = image()
    struct.pack_into(f">{END}H", data, REFCOUNT_BLOCK * CLUSTER, *[counted] * END)

    assert fine(use(path, data))
    assert fine(use(path, data, read_only=True))


@pytest.mark.parametrize(("bit", "said"), [(0, "dirty"), (1, "damaged")])
def test_hostile_38_marked_images_are_only_read(path: Path, bit: int, said: str) -> None:
    data = image(incompatible_features=1 << bit)

    assert said in str(use(path, data))
    assert "qemu-img check -r all" in str(use(path, data))
    assert use(path, data, read_only=True) == []


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFF8, 512 - HEADER_LENGTH - 7])
def test_hostile_38_header_extension_is_too_long(path: Path, length: int) -> None:
    data = image()
    struct.pack_into(">II", data, HEADER_LENGTH, 0x12345678, length)

    assert "header extension 0x12345678" in str(use(path, data))


@pytest.mark.parametrize(
    ("at", "entry", "said"),
    [
        (L1, 0x1234 | COPIED, "L1 table entry 0"),
        (L1, END * CLUSTER | COPIED, "L1 table entry 0"),
        (L1, 1 << 60, "L1 table entry 0"),
        (L1, REFCOUNT_BLOCK * CLUSTER | COPIED, "two tables"),
        (L1, SNAPSHOT_L1 * CLUSTER | COPIED, "two tables"),
        (REFCOUNT_TABLE, 1, "refcount table entry 0"),
        (REFCOUNT_TABLE, END * CLUSTER, "refcount table entry 0"),
        (REFCOUNT_TABLE, L1 * CLUSTER, "two tables"),
        (SNAPSHOTS, 1, "snapshot 0"),
        (SNAPSHOTS, 1 << 63, "snapshot 0"),
    ],
)
def test_hostile_38_table_leads_nowhere(path: Path, at: int, entry: int, said: str) -> None:
    data = image()
    struct.pack_into(">Q", data, at * CLUSTER, entry)
    result = use(path, data)

    assert said in str(result)
    assert fine(result)


@pytest.mark.parametrize(
    "entry",
    [
        DATA * CLUSTER + 2 | COPIED, END * CLUSTER | COPIED, 1 << 55 | COPIED, 1 << 56, COPIED,
        COPIED | COMPRESSED | PACKED * CLUSTER, COMPRESSED | (1 << 61) - 1, COMPRESSED | DATA * CLUSTER,
        0xFFFFFFFFFFFFFFFF,
    ],
)  # fmt: skip
def test_hostile_38_bad_l2_entry_is_an_input_output_error(path: Path, entry: int) -> None:
    data = image()
    struct.pack_into(">Q", data, L2 * CLUSTER, entry)
    path.write_bytes(data)
    disk = Qcow2(path)

    with pytest.raises(OSError, match="qcow2 image"):
        disk.readv(0, [memoryview(bytearray(CLUSTER))])
    disk.close()


def test_hostile_38_zero_flag_means_nothing_in_version_2(path: Path) -> None:
    data = image(2)
    struct.pack_into(">Q", data, L2 * CLUSTER, 1)
    path.write_bytes(data)
    disk = Qcow2(path)

    with pytest.raises(OSError, match="bad L2 entry 0x1"):
        disk.readv(0, [memoryview(bytearray(CLUSTER))])
    disk.close()


@pytest.mark.parametrize("entry", [COPIED, 0, 1], ids=["in place", "shared", "preallocated"])
@pytest.mark.parametrize("table", [REFCOUNT_TABLE, REFCOUNT_BLOCK, L1, L2, SNAPSHOTS, SNAPSHOT_L1])
def test_hostile_37_guest_never_writes_where_tables_are(path: Path, table: int, entry: int) -> None:
    """Else a guest could make itself a header with a backing file, for the next time the image is opened."""
    data = image()
    struct.pack_into(">Q", data, L2 * CLUSTER, table * CLUSTER | entry)
    path.write_bytes(data)
    disk = Qcow2(path)

    with pytest.raises(OSError, match="qcow2 image"):
        disk.writev(0, [memoryview(b"evil" * 128)])
    with pytest.raises(OSError, match="qcow2 image"):
        disk.write_zeroes(0, CLUSTER, True)
    disk.close()

    assert path.read_bytes() == data


@pytest.mark.parametrize("used", [REFCOUNT_TABLE, REFCOUNT_BLOCK, L1, L2, SNAPSHOT_L1])
def test_hostile_38_table_that_is_counted_as_free_is_not_given_away(path: Path, used: int) -> None:
    data = image()
    struct.pack_into(">H", data, REFCOUNT_BLOCK * CLUSTER + 2 * used, 0)
    path.write_bytes(data)
    disk = Qcow2(path)

    with pytest.raises(OSError, match="counted as free; repair it"):
        disk.writev(8 * CLUSTER, [memoryview(bytes(CLUSTER))])
    disk.close()

    assert path.read_bytes() == data


def test_hostile_38_a_bomb_gives_one_cluster(path: Path) -> None:
    data = image()
    bomb = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = bomb.compress(bytes(200_000)) + bomb.flush()
    data[PACKED * CLUSTER : PACKED * CLUSTER + len(packed)] = packed
    path.write_bytes(data)
    disk = Qcow2(path)
    room = bytearray(CLUSTER)

    disk.readv(CLUSTER, [memoryview(room)])
    disk.close()

    assert room == bytes(CLUSTER)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_hostile_38_cut_off_anywhere(path: Path, version: int, read_only: bool) -> None:
    data = image(version)
    lengths = sorted({*range(2 * CLUSTER), *range(0, len(data), 31), *_around(range(0, len(data), CLUSTER))})

    wrong = {n: result for n in lengths if not fine(result := use(path, data[:n], read_only=read_only))}

    assert wrong == {}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_hostile_38_every_byte_damaged(path: Path, version: int, read_only: bool) -> None:
    original = image(version)
    places = [at for at, byte in enumerate(original) if byte or at < 128 or at % CLUSTER < 24]
    wrong = {}

    for at in places:
        for value in {0, 0xFF, original[at] ^ 1, original[at] ^ 0x80, original[at] + 1 & 0xFF}:
            data = original[:]
            data[at] = value
            result = use(path, data, read_only=read_only)
            wrong |= {} if fine(result) else {(at, value): result}

    assert wrong == {}
    assert len(places) > 700


@pytest.mark.parametrize("read_only", [False, True])
def test_hostile_38_fields_and_entries_with_extreme_numbers(path: Path, read_only: bool) -> None:
    rng = random.Random(5)
    words = [at for at in range(0, END * CLUSTER, 4) if at < HEADER_LENGTH or at % CLUSTER < 16]
    extremes = [0, 1, 0x200, 0x400, 0x800, 0xFFFFFE00, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xC0000000]
    wrong = {}

    for _ in range(1500):
        data = image()
        changes = {rng.choice(words): rng.choice(extremes) for _ in range(rng.randint(1, 4))}
        for at, value in changes.items():
            struct.pack_into(">I", data, at, value)
        result = use(path, data, read_only=read_only)
        wrong |= {} if fine(result) else {str(changes): result}

    assert wrong == {}


def test_hostile_38_huge_tables_are_not_loaded(path: Path) -> None:
    """A sparse file makes room for any table."""
    path.write_bytes(image(l1_size=0x10000000))
    with path.open("r+b") as file:
        file.truncate(1 << 40)

    with pytest.raises(ImageError, match="l1_size of 2147483648 bytes"):
        Qcow2(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        Qcow2(tmp_path / "none")


def test_directory(tmp_path: Path) -> None:
    for read_only in (False, True):
        with pytest.raises(HostError, match="is a directory"):
            Qcow2(tmp_path, read_only=read_only)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_device_that_is_no_disk(device: str) -> None:
    with pytest.raises(HostError, match="neither a file nor a block device"):
        Qcow2(Path(device), read_only=True)


def _around(places: Iterable[int]) -> set[int]:
    return {at + delta for at in places for delta in (-1, 0, 1) if at + delta >= 0}
