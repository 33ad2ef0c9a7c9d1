"""What is found on disk images, whole ones and partitions."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.core.errors import ConfigError, ImageError, KvmpyError
from kvmpy.host import filesystems
from kvmpy.host.disk import open_raw
from kvmpy.host.filesystems import LINUX_ROOT, MARKS, OTHERS, Found
from kvmpy.virtio.root_disk import RootDisk

MIB = 1 << 20
MKE2FS = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def image(path: Path, size: int = 4 * MIB, **marks: bytes) -> Path:
    """A file of zeros but for what is at `at_OFFSET`."""
    with path.open("wb") as file:
        file.truncate(size)
        for name, data in marks.items():
            file.seek(int(name.removeprefix("at_")))
            file.write(data)
    return path


def find(path: Path) -> Found:
    disk = open_raw(path, read_only=True)
    try:
        return filesystems.find(disk, "x.img")
    finally:
        disk.close()


def mbr(*partitions: tuple[int, int]) -> bytes:
    """A table of partitions, each a type and a first sector."""
    entries = [struct.pack("<4xB3xII", kind, first, 2048) for kind, first in partitions]
    return b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


def gpt(*partitions: tuple[uuid.UUID, int], size: int = 128) -> dict[str, bytes]:
    header = b"EFI PART" + struct.pack("<64xQII", 2, 128, size)
    entries = [kind.bytes_le + struct.pack("<16xQ88x", first) for kind, first in partitions]
    return {"at_446": mbr((0xEE, 1)), "at_512": header, "at_1024": b"".join(entries)}


@pytest.mark.parametrize("name", MARKS)
def test_a_whole_disk(name: str, tmp_path: Path) -> None:
    offset, mark = MARKS[name]

    found = find(image(tmp_path / "disk", **{f"at_{offset}": mark}))

    assert found == Found(name, 0, dirty=name in ("xfs", "btrfs"))


def test_ext4_that_was_not_unmounted(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", at_1080=b"\x53\xef", at_1120=struct.pack("<I", 4))

    assert find(disk).dirty


@pytest.mark.skipif(MKE2FS is None, reason="no mke2fs: install e2fsprogs")
def test_a_real_one(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk")
    subprocess.run([str(MKE2FS), "-q", "-t", "ext4", disk], check=True)

    assert RootDisk(disk).found == Found("ext4")


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img: install qemu-utils")
def test_a_qcow2_image_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    raw = image(tmp_path / "disk", at_446=mbr((0x83, 2048)), at_1048576=b"hsqs")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, tmp_path / "disk.qcow2"], check=True)

    assert RootDisk(tmp_path / "disk.qcow2").found == Found("squashfs", 1)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img: install qemu-utils")
def test_a_backing_file_is_not_opened(tmp_path: Path) -> None:
    raw = image(tmp_path / "disk", at_0=b"hsqs")
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", tmp_path / "disk.qcow2"]
    subprocess.run(words, check=True)

    with pytest.raises(ConfigError, match="which is opened only when asked for"):
        RootDisk(tmp_path / "disk.qcow2")


def test_the_first_partition_with_a_file_system(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", at_446=mbr((0x0C, 64), (0x83, 2048), (0x83, 4096)), at_1048576=b"hsqs")

    assert find(disk) == Found("squashfs", 2)


def test_the_partition_that_is_marked_as_the_root(tmp_path: Path) -> None:
    table = gpt((uuid.UUID(int=5), 2048), (uuid.UUID(int=6), 4096), (LINUX_ROOT, 6144))
    disk = image(tmp_path / "disk", at_2097152=b"hsqs", at_3145728=b"XFSB", **table)

    assert find(disk) == Found("xfs", 3, dirty=True)


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_root(what: str, tmp_path: Path) -> None:
    offset, mark = OTHERS[what]
    disk = image(tmp_path / "disk", at_446=mbr((0x83, 2048)), **{f"at_{MIB + offset}": mark})

    with pytest.raises(ConfigError, match=r"disk image x.img: none of its 1 partitions") as caught:
        find(disk)

    assert what in str(caught.value)


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing known.*use a disk image with ext4"):
        find(image(tmp_path / "disk", 512))


@pytest.mark.parametrize("table", [gpt(size=0), gpt(size=1 << 20), {"at_446": mbr((0xEE, 1))}])
def test_a_damaged_table(table: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"GPT.*damaged"):
        find(image(tmp_path / "disk", **table))


class Memory:
    """A disk in memory."""

    read_only, fd = True, -1

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def readv(self, offset: int, buffers: list[memoryview]) -> None:
        assert offset + len(buffers[0]) <= self.size
        buffers[0][:] = self.data[offset : offset + len(buffers[0])]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=8, max_size=16), min_size=4, max_size=4), st.binary(max_size=120))
def test_any_table_ends_in_an_answer(entries: list[bytes], header: bytes) -> None:
    data = bytearray(16384)
    data[446:510] = b"".join(entry.ljust(16, b"\xee") for entry in entries)
    data[510:512] = b"\x55\xaa"
    data[512 : 512 + 8 + len(header)] = b"EFI PART" + header

    try:
        filesystems.find(Memory(bytes(data)), "x.img")  # type: ignore[arg-type]
    except KvmpyError as error:
        assert "x.img" in str(error)
