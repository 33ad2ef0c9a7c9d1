"""qcow2 images against QEMU's own tools: what either side writes, the other reads, and `qemu-img check` is content."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from disks import failing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvmpy.core.errors import ImageError, KvmpyError, NotFoundError
from kvmpy.host.image_file import ImageFile
from kvmpy.host.qcow2 import MAX_CHAIN, Qcow2

pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-img") or not shutil.which("qemu-io"),
    reason="no qemu-img or qemu-io: apt-get install qemu-utils",
)

KIB = 1024
SIZE = 1 << 20
FEW = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # each example runs programs: shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Options of `qemu-img create`.
VARIANTS = {
    "v2": "compat=0.10",
    "v3": "compat=1.1",
    "512 bytes": "cluster_size=512",
    "512 bytes v2": "cluster_size=512,compat=0.10",
    "4 KiB, 1-bit counts": "cluster_size=4K,refcount_bits=1",
    "4 KiB, 4-bit counts": "cluster_size=4K,refcount_bits=4",
    "512 bytes, 64-bit counts": "cluster_size=512,refcount_bits=64",
    "2 MiB": "cluster_size=2M",
    "lazy": "cluster_size=4K,lazy_refcounts=on",
    "preallocated": "cluster_size=4K,preallocation=metadata",
}
SHAREABLE = ("v2", "v3", "512 bytes", "512 bytes v2", "4 KiB, 4-bit counts", "2 MiB")  # counts above one fit


def run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def create(path: Path, options: str = "compat=1.1", size: int = SIZE, *more: str | Path) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, path, str(size))
    return path


def pattern(size: int = SIZE, seed: int = 1) -> bytes:
    """Half of it zeros, so that images have holes; compressible, in stretches of 4 KiB."""
    rng = random.Random(seed)
    return b"".join(rng.choice([bytes(4 * KIB), rng.randbytes(256) * 16]) for _ in range(size // (4 * KIB)))


def convert(tmp: Path, data: bytes, *options: str | Path) -> Path:
    """A qcow2 image that QEMU made of `data`."""
    raw, path = tmp / "from.raw", tmp / "image.qcow2"
    raw.write_bytes(data)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    return path


def content(path: Path, *options: str) -> bytes:
    """What QEMU reads from an image."""
    raw = path.with_suffix(".out")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *options, path, raw)
    return raw.read_bytes()


def check(path: Path) -> None:
    """Raises CalledProcessError for errors and for leaks."""
    run("qemu-img", "check", "-q", "-f", "qcow2", path)


def read(disk: Qcow2, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(disk.size - offset if length is None else length)
    disk.readv(offset, [memoryview(data)])
    return bytes(data)


def read_all(path: Path, **options: bool) -> bytes:
    disk = Qcow2(path, read_only=True, **options)
    data = read(disk)
    disk.close()
    return data


def write(disk: Qcow2, offset: int, data: bytes) -> None:
    disk.writev(offset, [memoryview(data)])


@pytest.fixture
def opened() -> Iterator[Callable[..., Qcow2]]:
    """Opens images that are closed at the end of the test."""
    disks = []

    def open_one(path: Path, **options: bool) -> Qcow2:
        disks.append(Qcow2(path, **options))
        return disks[-1]

    yield open_one
    for disk in disks:
        disk.close()


# What QEMU wrote.


@pytest.mark.parametrize("compressed", [(), ("-c",)], ids=["plain", "compressed"])
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M"])
def test_reads_what_qemu_wrote(tmp_path: Path, options: str, compressed: tuple[str, ...]) -> None:
    path = convert(tmp_path, pattern(), *compressed, "-o", options)

    assert read_all(path) == pattern()


def test_reads_zstd(tmp_path: Path) -> None:
    path = convert(tmp_path, pattern(), "-c", "-o", "compression_type=zstd")

    assert read_all(path) == pattern()


def test_buffers_are_cut_anywhere(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    disk = opened(convert(tmp_path, pattern(), "-c", "-o", "cluster_size=4K"), read_only=True)
    room = [memoryview(bytearray(size)) for size in (1, 0, 511, 4096, 3000, 8776)]

    disk.readv(512, room)

    assert b"".join(room) == pattern()[512 : 512 + 16384]


def test_more_buffers_than_one_call_takes(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    disk = opened(create(tmp_path / "a.qcow2"))
    data = random.Random(2).randbytes(3000 * 16)
    room = bytearray(len(data))

    disk.writev(512, [memoryview(data)[at : at + 16] for at in range(0, len(data), 16)])
    disk.readv(512, [memoryview(room)[at : at + 16] for at in range(0, len(data), 16)])

    assert room == data


def test_read_only_leaves_the_file_alone(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    path = convert(tmp_path, pattern())
    before = path.read_bytes()
    disk = opened(path, read_only=True)

    for change in (
        lambda: write(disk, 0, bytes(512)),
        lambda: disk.discard(0, SIZE),
        lambda: disk.write_zeroes(0, SIZE, True),
    ):
        with pytest.raises(OSError, match="read-only"):
            change()
    disk.flush()
    disk.close()

    assert path.read_bytes() == before


# Backing files.


@pytest.fixture
def backed(tmp_path: Path) -> Path:
    """An image over base.raw."""
    (tmp_path / "base.raw").write_bytes(pattern())
    return create(tmp_path / "a.qcow2", "compat=1.1", SIZE, "-b", "base.raw", "-F", "raw")


def test_backing_file_is_not_opened_unasked(backed: Path) -> None:
    with pytest.raises(ImageError, match="which is opened only when asked for"):
        Qcow2(backed)


def test_backing_file_is_missing(backed: Path) -> None:
    (backed.parent / "base.raw").unlink()

    with pytest.raises(NotFoundError, match="does not exist"):
        Qcow2(backed, backing=True)


@pytest.mark.parametrize(("name", "said"), [("n" * 300, "too long"), (".", "is a directory"), ("a.qcow2", "a cycle")])
def test_backing_file_that_cannot_be_opened(backed: Path, name: str, said: str) -> None:
    run("qemu-img", "rebase", "-u", "-b", name, "-F", "raw", backed)

    with pytest.raises(KvmpyError, match=said):
        Qcow2(backed, backing=True)


def test_backing_file_is_damaged(backed: Path) -> None:
    run("qemu-img", "rebase", "-u", "-b", "base.raw", "-F", "qcow2", backed)

    with pytest.raises(ImageError, match=r"base\.raw is no qcow2 image"):
        Qcow2(backed, backing=True)


def test_backing_format_is_never_guessed(backed: Path) -> None:
    data = backed.read_bytes()
    backed.write_bytes(data.replace(bytes.fromhex("e2792aca"), bytes.fromhex("12345678")))

    with pytest.raises(ImageError, match="without saying its format"):
        Qcow2(backed, backing=True)


def test_raw_backing_file_stays_raw(backed: Path) -> None:
    """A guest wrote a qcow2 header with a backing file into what is a raw disk."""
    evil = create(backed.parent / "evil", "compat=1.1", SIZE, "-u", "-b", "/etc/passwd", "-F", "raw").read_bytes()
    (backed.parent / "base.raw").write_bytes(evil)

    assert read_all(backed, backing=True)[: len(evil)] == evil


@pytest.mark.parametrize("name", ["nbd://host/disk", 'json:{"driver":"file"}', "fat:/etc"])
def test_backing_file_is_no_file(backed: Path, name: str) -> None:
    run("qemu-img", "rebase", "-u", "-b", name, "-F", "raw", backed)

    with pytest.raises(ImageError, match="no plain file"):
        Qcow2(backed, backing=True)


def test_images_that_back_each_other(backed: Path) -> None:
    run("qemu-img", "rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", backed)
    create(backed.parent / "b.qcow2", "compat=1.1", SIZE, "-u", "-b", "./a.qcow2", "-F", "qcow2")

    with pytest.raises(ImageError, match="a cycle"):
        Qcow2(backed, backing=True)


def test_chains_have_an_end(backed: Path) -> None:
    paths = [backed.parent / f"{n}.qcow2" for n in range(MAX_CHAIN)]
    create(paths[0], "compat=1.1", SIZE, "-b", "base.raw", "-F", "raw")
    for below, path in pairwise(paths):
        create(path, "compat=1.1", SIZE, "-b", below.name, "-F", "qcow2")

    assert read_all(paths[-2], backing=True) == pattern()
    with pytest.raises(ImageError, match="chain"):
        Qcow2(paths[-1], backing=True)


# What we wrote.


class Model:
    """Applies the same operations to a disk and to plain bytes."""

    def __init__(self, disk: Qcow2, data: bytes) -> None:
        self.disk = disk
        self.data = bytearray(data)

    def write(self, offset: int, length: int, seed: int) -> None:
        data = random.Random(seed).randbytes(length)
        write(self.disk, offset, data)
        self.data[offset : offset + length] = data

    def zeroes(self, offset: int, length: int, seed: int) -> None:
        self.disk.write_zeroes(offset, length, bool(seed & 1))
        self.data[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int, seed: int) -> None:
        self.disk.discard(offset, length)
        self.data[offset : offset + length] = read(self.disk, offset, length)  # zeros, or what was there

    def read(self, offset: int, length: int, seed: int) -> None:
        assert read(self.disk, offset, length) == self.data[offset : offset + length]

    def flush(self, offset: int, length: int, seed: int) -> None:
        self.disk.flush()

    def apply(self, operations: list[tuple[str, int, int, int]]) -> None:
        for name, sector, sectors, seed in operations:
            offset = sector * 512 % self.disk.size
            getattr(self, name)(offset, min(sectors * 512, self.disk.size - offset), seed)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zeroes", "discard", "read", "flush"]),
        st.integers(0, SIZE // 512 - 1),
        st.one_of(st.integers(1, 20), st.integers(1, 600), st.just(SIZE)),
        st.integers(0, 1 << 16),
    ),
    max_size=25,
)


@pytest.mark.parametrize("name", VARIANTS)
@FEW
@given(operations=OPERATIONS)
def test_operations_on_a_new_image(tmp_path: Path, name: str, operations: list[tuple[str, int, int, int]]) -> None:
    path = create(tmp_path / "a.qcow2", VARIANTS[name], SIZE - 1536)  # its last cluster is not whole
    model = Model(Qcow2(path, unsafe=True), bytes(SIZE - 1536))

    model.apply(operations)
    seen = read(model.disk)
    model.disk.close()

    check(path)
    assert seen == content(path) == read_all(path) == model.data


@pytest.mark.parametrize("compressed", [(), ("-c",)], ids=["plain", "compressed"])
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=4K"])
@FEW
@given(operations=OPERATIONS)
def test_operations_on_an_image_of_qemu(
    tmp_path: Path, options: str, compressed: tuple[str, ...], operations: list[tuple[str, int, int, int]]
) -> None:
    path = convert(tmp_path, pattern(), *compressed, "-o", options)
    model = Model(Qcow2(path, unsafe=True), pattern())

    model.apply(operations)
    model.disk.close()

    check(path)
    assert content(path) == read_all(path) == model.data


@pytest.mark.parametrize("name", SHAREABLE)
@FEW
@given(operations=OPERATIONS, later=OPERATIONS)
def test_operations_beside_a_snapshot(
    tmp_path: Path, name: str, operations: list[tuple[str, int, int, int]], later: list[tuple[str, int, int, int]]
) -> None:
    path = create(tmp_path / "a.qcow2", VARIANTS[name])
    model = Model(Qcow2(path, unsafe=True), bytes(SIZE))
    model.apply(operations)
    model.disk.close()
    before = bytes(model.data)
    run("qemu-img", "snapshot", "-c", "then", path)
    model.disk = Qcow2(path, unsafe=True)

    model.apply(later)
    model.disk.close()

    check(path)
    assert content(path) == model.data
    assert content(path, "-l", "then") == before
    run("qemu-img", "snapshot", "-d", "then", path)
    check(path)
    assert content(path) == read_all(path) == model.data


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "cluster_size=512"])
@FEW
@given(operations=OPERATIONS, size=st.sampled_from([SIZE // 2 + 512, SIZE, 2 * SIZE]))
def test_operations_over_a_backing_file(
    tmp_path: Path, options: str, kind: str, operations: list[tuple[str, int, int, int]], size: int
) -> None:
    below = pattern(2 * SIZE)[:size]
    base = tmp_path / "base"
    (tmp_path / "from.raw").write_bytes(below)
    run("qemu-img", "convert", "-f", "raw", "-O", kind, tmp_path / "from.raw", base)
    before = base.read_bytes()
    path = create(tmp_path / "a.qcow2", options, SIZE, "-b", "base", "-F", kind)
    model = Model(Qcow2(path, backing=True, unsafe=True), below[:SIZE].ljust(SIZE, b"\0"))

    model.apply(operations)
    model.disk.close()

    check(path)
    assert content(path) == read_all(path, backing=True) == model.data
    assert base.read_bytes() == before


@FEW
@given(operations=OPERATIONS)
def test_qemu_goes_on_where_we_stopped(tmp_path: Path, operations: list[tuple[str, int, int, int]]) -> None:
    path = create(tmp_path / "a.qcow2", "cluster_size=4K")
    model = Model(Qcow2(path, unsafe=True), bytes(SIZE))
    model.apply(operations)
    model.disk.close()
    writes = [(at, 3 * KIB, at // 512 % 255 + 1) for at in range(512, SIZE - 8 * KIB, 50 * KIB)]

    commands = [word for at, length, byte in writes for word in ("-c", f"write -P {byte} {at} {length}")]
    run("qemu-io", "-f", "qcow2", *commands, "-c", f"discard 0 {64 * KIB}", path)
    for at, length, byte in writes:
        model.data[at : at + length] = bytes([byte]) * length
    model.data[: 64 * KIB] = bytes(64 * KIB)
    model.disk = Qcow2(path, unsafe=True)
    assert read(model.disk) == model.data
    model.apply(operations)
    model.disk.close()

    check(path)
    assert content(path) == model.data


# Reference counts and space.


def test_refcount_table_grows(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    path = create(tmp_path / "a.qcow2", "cluster_size=512,refcount_bits=64", 8 << 20)  # 2 MiB for one table cluster
    data = random.Random(3).randbytes(7 << 20)
    disk = opened(path, unsafe=True)

    write(disk, 512, data)
    disk.close()

    check(path)
    assert content(path)[512 : 512 + len(data)] == data


def test_discarded_clusters_are_used_again(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    disk = opened(path := create(tmp_path / "a.qcow2"), unsafe=True)
    for seed in range(10):
        write(disk, 0, random.Random(seed).randbytes(SIZE))
        disk.discard(0, SIZE)
        disk.flush()

    assert path.stat().st_size < 2 * SIZE
    assert read(disk) == bytes(SIZE)


def test_what_a_used_cluster_had_before_does_not_show(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    disk = opened(create(tmp_path / "a.qcow2"), unsafe=True)
    write(disk, 0, b"secret!!" * (SIZE // 8))
    disk.discard(0, SIZE)
    disk.flush()

    write(disk, 64 * KIB + 512, bytes([7]) * 512)

    assert read(disk) == bytes(64 * KIB + 512) + bytes([7]) * 512 + bytes(SIZE - 64 * KIB - 1024)


def test_zeros_that_need_no_unmapping_keep_their_clusters(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    disk = opened(path := create(tmp_path / "a.qcow2"), unsafe=True)
    write(disk, 0, b"x" * SIZE)
    disk.write_zeroes(0, SIZE, unmap=False)
    disk.close()

    assert '"offset"' in run("qemu-img", "map", "--output=json", path)
    assert content(path) == bytes(SIZE)
    check(path)


def test_many_tables_stay_within_bounds(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    path = create(tmp_path / "a.qcow2", "cluster_size=512", 4 << 30)
    disk = opened(path, unsafe=True)
    disk._l2._most = disk._refcounts._blocks._most = 8

    for at in range(0, 4 << 30, 8 << 20):
        write(disk, at, at.to_bytes(8, "little") * 64)

    assert len(disk._l2._tables) <= 8
    assert all(read(disk, at, 512) == at.to_bytes(8, "little") * 64 for at in range(0, 4 << 30, 8 << 20))
    disk.close()
    check(path)


def test_bitmaps_are_marked_as_outdated(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    path = create(tmp_path / "a.qcow2")
    run("qemu-img", "bitmap", "--add", path, "dirty")

    opened(path).close()

    assert path.read_bytes()[88:96] == bytes(8)


def test_what_is_discarded_leaves_the_file(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    disk = opened(path := create(tmp_path / "a.qcow2"))
    size = disk.size
    write(disk, 0, b"x" * size)
    disk.flush()
    before = path.stat().st_blocks * 512

    disk.discard(65536, size - 2 * 65536)
    kept = path.stat().st_blocks * 512
    disk.flush()
    after = path.stat().st_blocks * 512

    assert kept >= before  # until the tables say that nobody needs it
    assert before - after >= size - 3 * 65536
    assert read(disk, 0, size) == b"x" * 65536 + bytes(size - 2 * 65536) + b"x" * 65536
    disk.close()
    check(path)


def test_what_a_snapshot_needs_stays_in_the_file(tmp_path: Path, opened: Callable[..., Qcow2]) -> None:
    path = convert(tmp_path, pattern(SIZE))
    run("qemu-img", "snapshot", "-c", "then", path)
    disk = opened(path)

    disk.discard(0, disk.size)
    disk.close()
    run("qemu-img", "snapshot", "-a", "then", path)

    assert content(path) == pattern(SIZE)


def test_a_file_system_that_makes_no_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Qcow2]
) -> None:
    monkeypatch.setattr("kvmpy.host.syscalls.fallocate", failing(errno.EIO))
    disk = opened(path := create(tmp_path / "a.qcow2"))
    write(disk, 0, b"x" * SIZE)
    disk.flush()

    disk.discard(0, SIZE)
    disk.flush()

    assert read(disk, 0, SIZE) == bytes(SIZE)
    disk.close()
    check(path)


# Failures of the host.


class FullDisk(ImageFile):
    """A file on a file system that is `full`."""

    full = False

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().writev(offset, buffers)


@pytest.mark.parametrize("before", [b"", b"a" * 8192], ids=["empty", "used"])
def test_goes_on_when_there_is_space_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Qcow2], before: bytes
) -> None:
    monkeypatch.setattr("kvmpy.host.qcow2.ImageFile", FullDisk)
    disk = opened(path := create(tmp_path / "a.qcow2", "cluster_size=4K"))
    write(disk, 0, before)
    disk.flush()

    disk._file.full = True  # type: ignore[attr-defined]
    for at in (4096, 512 * KIB):
        with pytest.raises(OSError, match="space"):
            write(disk, at, b"b" * 65536)
    with pytest.raises(OSError, match="space"):
        disk.flush()
    disk._file.full = False  # type: ignore[attr-defined]
    write(disk, 4096, b"d" * 65536)
    disk.close()

    check(path)
    assert content(path)[: 4096 + 65536] == before[:4096].ljust(4096, b"\0") + b"d" * 65536


class FlakyDisk(ImageFile):
    """A file of which every now and then a write fails for lack of space, after some of it was written."""

    rng = random.Random(0)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if self.rng.random() < 0.2:
            super().writev(offset, buffers[: len(buffers) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        super().writev(offset, buffers)


@pytest.mark.parametrize("snapshots", [(), ("then",)], ids=["", "snapshot"])
@pytest.mark.parametrize("name", ["v2", "v3", "512 bytes, 64-bit counts", "2 MiB"])
@pytest.mark.parametrize("seed", range(2))
def test_failures_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, snapshots: tuple[str, ...], seed: int
) -> None:
    path = convert(tmp_path, pattern(3 * SIZE), "-c", "-o", VARIANTS[name])
    for snapshot in snapshots:
        run("qemu-img", "snapshot", "-c", snapshot, path)
    monkeypatch.setattr("kvmpy.host.qcow2.ImageFile", FlakyDisk)
    rng = random.Random(seed)
    FlakyDisk.rng = random.Random(seed)
    model = Model(Qcow2(path, unsafe=True), pattern(3 * SIZE))
    failures = 0
    for n in range(150):
        offset, length = rng.randrange(6144) * 512, rng.choice([1, 8, 300]) * 512
        length = min(length, 3 * SIZE - offset)
        before = model.data[offset : offset + length]
        operation = rng.choice([model.write, model.write, model.zeroes, model.discard, model.flush])
        try:
            operation(offset, length, n)
        except OSError:
            failures += 1
            after = read(model.disk, offset, length)
            new = random.Random(n).randbytes(length)
            for at in range(0, length, 512):
                assert after[at : at + 512] in (before[at : at + 512], new[at : at + 512], bytes(512))
            model.data[offset : offset + length] = after
        model.read(offset, length, 0)
    monkeypatch.setattr(FlakyDisk, "writev", ImageFile.writev)
    model.disk.close()

    check(path)
    assert failures
    assert content(path) == model.data


def test_flush_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Qcow2(path := create(tmp_path / "a.qcow2"))
    disk.flush()
    before = path.read_bytes()
    write(disk, 0, b"a" * 512)

    with monkeypatch.context() as patch:
        patch.setattr("os.fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input"):
            disk.flush()
    with pytest.raises(OSError, match="Input"):
        disk.flush()
    with pytest.raises(OSError, match="Input"):
        disk.close()

    assert content(path) == bytes(SIZE)  # nothing refers to data that may not be there
    assert before[:512] == path.read_bytes()[:512]


class Journal:
    """What was written to a file, in order, with None for each sync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[int, bytes] | None] = []
        writev, discard = ImageFile.writev, ImageFile.discard

        def record(file: ImageFile, offset: int, buffers: list[memoryview]) -> None:
            self.events.append((offset, b"".join(buffers)))
            writev(file, offset, buffers)

        def punch(file: ImageFile, offset: int, length: int) -> None:
            self.events.append((offset, bytes(length)))
            discard(file, offset, length)

        monkeypatch.setattr(ImageFile, "writev", record)
        monkeypatch.setattr(ImageFile, "discard", punch)
        monkeypatch.setattr(ImageFile, "flush", lambda file: self.events.append(None))

    def moments(self, count: int, rng: random.Random) -> list[int]:
        """`count` places in the journal at random, and those behind each change of the header, which are few."""
        header = [n + 1 for n, event in enumerate(self.events) if event is not None and event[0] < 112]
        return rng.choices(range(len(self.events) + 1), k=count) + 4 * header

    def crash(self, image: bytes, moment: int, rng: random.Random) -> bytes:
        """The file after a power failure at that moment: all that was before the last sync, some of the rest."""
        synced = max((n for n in range(moment) if self.events[n] is None), default=0)
        data = bytearray(image)
        for n, event in enumerate(self.events[:moment]):
            if event is not None and (n < synced or rng.random() < 0.5):
                offset, written = event
                data.extend(bytes(max(offset + len(written) - len(data), 0)))
                data[offset : offset + len(written)] = written
        return bytes(data)


