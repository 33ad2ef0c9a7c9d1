"""Serves the ordinary requests of a queue in C, without the GIL; the rest goes the way through Python.

Loaded when the first device that can use it is activated, and not at all with KVMPY_PURE=1. The twin has a copy of the
queue's positions while it works; whatever it does not like it leaves in the ring (_virtqueue.c).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from .._virtqueue import ffi, lib
from .queue import Chain, VirtQueue

BATCH = 64  # requests, and
BATCH_NS = 100_000  # time, after which the driver hears of what is done, though there may be more to do
# Drivers that wait for each batch have the next one ready soon: without a kick and the way of a thread out of its sleep
# it is served sooner. A driver that took longer the last time is not waited for.
PATIENCE_NS = 50_000 if len(os.sched_getaffinity(0)) > 1 else 0


class DiskTwin:
    """Serves a queue of a disk whose bytes are those of the file `fd`. Called with the device's lock held.

    `writable`: writes may end in the page cache, since the driver flushes; all others are Python's. Let go of the twin
    before guest memory is closed.
    """

    def __init__(self, queue: VirtQueue, fd: int, *, sectors: int, writable: bool, patient: bool) -> None:
        self._queue = queue
        self._ring, self._held = _ring(queue)
        self._disk = ffi.new("struct kvmpy_disk *", {"sectors": sectors, "fd": fd, "writable": writable})
        self._patience = PATIENCE_NS if patient else 0
        self._drained = 0  # when the driver was left without anything under way

    def resize(self, sectors: int) -> None:
        self._disk.sectors = sectors

    def available(self) -> Iterator[Chain]:
        """As VirtQueue.available, after the ordinary ones have been served: only the others are yielded."""
        queue, ring, disk, serve = self._queue, self._ring, self._disk, lib.kvmpy_serve_disk
        queue.more = False
        if not queue.ready:
            return
        soon = time.monotonic_ns() - self._drained < PATIENCE_NS
        patience = self._patience if soon else 0
        left = queue.size
        while left > 0:
            ring.next_avail, ring.next_used = queue.positions
            before = ring.next_avail
            outcome = serve(ring, disk, min(left, BATCH), BATCH_NS, patience)
            queue.positions = ring.next_avail, ring.next_used
            if outcome == lib.KVMPY_EMPTY:
                return
            left -= ring.next_avail - before & 0xFFFF
            queue.signal()
            if outcome == lib.KVMPY_ODD:
                chain = queue.pop()
                if chain is None:
                    return
                left -= 1
                yield chain
            elif outcome == lib.KVMPY_DRAINED:
                self._drained = time.monotonic_ns()
        queue.more = True


def usable(queue: VirtQueue) -> bool:
    """Whether there can be a twin for this queue."""
    return queue.size <= lib.MAX_SEGMENTS and len(queue.mem.regions) <= lib.MAX_REGIONS


def _ring(queue: VirtQueue) -> tuple[Any, list[memoryview]]:
    """The queue as C knows it, and views that keep the memory in place to which its pointers lead."""
    regions = queue.mem.regions
    held = [*(region.buf[:] for region in regions), *queue.rings]
    pointers = [_address(view) for view in held]
    ring = ffi.new("struct kvmpy_queue *")
    for place, region, start in zip(ring.region, regions, pointers, strict=False):
        place.gpa, place.size, place.bytes = region.gpa, len(region.buf), start
    ring.regions, ring.size = len(regions), queue.size
    ring.desc, ring.avail, ring.used = pointers[-3:]
    ring.indirect, ring.event_idx = queue.indirect, queue.event_idx
    return ring, held


def _address(view: memoryview) -> Any:
    """Where the bytes are. Nothing is held: CPython 3.11 crashes when it collects a cycle in which a view is held."""
    with ffi.from_buffer("uint8_t[]", view, True) as start:
        return ffi.cast("uint8_t *", start)
