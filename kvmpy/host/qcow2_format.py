"""The header of a qcow2 image, with all that it points to checked against the file (QEMU, docs/interop/qcow2.txt).

An image may come from anywhere: every number is checked before it is used for anything, no table is larger than
MAX_TABLE, and what is wrong is one ImageError that names the file and the field. Tables that do not fit together in
spite of that give I/O errors, never access to other files.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import ImageError
from ..core.record import Record
from ..core.regs import Bits, Field, bit
from .disk import QCOW2_MAGIC
from .image_file import ImageFile
from .qcow2_tables import QWORD, decode

HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # both versions
HEADER_V3 = struct.Struct(">QQQII")  # what version 3 has behind it
COMPRESSION_TYPE = HEADER.size + HEADER_V3.size  # offset of an optional byte of version 3
LENGTH_V3 = HEADER.size + HEADER_V3.size  # the least header_length
AUTOCLEAR_FEATURES = 88  # offset of that field, for whoever clears it
REFCOUNT_TABLE_OFFSET = 48  # offset of that field, which refcount_table_clusters follows
REFCOUNT_TABLE = struct.Struct(">QI")  # both of them

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_TABLE = 8 << 20  # bytes of an L1 or refcount table: 512 TiB of disk with clusters of 64 KiB, 32 GiB with 512 bytes
MAX_SNAPSHOTS = 65536  # as in QEMU
MAX_SNAPSHOT_EXTRA = 1024  # bytes of extra data of a snapshot, as in QEMU
MAX_NAME = 1023  # bytes of the backing file's name
SECTOR = 512
REFCOUNT_ORDER_V2 = 4

EXTENSION = struct.Struct(">II")  # type, length
EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA

SNAPSHOT = struct.Struct(">QIHHIIQII")  # a snapshot table entry up to its extra data

ZLIB, ZSTD = 0, 1  # compression_type

UNDAMAGED = "give an undamaged image (`qemu-img check` tells more)"
REPAIR = "repair it with `qemu-img check -r all`"


class INCOMPATIBLE(Bits):
    """incompatible_features: an image with any that is unknown must not be opened."""

    DIRTY = bit(0)
    CORRUPT = bit(1)
    DATA_FILE = bit(2)
    COMPRESSION = bit(3)
    EXTENDED_L2 = bit(4)


class ENTRY(Bits):
    """An entry of an L1, L2 or refcount table; COMPRESSED and ZERO only mean something in an L2 table."""

    COPIED = bit(63)  # the refcount of what it points to is one: it may be overwritten in place
    COMPRESSED = bit(62)
    ZERO = bit(0)
    OFFSET = Field(55, 9)
    RESERVED = Field(61, 56) | Field(8, 1)


class Header(Record, frozen=True):
    """The checked fields under their names in the specification, `backing_file` and `backing_format` as text."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int
    autoclear_features: int
    refcount_order: int
    compression_type: int
    backing_file: str | None
    backing_format: str | None

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits


def read_header(file: ImageFile) -> Header:
    """The header of `file`; raises ImageError for what is no usable qcow2 image."""
    return parse(file.read(0, min(file.size, 1 << MAX_CLUSTER_BITS)), file.size, file.path)


