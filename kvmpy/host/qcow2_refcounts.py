"""Which clusters of a qcow2 image are in use: reference counts, and allocation by them.

A count is raised before anything refers to its cluster and lowered after nothing does any more, in the file as well:
`release` only notes what `settle` does once the reference is known to be gone from the disk. After a crash there may
be clusters that are counted and not used, never the other way round.
"""

from __future__ import annotations

import errno
from array import array
from contextlib import suppress

from .image_file import ImageFile
from .qcow2_format import MAX_TABLE, REFCOUNT_TABLE, REFCOUNT_TABLE_OFFSET, REPAIR, Header
from .qcow2_tables import QWORD, Reserved, Tables, decode, encode

MAX_RELEASED = 65536  # notes that wait for `settle`
MAX_FILE = 1 << 56  # an L2 entry reaches no further


class Refcounts:
    """The refcount table and blocks of `file`. Methods raise OSError."""

    def __init__(self, file: ImageFile, header: Header, table: array[int], reserved: Reserved) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._order = header.refcount_order
        self._reserved = reserved
        self._blocks = Tables(file, header.cluster_size, header.refcount_order)
        self._table_offset = header.refcount_table_offset
        self._table = table  # offsets of blocks
        self._table_dirty: set[int] = set()  # entries that are not yet in the file
        self._hint = 0  # no cluster before this one is free
        self._released: list[tuple[int, int]] = []  # runs of clusters: the first one, how many
        self.end = -(-file.size >> self._bits)  # in clusters: what lies behind was never used, and reads as zeros

    @property
    def full(self) -> bool:
        """Whether it is time to write and to settle."""
        return self._blocks.full or len(self._released) >= MAX_RELEASED

    def allocate(self, most: int) -> tuple[int, int]:
        """(first, count) of free clusters side by side, at least one and at most `most`, now counted as used.

        Raises OSError: EIO when the counts are wrong, ENOSPC when the image cannot grow.
        """
        per_block = self._blocks.entries
        while True:  # each turn is one refcount block further on
            index, at = divmod(self._hint, per_block)
            block = self._blocks.get(self._block(index))
            try:
                at = block.index(0, at)
                break
            except ValueError:
                self._hint = (index + 1) * per_block
        stop = min(at + most, per_block)
        behind = at + 1
        while behind < stop and not block[behind]:
            behind += 1
        first, count = index * per_block + at, behind - at
        self._check_unreserved(first, count)
        self._set(first, count, 1)
        self._hint = first + count
        self.end = max(self.end, first + count)
        return first, count

    def undo(self, first: int, count: int) -> None:
        """Free what `allocate` gave and nothing ever referred to."""
        self._set(first, count, 0)
        self._hint = min(self._hint, first)

    def release(self, first: int, count: int = 1) -> None:
        """Note that one reference to each of `count` clusters has gone from the tables in memory."""
        if self._released and sum(self._released[-1]) == first:
            first, count = self._released[-1][0], self._released.pop()[1] + count
        self._released.append((first, count))

    def write(self) -> None:
        """Write what was changed."""
        self._blocks.write()
        if self._table_dirty:
            self._file.flush()
            for index in sorted(self._table_dirty):
                self._file.write(self._table_offset + 8 * index, self._table[index].to_bytes(8, "big"))
                self._table_dirty.discard(index)

    def settle(self) -> None:
        """Lower the counts of what was released: the file does not refer to it any more. What nothing refers to goes
        back to the host."""
        while self._released:
            first, count = self._released.pop()
            unused = first  # from here up to `cluster`, nothing refers to what was lowered
            for cluster in range(first, first + count):
                if not self._lower(cluster):
                    self._give_back(unused, cluster - unused)
                    unused = cluster + 1
            self._give_back(unused, first + count - unused)
            if self._blocks.full:
                self._blocks.write()

    def _lower(self, cluster: int) -> bool:
        """Whether the count was one, and is zero now."""
        index, at = divmod(cluster, self._blocks.entries)
        if index >= len(self._table) or not self._table[index]:
            return False  # it was wrong before, as it is when it is 0 already
        if not self._blocks.get(self._table[index])[at]:
            return False
        block = self._blocks.edit(self._table[index])
        block[at] -= 1
        if block[at]:
            return False
        self._hint = min(self._hint, cluster)
        return True

    def _give_back(self, first: int, count: int) -> None:
        if count:
            with suppress(OSError):  # then it stays in the file until it is used again
                self._file.discard(first << self._bits, count << self._bits)

    def _set(self, first: int, count: int, value: int) -> None:
        """Set the counts of clusters that one block counts."""
        index, at = divmod(first, self._blocks.entries)
        block = self._blocks.edit(self._table[index])
        block[at : at + count] = array(block.typecode, [value]) * count

    def _block(self, index: int) -> int:
        """The offset of refcount block `index`, which is made if there is none: the first of the clusters it counts."""
        if index >= len(self._table):
            self._grow()
        if not self._table[index]:
            cluster = index * self._blocks.entries
            self._check_unreserved(cluster, 1)
            self._blocks.put(cluster << self._bits)[0] = 1
            self._reserved.add(cluster)
            self._table[index] = cluster << self._bits
            self._table_dirty.add(index)
            self.end = max(self.end, cluster + 1)
        return self._table[index]

    def _grow(self) -> None:
        """Move the table, half as long again, behind all that it counts; blocks that count this go before it."""
        per_block, per_cluster = self._blocks.entries, self._cluster_size // 8
        old = len(self._table) // per_cluster
        clusters = old + old // 2 + 1
        blocks = -(-clusters // (per_block - 1))
        if clusters * self._cluster_size > MAX_TABLE:
            raise OSError(errno.EFBIG, f"{self._file.path} cannot grow further: its refcount table is full")
        first = len(self._table) * per_block
        self._check_unreserved(first, blocks + clusters)
        table = self._table + array("Q", bytes(8 * (clusters * per_cluster - len(self._table))))
        used = blocks + clusters
        for k in range(blocks):
            table[len(self._table) + k] = first + k << self._bits
            counts = min(used - k * per_block, per_block)
            block = decode(bytes(self._cluster_size), self._order)
            block[:counts] = array(block.typecode, [1]) * counts
            self._file.write(first + k << self._bits, encode(block, self._order))
        self._blocks.write()  # the new table refers to all of them
        offset = first + blocks << self._bits
        self._file.write(offset, encode(table, QWORD))
        self._file.flush()
        self._file.write(REFCOUNT_TABLE_OFFSET, REFCOUNT_TABLE.pack(offset, clusters))
        self._file.flush()
        was = self._table_offset >> self._bits
        self._table, self._table_offset = table, offset
        self._table_dirty.clear()
        for cluster in range(was, was + old):
            self._reserved.discard(cluster)
        for cluster in range(first, first + used):
            self._reserved.add(cluster)
        self.release(was, old)
        self.end = max(self.end, first + used)

    def _check_unreserved(self, first: int, count: int) -> None:
        if self._reserved.overlaps(first, count):
            raise OSError(errno.EIO, f"{self._file.path}: cluster {first} is in use and counted as free; {REPAIR}")
        if first + count << self._bits > MAX_FILE:
            raise OSError(errno.EFBIG, f"{self._file.path} cannot grow further")
