"""Serves what is ordinary in a queue in C, without the GIL; the rest goes the way through Python.

Loaded when the first device that can use it is activated, and not at all with KVMPY_PURE=1. The twin has a copy of the
queue's positions while it works; whatever it does not like it leaves in the ring (_virtqueue.c).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .._virtqueue import ffi, lib
from ..host.frames import MAX_FRAME
from ..host.netsocket import LENGTH, FrameStream
from ..host.tap import Tap
from .queue import Chain, VirtQueue

# Drivers that wait for each batch have the next one ready soon: without a kick and the way of a thread out of its sleep
# it is served sooner. A driver that took longer the last time is not waited for.
PATIENCE_NS = 100_000 if len(os.sched_getaffinity(0)) > 1 else 0


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

    def resize(self, sectors: int) -> None:
        self._disk.sectors = sectors

    def available(self) -> Iterator[Chain]:
        """As VirtQueue.available, after the ordinary ones have been served: only the others are yielded."""
        queue, ring, disk, serve = self._queue, self._ring, self._disk, lib.kvmpy_serve_disk
        queue.more = False
        if not queue.ready:
            return
        left = queue.size
        while left > 0:
            ring.next_avail, ring.next_used, ring.signalled = queue.positions
            before = ring.next_avail
            outcome = serve(ring, disk, left, self._patience)
            queue.positions = ring.next_avail, ring.next_used, ring.signalled
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
        queue.more = True


class FrameTwin:
    """Carries frames between the queues of a network device and `host`. Called with the device's lock held.

    `transmit` and `receive` return how they ended: with ODD the next one is Python's, with BLOCKED the host has no room
    or no frame, with MORE it is time for others, and else the driver will kick. Let go of the twin before guest memory
    or the host's end is closed.
    """

    ODD, BLOCKED, MORE = lib.KVMPY_ODD, lib.KVMPY_BLOCKED, lib.KVMPY_MORE
    kept: memoryview | None = None  # a frame that `receive` has read, and left to Python

    def __init__(self, queues: Sequence[VirtQueue], host: Any) -> None:
        self._rings = {queue.index: _ring(queue) for queue in queues}
        self._host = host

    def transmit(self, queue: VirtQueue, limit: int) -> int:
        """Send up to `limit` frames; the backend has nothing left to send."""
        raise NotImplementedError

    def receive(self, queue: VirtQueue, limit: int) -> int:
        """Give the driver up to `limit` frames, when Python has none for it."""
        raise NotImplementedError

    def _send(self, work: Callable[..., int], queue: VirtQueue, limit: int) -> int:
        while limit > 0:
            before, *_ = queue.positions
            outcome = self._round(work, queue, limit, PATIENCE_NS)
            if outcome != lib.KVMPY_DRAINED:
                return outcome
            limit -= queue.positions[0] - before & 0xFFFF
            queue.signal()
        return self.MORE

    def _round(self, work: Callable[..., int], queue: VirtQueue, *words: int) -> int:
        ring, _ = self._rings[queue.index]
        ring.next_avail, ring.next_used, ring.signalled = queue.positions
        outcome = work(ring, self._host, *words)
        queue.positions = ring.next_avail, ring.next_used, ring.signalled
        return outcome


class WireTwin(FrameTwin):
    """To a stream socket. `longest` is the largest frame that the driver takes; `mergeable`: in several chains, too."""

    def __init__(self, queues: Sequence[VirtQueue], backend: FrameStream, *, longest: int, mergeable: bool) -> None:
        wire = ffi.new("struct kvmpy_wire *")
        super().__init__(queues, wire)
        self._backend = backend
        self._rest = memoryview(bytearray(LENGTH + MAX_FRAME))
        wire.buffer, wire.size, wire.rest = _address(backend.buffer), len(backend.buffer), _address(self._rest)
        wire.fd, wire.longest, wire.mergeable = backend.fileno(), longest, mergeable

    def transmit(self, queue: VirtQueue, limit: int) -> int:
        outcome = self._send(lib.kvmpy_send_frames, queue, limit)
        if left := self._host.rest_size:
            self._backend.rest = memoryview(bytes(self._rest[:left]))
        return outcome

    def receive(self, queue: VirtQueue, limit: int) -> int:
        wire, backend = self._host, self._backend
        wire.start, wire.end = backend.start, backend.end
        outcome = self._round(lib.kvmpy_receive_frames, queue, limit)
        backend.start, backend.end = wire.start, wire.end
        return outcome


class TapTwin(FrameTwin):
    """To a tap interface. `longest` is for whole frames and for unsegmented ones; the other pairs are for frames that
    go out and that come in: whether they may lack their checksum, and the gso_types that they may have."""

    def __init__(
        self,
        queues: Sequence[VirtQueue],
        backend: Tap,
        *,
        longest: tuple[int, int],
        mergeable: bool,
        checksums: tuple[bool, bool],
        gso: tuple[Iterable[int], Iterable[int]],
    ) -> None:
        tap = ffi.new("struct kvmpy_tap *")
        super().__init__(queues, tap)
        self._buffer = backend.buffer
        tap.buffer, tap.size, tap.fd = _address(backend.buffer), len(backend.buffer), backend.fileno()
        (tap.longest, tap.longest_gso), tap.mergeable = longest, mergeable
        tap.host_csum, tap.guest_csum = checksums
        for table, kinds in zip((tap.host_gso, tap.guest_gso), gso, strict=True):
            for kind in kinds:
                table[kind] = 1

    def transmit(self, queue: VirtQueue, limit: int) -> int:
        return self._send(lib.kvmpy_tap_send, queue, limit)

    def receive(self, queue: VirtQueue, limit: int) -> int:
        outcome = self._round(lib.kvmpy_tap_receive, queue, limit)
        size = self._host.kept
        self.kept = memoryview(bytes(self._buffer[:size])) if size else None
        return outcome


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
