"""Balloon device: the host asks for guest memory back while the guest runs (VIRTIO 1.2, 5.5).

Linux: VIRTIO_BALLOON; PAGE_REPORTING for free pages.

    balloon = Balloon()
    vm.add(balloon)
    ...
    with balloon.lock:
        balloon.target(256 << 20)    # the driver hands over pages until `actual` says so

Pages that the driver hands over leave guest RAM; used again, they come back as zeros.
A hostile guest may name pages that are not RAM (ignored), the same ones many times, its own rings (which then hold
zeros: it harms itself), lists or reports of any length (one list counts up to MAX_PFNS, one turn gives back up to
MAX_RANGES ranges), or not inflate at all: a balloon is a request, no limit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..core.board import Board
from ..core.errors import ConfigError, HostError
from ..core.regs import Bits, bit
from ..core.units import parse_size
from .device import VirtioDevice
from .queue import Chain, VirtQueue
from .spec import Type

PFN_SHIFT = 12  # 5.5.6: page numbers count 4 KiB, whatever the guest's page size
MAX_PFNS = 4096  # of one list; Linux sends 256
MAX_RANGES = 4096  # given back in one turn of the event loop: some 10 ms
QUEUE_SIZE = 128
INFLATE, DEFLATE = 0, 1  # 5.5.2: queues; which of those behind are there depends on features
CONFIG = struct.Struct("<II")  # 5.5.4: num_pages, actual
ACTUAL = 4  # offset

STAT = struct.Struct("<HQ")  # 5.5.6.3: tag, val
STATS = (  # 5.5.6.4, VIRTIO_BALLOON_S_*, by tag
    "SWAP_IN SWAP_OUT MAJFLT MINFLT MEMFREE MEMTOT AVAIL CACHES HTLB_PGALLOC HTLB_PGFAIL".split()
)
MAX_STATS = 64  # of one buffer; the specification has 10, Linux 16


class BALLOON_F(Bits):
    """Feature bits (5.5.3)."""

    STATS_VQ = bit(1)
    DEFLATE_ON_OOM = bit(2)
    PAGE_REPORTING = bit(5)


class Balloon(VirtioDevice):
    """Takes pages from the guest as `target` asks, and learns what the guest says about its memory.

    target          size at the start, such as 64M; `target()` changes it later
    deflate_on_oom  the guest may take pages back when it has no others
    stats           period of the guest's statistics in seconds; 0 for none
    reporting       the guest tells which pages it does not use, and they go back to the host with no balloon at all

    `stats` is what the guest said last, by the specification's names (MEMFREE, MEMTOT: bytes; MAJFLT: a count).
    """

    type_id = Type.BALLOON
    queue_sizes = (QUEUE_SIZE,) * 5
    modules = ("virtio_balloon",)
    config: bytearray

    def __init__(
        self, *, target: str | None = None, deflate_on_oom: bool = True, stats: int = 0, reporting: bool = True
    ) -> None:
        if stats < 0:
            raise ConfigError(f"invalid balloon period {stats}", "give seconds, or 0 for no statistics")
        self._first_target = 0 if target is None else parse_size(target)
        self.period = stats
        self.stats: dict[str, int] = {}
        self.features = (
            BALLOON_F.DEFLATE_ON_OOM * deflate_on_oom
            | BALLOON_F.STATS_VQ * bool(stats)
            | BALLOON_F.PAGE_REPORTING * reporting
        )
        self.config = bytearray(CONFIG.size)
        self._ram = 0  # bytes, once there is a board
        self._stats_queue: VirtQueue | None = None
        self._reporting_queue: VirtQueue | None = None
        self._outstanding: Chain | None = None  # the driver's one buffer for statistics, until we want new ones

    # The host's side.

    def target(self, size: int) -> None:
        """Ask the driver for a balloon of `size` bytes; raises ConfigError for more than there is RAM."""
        if not 0 <= size <= self._ram:
            raise ConfigError(
                f"a balloon of {size >> 20} MiB does not fit", f"the guest has {self._ram >> 20} MiB of memory"
            )
        CONFIG.pack_into(self.config, 0, size >> PFN_SHIFT, self._pages)
        self.config_changed()

    @property
    def actual(self) -> int:
        """Bytes in the balloon, as the driver says."""
        return min(self._pages << PFN_SHIFT, self._ram)

    # The guest's side.

    def attach(self, board: Board) -> None:
        self._ram = sum(len(region.buf) for region in board.mem.regions)
        self.target(self._first_target)
        super().attach(board)
        if self.period:
            board.loop.after(self.period, self._poll, owner=self)

    def activate(self, features: int, queues: Sequence[VirtQueue]) -> None:
        """5.5.2 gives each queue a fixed number, Linux numbers those that its features need: take both."""
        extra = iter([queue for queue in queues[DEFLATE + 1 :] if queue.enabled])
        self._stats_queue = next(extra, None) if features & BALLOON_F.STATS_VQ else None
        self._reporting_queue = next(extra, None) if features & BALLOON_F.PAGE_REPORTING else None

    def notify(self, index: int, queue: VirtQueue) -> None:
        if queue is self._stats_queue:
            self._take_stats(queue)
        elif index == INFLATE:
            self._discard(queue, inflated)
        elif queue is self._reporting_queue:
            self._discard(queue, self._reported)
        else:
            for chain in queue.available():
                queue.push(chain)

    def reset(self) -> None:
        """What the driver had handed over is the guest's again."""
        self._stats_queue = self._reporting_queue = self._outstanding = None
        CONFIG.pack_into(self.config, 0, CONFIG.unpack(self.config)[0], 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset >= ACTUAL:
            self.config[offset : offset + len(data)] = data

    # State.

    def state(self) -> dict[str, Any]:
        outstanding = self._outstanding.head if self._outstanding is not None else None
        pages = list(CONFIG.unpack(self.config))
        return super().state() | {"pages": pages, "stats": dict(self.stats), "outstanding": outstanding}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        try:
            head = state["outstanding"]
            self._outstanding = None if head is None else Chain(int(head) & 0xFFFF, [], [])
            self.stats = {name: int(state["stats"][name]) for name in STATS if name in state["stats"]}
            self.config[:] = CONFIG.pack(*state["pages"])
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ValueError(f"Balloon: state has no usable {error}") from None

    # Inside.

    @property
    def _pages(self) -> int:
        return int(CONFIG.unpack(self.config)[1])

    def _discard(self, queue: VirtQueue, ranges_of: Callable[[Chain], Iterator[tuple[int, int]]]) -> None:
        done = 0
        for chain in queue.available():
            for gpa, size in ranges_of(chain):
                done += 1
                self._give_back(gpa, size)
            queue.push(chain)
            if done >= MAX_RANGES:
                queue.more = True  # the others on the loop first
                return

    def _give_back(self, gpa: int, size: int) -> None:
        """Discard what of [gpa, gpa+size) is RAM."""
        for region in self.board.mem.regions:
            start, end = max(gpa, region.gpa), min(gpa + size, region.end)
            if start < end:
                try:
                    self.board.mem.discard(start, end - start)
                except HostError as error:  # the guest cannot tell the difference
                    self.board.log("memory stays with the guest", why=str(error))

    def _reported(self, chain: Chain) -> Iterator[tuple[int, int]]:
        """What a chain of the reporting queue says is free: its writable buffers themselves (5.5.6.7)."""
        return ((self.board.mem.address(buffer), len(buffer)) for buffer in chain.writable if buffer)

    def _take_stats(self, queue: VirtQueue) -> None:
        for chain in queue.available():
            if self._outstanding is not None:  # 5.5.6.3: the driver has one buffer; one more is a mistake of its own
                queue.push(chain)
                continue
            self._outstanding = chain
            self.stats = statistics(chain.read(MAX_STATS * STAT.size))

    def _poll(self) -> None:
        """Ask for new statistics: the driver gets its buffer back, and gives it again with current ones."""
        self.board.loop.after(self.period, self._poll, owner=self)
        chain, self._outstanding = self._outstanding, None
        if chain is not None and self._stats_queue is not None:
            self._stats_queue.push(chain)
            self._stats_queue.signal()


def inflated(chain: Chain) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the pages in a list of page numbers, neighbours together."""
    data = chain.read(MAX_PFNS * 4)
    pfns = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
    return ((start << PFN_SHIFT, count << PFN_SHIFT) for start, count in runs(pfns))


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of each run of consecutive numbers, in whatever order they come and how often."""
    first, count = -1, 0
    for number in sorted(set(numbers)):
        if number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def statistics(data: bytes) -> dict[str, int]:
    """The values that the specification has a name for."""
    whole = data[: len(data) // STAT.size * STAT.size]
    return {STATS[tag]: value for tag, value in STAT.iter_unpack(whole) if tag < len(STATS)}
