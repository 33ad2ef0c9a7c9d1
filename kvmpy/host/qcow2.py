"""qcow2 disk images, versions 2 and 3, read and written (QEMU, docs/interop/qcow2.txt).

Guest clusters are found through two levels of tables, L1 and L2. Data is written where it belongs at once; changed
tables wait in memory for `flush`, which writes what must be there first, first: data and reference counts, then L2
tables, then L1 entries, then the counts of what is no longer used. So a crash at any moment loses at most what was
not flushed, and may leave clusters counted that nobody uses, which `qemu-img check -r leaks` gives back.

A backing file is opened only when asked for, by the format that the header states: whoever can write to an image
must not be able to name files of the host. An image whose tables contradict each other gives OSError EIO.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import Enum, auto
from itertools import chain
from pathlib import Path
from typing import Protocol

from ..core.buffers import ZEROES, Cursor, fill_zeroes, total
from ..core.errors import HostError, ImageError, NotFoundError
from . import qcow2_format
from .image_file import ImageFile
from .qcow2_compression import BadData, decompressor
from .qcow2_format import ENTRY, INCOMPATIBLE, REPAIR, SECTOR, Header
from .qcow2_refcounts import Refcounts
from .qcow2_tables import QWORD, Reserved, Tables, decode

MAX_CHAIN = 16  # images that back one another
MAX_RESERVED = 3 << 20  # clusters of tables: all that L1 and refcount table can name, and 1 Mi of others
FORMATS = ("raw", "qcow2")  # of a backing file


class Kind(Enum):
    """Where a guest cluster's content is."""

    DATA = auto()  # in a cluster of the file
    ZERO = auto()  # nowhere: all zeros
    BACKING = auto()  # in the backing file
    COMPRESSED = auto()


class Backing(Protocol):
    """What an image needs of the one behind it."""

    @property
    def size(self) -> int: ...
    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None: ...
    def close(self) -> None: ...


