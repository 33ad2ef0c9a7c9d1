"""Finds out which file system is on a disk image, and on which of its partitions; nothing is mounted.

Where each has its mark: Linux, fs/*/ and Documentation/filesystems; partition tables: UEFI 2.10, 5.2 and 5.3.
"""

from __future__ import annotations

import struct
import uuid

from ..core.errors import ConfigError, ImageError
from ..core.record import Record
from .disk import SECTOR, Image

MARKS = {
    "ext4": (0x438, b"\x53\xef"),  # and ext2, ext3, which its driver mounts as well
    "squashfs": (0, b"hsqs"),
    "erofs": (1024, b"\xe2\xe1\xf5\xe0"),
    "xfs": (0, b"XFSB"),
    "btrfs": (0x10040, b"_BHRfS_M"),
}
OTHERS = {
    "an encrypted volume (LUKS)": (0, b"LUKS\xba\xbe"),
    "a volume of LVM": (512, b"LABELONE"),
    "swap space": (4086, b"SWAPSPACE2"),
    "NTFS": (3, b"NTFS    "),
    "exFAT": (3, b"EXFAT   "),
    "an ISO 9660 file system": (0x8001, b"CD001"),
    "F2FS": (1024, b"\x10\x20\xf5\xf2"),
    "FAT": (54, b"FAT1"),
    "FAT32": (82, b"FAT32"),
}
EXT_INCOMPAT, EXT_RECOVER = 1024 + 0x60, 0x4
LINUX_ROOT = uuid.UUID(
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
)  # of x86-64, in the Discoverable Partitions Specification
MAX_PARTITIONS = 128
PROTECTIVE = 0xEE
MAKE_ONE = "use a disk image with ext4, squashfs, erofs, xfs or btrfs"


class Found(Record, frozen=True):
    """A file system: its name in Linux, the number of its partition (0: the whole disk), and whether its driver has to
    write before it can be read, since it was not unmounted."""

    name: str
    partition: int = 0
    dirty: bool = False


class Partition(Record, frozen=True):
    """Bytes of a disk; `kind` is the GUID of its type, or the byte that MBR has."""

    number: int
    begin: int
    kind: uuid.UUID | int


def find(image: Image, name: str) -> Found:
    """The file system to have as a root: on the disk itself, on the partition marked as the root of x86-64, or on the
    first that has one. Raises ConfigError, with `name`, when there is none, and ImageError for a damaged table."""
    if found := _look(image, 0, 0):
        return found
    table = _partitions(image, name)
    for partition in sorted(table, key=lambda partition: partition.kind != LINUX_ROOT):
        if found := _look(image, partition.begin, partition.number):
            return found
    seen = [_other(image, partition.begin) for partition in table] if table else [_other(image, 0)]
    what = ", ".join(filter(None, seen)) or "nothing known"
    where = (
        f"none of its {len(table)} partitions has a file system for a root" if table else "no file system for a root"
    )
    raise ConfigError(f"disk image {name}: {where} (seen: {what})", MAKE_ONE)


def _look(image: Image, begin: int, number: int) -> Found | None:
    for name, (offset, mark) in MARKS.items():
        if _read(image, begin + offset, len(mark)) == mark:
            dirty = name in ("xfs", "btrfs")
            if name == "ext4":
                (features,) = struct.unpack("<I", _read(image, begin + EXT_INCOMPAT, 4))
                dirty = bool(features & EXT_RECOVER)
            return Found(name, number, dirty)
    return None


def _other(image: Image, begin: int) -> str:
    return next((name for name, (at, mark) in OTHERS.items() if _read(image, begin + at, len(mark)) == mark), "")


def _partitions(image: Image, name: str) -> list[Partition]:
    sector = _read(image, 0, SECTOR)
    entries = [sector[at : at + 16] for at in range(446, 510, 16)]
    if sector[510:] != b"\x55\xaa" or any(entry[0] & 0x7F for entry in entries):
        return []
    if any(entry[4] == PROTECTIVE for entry in entries):
        return _gpt(image, name)
    return [
        Partition(number, struct.unpack_from("<I", entry, 8)[0] * SECTOR, entry[4])
        for number, entry in enumerate(entries, 1)
        if entry[4]
    ]


def _gpt(image: Image, name: str) -> list[Partition]:
    header = _read(image, SECTOR, SECTOR)
    if header[:8] != b"EFI PART":
        raise ImageError(f"disk image {name}: its partition table (GPT) is damaged", "repair it with sgdisk or gdisk")
    first, count, size = struct.unpack_from("<QII", header, 72)
    if size < 128 or size > 4096:
        raise ImageError(f"disk image {name}: its partition table (GPT) is damaged", "repair it with sgdisk or gdisk")
    found = []
    for number in range(1, min(count, MAX_PARTITIONS) + 1):
        entry = _read(image, first * SECTOR + (number - 1) * size, 128)
        if entry[:16].strip(b"\0"):
            begin = struct.unpack_from("<Q", entry, 32)[0]
            found.append(Partition(number, begin * SECTOR, uuid.UUID(bytes_le=entry[:16])))
    return found


def _read(image: Image, offset: int, length: int) -> bytes:
    """Any bytes of the disk; zeros behind its end. Raises OSError."""
    begin, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
    if end > image.size:
        return bytes(length)
    data = bytearray(end - begin)
    image.readv(begin, [memoryview(data)])
    return bytes(data[offset - begin : offset - begin + length])