def parse(data: bytes, file_size: int, path: Path) -> Header:
    """The header in `data`, the start of a file of `file_size` bytes; raises ImageError."""
    if data[: len(QCOW2_MAGIC)] != QCOW2_MAGIC:
        raise ImageError(f"disk image {path} is no qcow2 image", "give its real format")
    check = _Check(path, file_size)
    check.that(len(data) >= HEADER.size, "is truncated in its header")
    (
        _, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method, l1_size, l1_table_offset,
        refcount_table_offset, refcount_table_clusters, nb_snapshots, snapshots_offset,
    ) = HEADER.unpack_from(data)  # fmt: skip
    incompatible = autoclear = compression_type = 0
    refcount_order, header_length = REFCOUNT_ORDER_V2, HEADER.size
    check.that(version in (2, 3), f"has version {version}, not 2 or 3")
    if version == 3:
        check.that(len(data) >= LENGTH_V3, "is truncated in its header")
        incompatible, _, autoclear, refcount_order, header_length = HEADER_V3.unpack_from(data, HEADER.size)
        _check_features(incompatible, check)
        check.range("refcount_order", refcount_order, 0, 6)
    check.range("cluster_bits", cluster_bits, MIN_CLUSTER_BITS, MAX_CLUSTER_BITS)
    cluster_size = 1 << cluster_bits
    if version == 3:
        check.range("header_length", header_length, LENGTH_V3, cluster_size)
        check.that(header_length % 8 == 0, f"has header_length {header_length}, not a multiple of 8")
        check.that(header_length <= len(data), "is truncated in its header")
        compression_type = data[COMPRESSION_TYPE] if header_length > COMPRESSION_TYPE else 0
        check.range("compression_type", compression_type, ZLIB, ZSTD)
        check.that(
            bool(compression_type) == bool(incompatible & INCOMPATIBLE.COMPRESSION),
            f"has compression_type {compression_type}, which its incompatible_features contradict",
        )
    if crypt_method:
        raise ImageError(f"disk image {path} is encrypted (crypt_method {crypt_method})", _convert(path))
    check.that(size > 0 and size % SECTOR == 0, f"has size {size}, not a positive multiple of {SECTOR}")
    check.limit("l1_size", 8 * l1_size, MAX_TABLE)
    entries = -(-size // (cluster_size * (cluster_size // 8)))
    check.that(l1_size >= entries, f"has l1_size {l1_size}, its size needs {entries}")
    check.place("l1_table_offset", l1_table_offset, 8 * l1_size, cluster_size)
    check.that(refcount_table_clusters > 0, "has refcount_table_clusters 0")
    check.limit("refcount_table_clusters", refcount_table_clusters * cluster_size, MAX_TABLE)
    check.place("refcount_table_offset", refcount_table_offset, refcount_table_clusters * cluster_size, cluster_size)
    check.range("nb_snapshots", nb_snapshots, 0, MAX_SNAPSHOTS)
    if nb_snapshots:
        check.place("snapshots_offset", snapshots_offset, nb_snapshots * SNAPSHOT.size, cluster_size)
    first_cluster = data[:cluster_size]
    extensions_end = len(first_cluster)
    backing_file = None
    if backing_file_offset:
        check.range("backing_file_size", backing_file_size, 1, MAX_NAME)
        check.range("backing_file_offset", backing_file_offset, header_length, cluster_size - backing_file_size)
        extensions_end = min(extensions_end, backing_file_offset)
        name = first_cluster[backing_file_offset : backing_file_offset + backing_file_size]
        check.that(len(name) == backing_file_size, "is truncated in its backing file's name")
        backing_file = os.fsdecode(name)
        check.that(backing_file.isprintable(), f"has a backing file's name that does not print: {backing_file!r}")
    backing_format = None
    for kind, value in _extensions(first_cluster[:extensions_end], header_length, check):
        if kind == EXTENSION_BACKING_FORMAT:
            backing_format = value.decode("ascii", "backslashreplace")
    return Header(
        version, cluster_bits, size, l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters,
        nb_snapshots, snapshots_offset, incompatible, autoclear, refcount_order, compression_type,
        backing_file, backing_format,
    )  # fmt: skip


def snapshot_areas(file: ImageFile, header: Header) -> Iterator[tuple[int, int]]:
    """(offset, length) of the snapshot table and of each snapshot's L1 table; raises ImageError."""
    check = _Check(file.path, file.size)
    at = header.snapshots_offset
    for number in range(header.nb_snapshots):
        check.that(at + SNAPSHOT.size <= file.size, f"is truncated in snapshot {number}")
        l1_offset, l1_size, id_size, name_size, *_, extra = SNAPSHOT.unpack(file.read(at, SNAPSHOT.size))
        check.limit(f"l1_size of snapshot {number}", 8 * l1_size, MAX_TABLE)
        check.place(f"L1 table offset of snapshot {number}", l1_offset, 8 * l1_size, header.cluster_size)
        check.limit(f"extra data size of snapshot {number}", extra, MAX_SNAPSHOT_EXTRA)
        yield l1_offset, 8 * l1_size
        at += -(-(SNAPSHOT.size + extra + id_size + name_size) // 8) * 8
    check.that(at - 7 <= file.size, "is truncated in its snapshot table")  # at most padding may be missing
    if header.nb_snapshots:
        yield header.snapshots_offset, at - header.snapshots_offset


def check_table(entries: Iterator[int], what: str, file: ImageFile, cluster_size: int) -> None:
    """Raise ImageError unless all `entries` that are used name a whole cluster of `file`."""
    check = _Check(file.path, file.size)
    for number, entry in enumerate(entries):
        if entry and (entry % cluster_size or entry + cluster_size > file.size):
            check.place(f"{what} table entry {number}", entry, cluster_size, cluster_size)


def read_refcount_table(file: ImageFile, header: Header) -> array[int]:
    """The refcount table, as offsets of blocks; raises ImageError when one is not inside the file."""
    size = header.refcount_table_clusters << header.cluster_bits
    table = decode(file.read(header.refcount_table_offset, size), QWORD)
    check_table(iter(table), "refcount", file, header.cluster_size)
    return table


class _Check:
    """Compares fields with what they may be; every failure is an ImageError that names the file and the field."""

    def __init__(self, path: Path, file_size: int) -> None:
        self._path = path
        self._file_size = file_size

    def that(self, fine: bool, otherwise: str, remedy: str = UNDAMAGED) -> None:
        if not fine:
            raise ImageError(f"qcow2 image {self._path} {otherwise}", remedy)

    def range(self, field: str, value: int, low: int, high: int) -> None:
        self.that(low <= value <= high, f"has {field} {value}, not within {low} to {high}")

    def limit(self, field: str, length: int, most: int) -> None:
        remedy = "make one with larger clusters: `qemu-img convert -O qcow2 -o cluster_size=2M`"
        self.that(length <= most, f"has {field} of {length} bytes, more than the {most} that can be used", remedy)

    def place(self, field: str, offset: int, length: int, cluster_size: int) -> None:
        self.that(offset > 0 and offset % cluster_size == 0, f"has {field} {offset:#x}, not a cluster's offset")
        self.that(
            offset + length <= self._file_size, f"has {field} {offset:#x}: outside the file, or its {length} bytes are"
        )


def _check_features(incompatible: int, check: _Check) -> None:
    convert = "make one without: `qemu-img convert -O qcow2`"
    check.that(not incompatible & INCOMPATIBLE.DATA_FILE, "has an external data file, which is not supported", convert)
    check.that(not incompatible & INCOMPATIBLE.EXTENDED_L2, "has extended L2 entries: not supported", convert)
    known = INCOMPATIBLE.DIRTY | INCOMPATIBLE.CORRUPT | INCOMPATIBLE.COMPRESSION
    check.that(not incompatible & ~known, f"has unknown incompatible_features {incompatible & ~known:#x}", convert)


def _convert(path: Path) -> str:
    return f"make a plain one: `qemu-img convert -O qcow2 {path} NEW`"


def _extensions(data: bytes, at: int, check: _Check) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each header extension from `at` to the end marker, or to the end of `data`."""
    while at + EXTENSION.size <= len(data):
        kind, length = EXTENSION.unpack_from(data, at)
        if kind == EXTENSION_END:
            return
        at += EXTENSION.size
        check.that(length <= len(data) - at, f"has a header extension {kind:#x} of {length} bytes: too long")
        yield kind, data[at : at + length]
        at += -(-length // 8) * 8
