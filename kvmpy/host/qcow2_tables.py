"""Tables of a qcow2 image in memory: a bounded cache of those that are one cluster each, with what is to be written.

They are arrays of plain ints, whatever their entries' width in the file.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise

from .image_file import ImageFile

CACHE = 8 << 20  # bytes in the file of what one cache holds; L2 tables of 64 KiB map 64 GiB with that
LEAST = 8  # tables that it holds in any case: one step of work needs a few at once
QWORD = 6  # the order of tables of 64-bit entries


def decode(data: bytes, order: int) -> array[int]:
    """The entries, of 1 << order bits each, of a table; those of a byte begin with the least significant bits."""
    if order >= 3:
        table = array("BHIQ"[order - 3], data)
        table.byteswap()
        return table
    bits, per_byte = 1 << order, 8 >> order
    entries = bytearray(len(data) * per_byte)
    for k in range(per_byte):
        entries[k::per_byte] = data.translate(bytes(byte >> k * bits & (1 << bits) - 1 for byte in range(256)))
    return array("B", entries)


def encode(table: array[int], order: int) -> bytes:
    """The bytes of a table: the inverse of `decode`."""
    if order >= 3:
        swapped = table[:]
        swapped.byteswap()
        return swapped.tobytes()
    bits, per_byte = 1 << order, 8 >> order
    packed = 0  # as one number: entries do not reach into their neighbours
    for k in range(per_byte):
        packed |= int.from_bytes(table[k::per_byte].tobytes(), "little") << k * bits
    return packed.to_bytes(len(table) // per_byte, "little")


class Tables:
    """Tables of one kind by their offset in the file. Those that were changed stay until `write`.

    `get` is for reading, and only until the next call; `edit` and `put` for what is going to change.
    """

    def __init__(self, file: ImageFile, cluster_size: int, order: int) -> None:
        self.dirty: set[int] = set()
        self.entries = cluster_size * 8 >> order  # of each table
        self._file = file
        self._cluster_size = cluster_size
        self._order = order
        self._most = max(LEAST, CACHE // cluster_size)
        self._tables: OrderedDict[int, array[int]] = OrderedDict()  # the one used last is the last

    @property
    def full(self) -> bool:
        """Whether it is time to write, so that there is room for others."""
        return 2 * len(self.dirty) >= self._most

    def get(self, offset: int) -> array[int]:
        """The table at `offset`; raises OSError."""
        table = self._tables.get(offset)
        if table is None:
            table = decode(self._file.read(offset, self._cluster_size), self._order)
            self._make_room()
            self._tables[offset] = table
        else:
            self._tables.move_to_end(offset)
        return table

    def edit(self, offset: int) -> array[int]:
        """The table at `offset`, which the caller changes; raises OSError."""
        table = self.get(offset)
        self.dirty.add(offset)
        return table

    def put(self, offset: int, table: array[int] | None = None) -> array[int]:
        """A new table at `offset`, of zeros by default."""
        self._make_room()
        self._tables[offset] = table or decode(bytes(self._cluster_size), self._order)
        self.dirty.add(offset)
        return self._tables[offset]

    def drop(self, offset: int) -> None:
        """Forget the table at `offset`: its cluster is used for something else."""
        self._tables.pop(offset, None)
        self.dirty.discard(offset)

    def write(self) -> None:
        """Write what was changed; raises OSError, and then what is not yet written stays dirty."""
        for offset in sorted(self.dirty):
            self._file.write(offset, encode(self._tables[offset], self._order))
            self.dirty.discard(offset)

    def _make_room(self) -> None:
        if len(self._tables) < self._most:
            return
        oldest = next((offset for offset in self._tables if offset not in self.dirty), None)
        if oldest is not None:
            del self._tables[oldest]


class Reserved:
    """The clusters, by number, that hold the header and tables: no guest data may ever be written there."""

    def __init__(self, clusters: Iterable[int]) -> None:
        self._clusters = array("Q", sorted(clusters))

    def twice(self) -> int | None:
        """A cluster that was given twice."""
        return next((a for a, b in pairwise(self._clusters) if a == b), None)

    def overlaps(self, first: int, count: int) -> bool:
        """Whether any of `count` clusters from `first` on is reserved."""
        at = bisect_left(self._clusters, first)
        return at < len(self._clusters) and self._clusters[at] < first + count

    def add(self, cluster: int) -> None:
        insort(self._clusters, cluster)

    def discard(self, cluster: int) -> None:
        at = bisect_left(self._clusters, cluster)
        if at < len(self._clusters) and self._clusters[at] == cluster:
            del self._clusters[at]