class Qcow2:
    """A qcow2 image as a disk of `size` bytes.

    read_only  open it, and whatever backs it, for reading only
    backing    open the backing file that it names, if it names one
    unsafe     never wait for the host's disk: a crash of the host may destroy the image

    Raises NotFoundError, HostError or ImageError when it cannot be used. All methods raise OSError when the host or
    the image fails. Offsets and lengths are in bytes, multiples of 512, within `size`.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        backing: bool = False,
        unsafe: bool = False,
        _before: tuple[tuple[int, int], ...] = (),  # the files in front of this one
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.fd = -1  # clusters are anywhere in the file
        self._backing: Backing | None = None
        self._closed = False
        self._file = ImageFile(path, read_only=read_only, unsafe=unsafe)
        try:
            self._open(qcow2_format.read_header(self._file), backing, (*_before, self._file.identity))
        except OSError as error:
            self._abandon()
            raise ImageError(f"qcow2 image {path} cannot be read: {error.strerror}", qcow2_format.UNDAMAGED) from None
        except BaseException:
            self._abandon()
            raise

    def _open(self, header: Header, backing: bool, files: tuple[tuple[int, int], ...]) -> None:
        self.size = header.size  # bytes
        self._bits = header.cluster_bits
        self._cluster = header.cluster_size
        self._l2_bits = self._bits - 3  # of a cluster's index in its L2 table
        self._version = header.version
        self._offset_bits = 70 - self._bits  # of a compressed cluster's descriptor
        self._decompress = decompressor(header.compression_type, self.path)
        self._decompressed: tuple[int, bytes] = (0, b"")  # the last one: its L2 entry, its content
        self._l1_offset = header.l1_table_offset
        self._l1 = decode(self._file.read(self._l1_offset, 8 * header.l1_size), QWORD)
        offsets = (entry & ~ENTRY.COPIED for entry in self._l1)
        qcow2_format.check_table(offsets, "L1", self._file, self._cluster)
        self._l1_dirty: set[int] = set()  # entries that are not yet in the file
        self._l2 = Tables(self._file, self._cluster, QWORD)
        self._file_end = -(-self._file.size >> self._bits)
        if not self.read_only:
            self._open_for_writing(header)
        if header.backing_file is not None:
            self._open_backing(header, backing, files)
        if not self.read_only and header.autoclear_features:
            # None of them is kept true by what is done here: they must go before anything is written.
            self._file.write(qcow2_format.AUTOCLEAR_FEATURES, bytes(8))
            self._file.flush()

    def _open_for_writing(self, header: Header) -> None:
        for feature, state in ((INCOMPATIBLE.CORRUPT, "damaged"), (INCOMPATIBLE.DIRTY, "dirty, not closed properly")):
            if header.incompatible_features & feature:
                raise ImageError(f"qcow2 image {self.path} is marked as {state}", f"{REPAIR}, or open it read-only")
        refcount_table = qcow2_format.read_refcount_table(self._file, header)
        areas = [
            (0, self._cluster),
            (self._l1_offset, 8 * len(self._l1)),
            (header.refcount_table_offset, 8 * len(refcount_table)),
            *qcow2_format.snapshot_areas(self._file, header),
        ]
        runs = [range(offset >> self._bits, -(-(offset + length) >> self._bits)) for offset, length in areas]
        if sum(map(len, runs)) + len(self._l1) + len(refcount_table) > MAX_RESERVED:
            raise ImageError(
                f"qcow2 image {self.path} has more tables than can be used", "flatten it: qemu-img convert"
            )
        tables = ((entry & ENTRY.OFFSET) >> self._bits for entry in chain(self._l1, refcount_table) if entry)
        self._reserved = Reserved(chain(*runs, tables))
        twice = self._reserved.twice()
        if twice is not None:
            raise ImageError(f"qcow2 image {self.path} uses cluster {twice} for two tables", REPAIR)
        self._refcounts = Refcounts(self._file, header, refcount_table, self._reserved)

    def _open_backing(self, header: Header, asked: bool, files: tuple[tuple[int, int], ...]) -> None:
        name, kind = header.backing_file or "", header.backing_format
        image = f"qcow2 image {self.path}"
        flatten = f"make one without: `qemu-img convert -O qcow2 {self.path} NEW`"
        if not asked:
            raise ImageError(
                f"{image} has the backing file {name!r}, which is opened only when asked for",
                f"ask for it (backing) if you trust the image, or {flatten}",
            )
        if kind not in FORMATS:
            stated = f"of the format {kind!r}" if kind else "without saying its format"
            remedy = f"`qemu-img rebase -u -b FILE -F raw {self.path}` (or qcow2) says it"
            raise ImageError(f"{image} names the backing file {name!r} {stated}", remedy)
        if ":" in name.split("/")[0]:  # nbd://..., json:{...}: what QEMU calls a protocol
            raise ImageError(f"{image} has the backing file {name!r}, which is no plain file", flatten)
        if len(files) >= MAX_CHAIN:
            raise ImageError(f"{image} is at the end of a chain of {MAX_CHAIN} images, and has another", flatten)
        path = self.path.parent / name
        try:
            info = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            remedy = f"put it there, or `qemu-img rebase -u -b FILE -F {kind} {self.path}`"
            raise NotFoundError(f"{image}: its backing file {path} does not exist", remedy) from None
        except OSError as error:
            raise HostError(f"{image}: its backing file {path}: {error.strerror}", "make it readable") from None
        if (info.st_dev, info.st_ino) in files:  # before it is opened, which a lock of ours may forbid
            raise ImageError(f"{image} has the backing file {name!r}, which is backed by it: a cycle", flatten)
        if kind == "qcow2":
            self._backing = Qcow2(path, read_only=True, backing=True, _before=files)
        else:
            self._backing = ImageFile(path, read_only=True)

    # Reading.

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` with what the disk has from `offset` on."""
        self._check_range(offset, total(buffers))
        self._read(offset, total(buffers), Cursor(buffers))

    def _read(self, offset: int, length: int, into: Cursor) -> None:
        while length:
            kind, at, run = self._find(offset, length)
            buffers = into.take(run)
            if kind is Kind.DATA:
                self._file.readv(at, buffers)
            elif kind is Kind.ZERO:
                fill_zeroes(buffers)
            elif kind is Kind.BACKING:
                self._read_backing(offset, buffers)
            else:
                content = memoryview(self._decompress_cluster(at))[offset & self._cluster - 1 :]
                for buffer in buffers:
                    buffer[:] = content[: len(buffer)]
                    content = content[len(buffer) :]
            offset += run
            length -= run

    def _read_backing(self, offset: int, buffers: list[memoryview]) -> None:
        assert self._backing is not None
        length = total(buffers)
        inside = min(length, max(self._backing.size - offset, 0))
        cursor = Cursor(buffers)
        if inside:
            self._backing.readv(offset, cursor.take(inside))
        fill_zeroes(cursor.take(length - inside))

    def _find(self, offset: int, length: int) -> tuple[Kind, int, int]:
        """Where the bytes from `offset` on are: the kind, the place in the file, how many of `length` lie like that.

        For a compressed cluster, the place is its L2 entry.
        """
        l1_index, first, stop, within = self._place(offset, length)
        table_offset = self._l1[l1_index] & ENTRY.OFFSET
        if not table_offset:
            run = min(length, (stop - first << self._bits) - within)
            return *self._absent(offset), run
        table = self._l2.get(table_offset)
        entry = table[first]
        kind, at = self._locate(entry, offset)
        behind = first + 1
        if kind is Kind.DATA:
            entry &= ~ENTRY.COPIED
            while behind < stop and table[behind] & ~ENTRY.COPIED == entry + (behind - first << self._bits):
                behind += 1
            self._check_inside(at, behind - first)
            at += within
        elif kind is not Kind.COMPRESSED:
            while behind < stop and table[behind] == entry:
                behind += 1
        return kind, at, min(length, (behind - first << self._bits) - within)

    def _place(self, offset: int, length: int) -> tuple[int, int, int, int]:
        """Where guest bytes are in the tables: L1 index, first L2 index, the one behind the last, offset in the first.

        Not more than one L2 table has.
        """
        cluster = offset >> self._bits
        first = cluster & (1 << self._l2_bits) - 1
        last = (offset + length - 1 >> self._bits) - cluster + first
        return cluster >> self._l2_bits, first, min(last + 1, 1 << self._l2_bits), offset & self._cluster - 1

    def _locate(self, entry: int, offset: int) -> tuple[Kind, int]:
        """What an L2 entry says about the cluster around guest `offset`; OSError EIO for what it may not say."""
        if entry & ENTRY.COMPRESSED:
            if entry & ENTRY.COPIED:
                raise self._corrupt(entry)
            return Kind.COMPRESSED, entry
        at = entry & ENTRY.OFFSET
        if entry & ENTRY.RESERVED or at & self._cluster - 1:
            raise self._corrupt(entry)
        if entry & ENTRY.ZERO:
            if self._version < 3:
                raise self._corrupt(entry)
            return Kind.ZERO, at
        if at:
            return Kind.DATA, at
        if entry:
            raise self._corrupt(entry)
        return self._absent(offset)

    def _absent(self, offset: int) -> tuple[Kind, int]:
        return Kind.ZERO if self._backing is None else Kind.BACKING, 0

    def _decompress_cluster(self, entry: int) -> bytes:
        if self._decompressed[0] == entry:
            return self._decompressed[1]
        at, length = self._compressed_area(entry)
        self._check_inside(at >> self._bits << self._bits, 1)
        area = bytearray(length)
        self._file.readv(at, [memoryview(area)])  # the last sector may be cut off by the end of the file
        try:
            content = self._decompress(bytes(area), self._cluster)
        except BadData:
            content = b""
        if len(content) != self._cluster:
            raise self._corrupt(entry)
        self._decompressed = entry, content
        return content

    def _compressed_area(self, entry: int) -> tuple[int, int]:
        """Where a compressed cluster's data is in the file: offset, length."""
        at = entry & (1 << self._offset_bits) - 1
        sectors = (entry & ENTRY.COMPRESSED - 1) >> self._offset_bits
        return at, (sectors + 1) * SECTOR - at % SECTOR

    def _corrupt(self, entry: int) -> OSError:
        return OSError(errno.EIO, f"qcow2 image {self.path} has the bad L2 entry {entry:#x}; {REPAIR}")

    def _check_inside(self, at: int, count: int) -> None:
        """OSError EIO unless `count` clusters from `at` on are in the file, the last one at least begun."""
        end = self._file_end if self.read_only else self._refcounts.end
        if (at >> self._bits) + count > end:
            raise OSError(errno.EIO, f"qcow2 image {self.path} refers to {at:#x}, which is outside the file")

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} of a disk of {self.size}")

    # Writing.

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write `buffers` to the disk from `offset` on."""
        self._check_writable(offset, total(buffers))
        self._write(offset, total(buffers), Cursor(buffers))

    def _write(self, offset: int, length: int, data: Cursor) -> None:
        while length:
            self._make_room()
            run = self._overwrite(offset, length, data) or self._write_new(offset, length, data)
            offset += run
            length -= run

    def _overwrite(self, offset: int, length: int, data: Cursor) -> int:
        """Write in place as far as the clusters are this image's alone; how many bytes that were."""
        l1_index, first, stop, within = self._place(offset, length)
        l1_entry = self._l1[l1_index]
        if not l1_entry & ENTRY.COPIED:
            return 0
        table = self._l2.get(l1_entry & ENTRY.OFFSET)
        entry = table[first]
        kind, at = self._locate(entry, offset)
        if kind is not Kind.DATA or not entry & ENTRY.COPIED:
            return 0
        behind = first + 1
        while behind < stop and table[behind] == entry + (behind - first << self._bits):
            behind += 1
        self._check_unreserved(at, behind - first)
        run = min(length, (behind - first << self._bits) - within)
        self._file.writev(at + within, data.take(run))
        return run

    def _write_new(self, offset: int, length: int, data: Cursor) -> int:
        """Write to newly allocated clusters as many bytes as there are clusters side by side; how many that were."""
        l1_index, first, stop, within = self._place(offset, length)
        table_offset = self._own_l2_table(l1_index)
        table = self._l2.get(table_offset)
        behind = first
        while behind < stop:  # the first one is known not to be
            entry = table[behind]
            if self._locate(entry, offset)[0] is Kind.DATA and entry & ENTRY.COPIED:
                break
            self._check_releasable(entry)
            behind += 1
        unused = self._refcounts.end
        host, count = self._refcounts.allocate(behind - first)
        run = min(length, (count << self._bits) - within)
        try:
            start, end = offset - within, offset + run
            head = self._old_content(start, within, host >= unused)
            tail = self._old_content(end, -end & self._cluster - 1, host >= unused)
            self._file.writev((host << self._bits) + within - total(head), [*head, *data.take(run), *tail])
        except BaseException:
            self._refcounts.undo(host, count)
            raise
        table = self._l2.edit(table_offset)
        old = table[first : first + count]
        for k in range(count):
            table[first + k] = host + k << self._bits | ENTRY.COPIED
        for entry in old:
            self._release(entry)
        return run

    def _old_content(self, offset: int, length: int, zeros: bool) -> list[memoryview]:
        """The rest of a cluster of which only a part is written; empty when that is zeros, and `zeros` are there."""
        if not length or (zeros and self._find(offset, length)[0] is Kind.ZERO):
            return []
        content = memoryview(bytearray(length))
        self._read(offset, length, Cursor([content]))
        return [content]

    def _own_l2_table(self, index: int) -> int:
        """The offset of an L2 table that is this image's alone, a new one if need be."""
        entry = self._l1[index]
        old = entry & ENTRY.OFFSET
        if entry & ENTRY.COPIED:
            return old
        table = self._l2.get(old)[:] if old else None  # shared with a snapshot
        host, _ = self._refcounts.allocate(1)
        self._l2.put(host << self._bits, table)
        self._reserved.add(host)
        self._l1[index] = host << self._bits | ENTRY.COPIED
        self._l1_dirty.add(index)
        if old:
            self._l2.drop(old)
            self._reserved.discard(old >> self._bits)
            self._refcounts.release(old >> self._bits)
        return host << self._bits

    def _host_clusters(self, entry: int) -> tuple[int, int]:
        """(first, count) of the clusters of the file that an L2 entry refers to."""
        if entry & ENTRY.COMPRESSED:
            at, length = self._compressed_area(entry)
            return at >> self._bits, (at + length - 1 >> self._bits) - (at >> self._bits) + 1
        return (entry & ENTRY.OFFSET) >> self._bits, 1 if entry & ENTRY.OFFSET else 0

    def _release(self, entry: int) -> None:
        first, count = self._host_clusters(entry)
        if count:
            self._refcounts.release(first, count)

    def _check_releasable(self, entry: int) -> None:
        first, count = self._host_clusters(entry)
        if self._reserved.overlaps(first, count):
            raise self._corrupt(entry)

    def _check_unreserved(self, at: int, count: int) -> None:
        self._check_inside(at, count)
        if self._reserved.overlaps(at >> self._bits, count):
            raise OSError(errno.EIO, f"qcow2 image {self.path} has data where its tables are, at {at:#x}; {REPAIR}")

    def _check_writable(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if self.read_only:
            raise OSError(errno.EROFS, f"qcow2 image {self.path} was opened read-only")

    # Discarding, zeros.

    def discard(self, offset: int, length: int) -> None:
        """Give back the clusters that are wholly in the range: they read as zeros, where the format can say so."""
        self._check_writable(offset, length)
        if self._version >= 3 or self._backing is None:
            self._clear(*self._whole_clusters(offset, length), keep=False)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeros; with `unmap`, whole clusters of it may be given back."""
        self._check_writable(offset, length)
        start, end = self._whole_clusters(offset, length)
        if start >= end or (self._version < 3 and not (unmap and self._backing is None)):
            self._write_zeros(offset, length)
            return
        self._write_zeros(offset, start - offset)
        self._clear(start, end, keep=not unmap)
        self._write_zeros(end, offset + length - end)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the clusters that the range covers; what the last one has behind the disk is nothing."""
        start = -(-offset >> self._bits) << self._bits
        end = offset + length
        return start, end if end == self.size else end >> self._bits << self._bits

    def _clear(self, start: int, end: int, keep: bool) -> None:
        """Let the clusters from `start` to `end` read as zeros, and release them unless `keep` is wanted."""
        while start < end:
            self._make_room()
            stop = min(end, ((start >> self._bits + self._l2_bits) + 1) << self._bits + self._l2_bits)
            if self._l1[start >> self._bits + self._l2_bits] or self._backing is not None:
                self._clear_in_table(start, stop, keep)
            start = stop

    def _clear_in_table(self, start: int, stop: int, keep: bool) -> None:
        l1_index, first, behind, _ = self._place(start, stop - start)
        cleared = 0 if self._backing is None else ENTRY.ZERO
        at = self._l1[l1_index] & ENTRY.OFFSET
        if at and all(entry == cleared for entry in self._l2.get(at)[first:behind]):
            return
        table_offset = self._own_l2_table(l1_index)
        old = self._l2.get(table_offset)[first:behind]
        for entry in old:
            self._locate(entry, start)
            self._check_releasable(entry)
        table = self._l2.edit(table_offset)
        for k, entry in enumerate(old):
            if keep and entry & ENTRY.COPIED:
                table[first + k] = entry | ENTRY.ZERO
            else:
                table[first + k] = cleared
                self._release(entry)

    def _write_zeros(self, offset: int, length: int) -> None:
        while length > 0:
            kind, _, run = self._find(offset, length)
            run = min(run, len(ZEROES))
            if kind is not Kind.ZERO:
                self._write(offset, run, Cursor([ZEROES[:run]]))
            offset += run
            length -= run

    # The file.

    def flush(self) -> None:
        """Make durable all that was written; what the host could not do, it is asked again at the next flush."""
        if self.read_only:
            return
        self._refcounts.write()
        if self._l2.dirty:
            self._file.flush()
            self._l2.write()
        if self._l1_dirty:
            self._file.flush()
            for index in sorted(self._l1_dirty):
                self._file.write(self._l1_offset + 8 * index, self._l1[index].to_bytes(8, "big"))
                self._l1_dirty.discard(index)
        self._file.flush()
        self._refcounts.settle()
        self._refcounts.write()

    def _make_room(self) -> None:
        """Keep what waits in memory within its bounds."""
        if self._l2.full or self._refcounts.full:
            self.flush()

    def close(self) -> None:
        """Flush, then let go of the files, in any case; safe to call twice."""
        try:
            if not self._closed:
                self.flush()
        finally:
            self._closed = True
            self._abandon()

    def _abandon(self) -> None:
        self._file.close()
        if self._backing is not None:
            self._backing.close()
