"""A disk image whose changes go to a temporary file.

The file has no name and is as large as the image, with holes where nothing was written: a cluster is either in the
image or at the same place in the file. Besides, that takes a byte of memory for each cluster: 16 MiB for 1 TiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..core.buffers import pieces, total
from ..core.errors import HostError
from .disk import Image, Raw

CLUSTER = 1 << 16  # bytes that are copied when the first of them is written


class Overlay:
    """`base`, which is never written to and is closed with the overlay, seen through its changes."""

    read_only = False
    fd = -1

    def __init__(self, base: Image) -> None:
        """Raises HostError when there is no room for a temporary file."""
        self.size = base.size
        self._base = base
        self._changed = bytearray(-(-base.size // CLUSTER))  # 1: the cluster is in the file
        self._file = Raw(_temporary(base.size), cache="unsafe")

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for at, length, changed in self._runs(offset, total(buffers)):
            source: Image = self._file if changed else self._base
            source.readv(at, pieces(buffers, at - offset, length))

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        clusters = self._prepare(offset, total(buffers))
        self._file.writev(offset, buffers)
        self._mark(clusters)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        clusters = self._prepare(offset, length)
        self._file.write_zeroes(offset, length, unmap)
        self._mark(clusters)

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters become holes, which read as zeros; the rest stays as it is."""
        start = -(-offset // CLUSTER) * CLUSTER
        end = offset + length
        if end < self.size:
            end = end // CLUSTER * CLUSTER
        if start < end:
            self.write_zeroes(start, end - start, unmap=True)

    def flush(self) -> None:
        """What will be forgotten need not be kept safe."""

    def close(self) -> None:
        self._file.close()
        self._base.close()

    def _prepare(self, offset: int, length: int) -> range:
        """The clusters of a range that is about to change; those that will change only in part are in the file now."""
        end = offset + length
        if offset % CLUSTER:
            self._copy(offset // CLUSTER)
        if end % CLUSTER and end < self.size:
            self._copy(end // CLUSTER)
        return range(offset // CLUSTER, -(-end // CLUSTER))

    def _copy(self, cluster: int) -> None:
        if not self._changed[cluster]:
            at = cluster * CLUSTER
            content = memoryview(bytearray(min(CLUSTER, self.size - at)))
            self._base.readv(at, [content])
            self._file.writev(at, [content])
            self._changed[cluster] = 1

    def _mark(self, clusters: range) -> None:
        self._changed[clusters.start : clusters.stop] = b"\1" * len(clusters)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, changed) of the parts of a range that are in one place, in order."""
        end = offset + length
        while offset < end:
            changed = self._changed[offset // CLUSTER]
            other = self._changed.find(1 - changed, offset // CLUSTER, -(-end // CLUSTER))
            until = end if other < 0 else other * CLUSTER
            yield offset, until - offset, bool(changed)
            offset = until


def _temporary(size: int) -> int:
    """A descriptor of an unnamed file of `size` bytes, all of them a hole."""
    import tempfile  # slow to import

    try:
        with tempfile.TemporaryFile(buffering=0) as file:
            os.ftruncate(file.fileno(), size)
            return os.dup(file.fileno())
    except OSError as error:
        what = f"no temporary file of {size} bytes for a disk with snapshot: {error.strerror}"
        raise HostError(what, "set TMPDIR to a folder with room") from None