CRASHES = {
    "plain": ("cluster_size=4K", (), 64),
    "compressed": ("cluster_size=4K", ("-c",), 64),
    "version 2": ("cluster_size=4K,compat=0.10", (), 64),
    "refcount table grows": ("cluster_size=512,refcount_bits=64", (), 400),
}


@pytest.mark.parametrize("snapshots", [(), ("then",)], ids=["", "snapshot"])
@pytest.mark.parametrize("name", CRASHES)
def test_power_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, snapshots: tuple[str, ...]) -> None:
    options, compressed, longest = CRASHES[name]
    path = convert(tmp_path, pattern(2 * SIZE), *compressed, "-o", options)
    for snapshot in snapshots:
        run("qemu-img", "snapshot", "-c", snapshot, path)
    image = path.read_bytes()
    journal = Journal(monkeypatch)
    model = Model(Qcow2(path), pattern(2 * SIZE))
    rng = random.Random(4)
    states = [(0, pattern(2 * SIZE))]  # what the disk had after each operation, and how many events were before it
    durable = [(0, 0)]  # how many events it took until which of these states was flushed
    for _ in range(8):
        for seed in range(8):
            events = len(journal.events)
            operation = rng.choice(["write", "write", "zeroes", "discard"])
            model.apply([(operation, rng.randrange(4096), rng.choice([1, 8, longest]), seed)])
            states.append((events, bytes(model.data)))
        model.disk.flush()
        durable.append((len(journal.events), len(states) - 1))
    model.disk.close()

    broken = tmp_path / "broken.qcow2"
    for moment in journal.moments(25, rng):
        broken.write_bytes(journal.crash(image, moment, rng))
        oldest = max(state for events, state in durable if events <= moment)
        possible = [data for events, data in states[oldest:] if events <= moment]

        after = read_all(broken)
        wrong = [
            at for at in range(0, len(after), 512) if after[at : at + 512] not in {d[at : at + 512] for d in possible}
        ]
        checked = subprocess.run(["qemu-img", "check", "-f", "qcow2", broken], capture_output=True, text=True)

        assert wrong == []
        assert checked.returncode in (0, 3), checked.stdout  # 3: leaked clusters, nothing worse
