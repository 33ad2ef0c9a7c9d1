"""A split virtqueue, seen from the device (VIRTIO 1.2, 2.7).

What the guest wrote is read once: descriptors are copied, checked, and turned into windows on its RAM before a device
sees them. A hostile guest may make descriptors that loop, point outside RAM or at the rings themselves, change while
they are read, or publish more entries than the queue has: each ends in a QueueError, or in a chain that only spoils
the guest's own memory. Work is bounded: a chain has at most as many descriptors as the queue, `available` yields at
most one round of the queue.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..core.buffers import pieces
from ..core.errors import GuestError
from ..core.memory import GuestMemory
from ..core.regs import Bits, bit
from .spec import MAX_QUEUE_SIZE, F

DESC = struct.Struct("<QIHH")  # 2.7.5: addr, len, flags, next
MAX_CHAIN_BYTES = 1 << 32  # 2.7.5.2: a driver must not make longer ones


class DESC_F(Bits):
    """Descriptor flags (2.7.5)."""

    NEXT = bit(0)
    WRITE = bit(1)
    INDIRECT = bit(2)


NO_INTERRUPT = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.6)


class QueueError(GuestError):
    """The driver broke a rule of the queue: the device needs a reset."""


class Chain:
    """One request: buffers that the device may read, then buffers that it may write, as windows on guest RAM.

    Their boundaries mean nothing (2.7.4). `head` names the chain to VirtQueue.push.
    """

    __slots__ = ("head", "readable", "writable", "written")

    def __init__(self, head: int, readable: list[memoryview], writable: list[memoryview]) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.written = 0

    @property
    def size(self) -> int:
        """Bytes that the device may read."""
        return sum(map(len, self.readable))

    @property
    def capacity(self) -> int:
        """Bytes that the device may write."""
        return sum(map(len, self.writable))

    def read(self, size: int = -1, at: int = 0) -> bytes:
        """A copy of up to `size` readable bytes from offset `at` on; all of them by default."""
        return b"".join(pieces(self.readable, at, self.size if size < 0 else size))

    def write(self, data: bytes | bytearray | memoryview, at: int | None = None) -> int:
        """Scatter `data` over the writable bytes from `at` on, by default behind what was written before.

        Returns how many bytes fitted. `written` counts up to the last byte of the first write that leaves no gap.
        """
        start = self.written if at is None else at
        rest = memoryview(data)
        for piece in pieces(self.writable, start, len(rest)):
            piece[:] = rest[: len(piece)]
            rest = rest[len(piece) :]
        end = start + len(data) - len(rest)
        if start <= self.written:
            self.written = max(self.written, end)
        return end - start


class VirtQueue:
    """Queue `index` of a device. Devices iterate `available()`, answer each chain with `push`, and call `signal` once.

    The transport sets `size`, the three addresses and `enabled` as the driver says, and calls `start` when the driver
    is up: from then on the queue is `ready`. All methods are called with the device's lock held. `interrupt` is the
    transport's way to the guest.
    """

    def __init__(self, index: int, max_size: int, mem: GuestMemory, interrupt: Callable[[VirtQueue], None]) -> None:
        if max_size & (max_size - 1) or not 0 < max_size <= MAX_QUEUE_SIZE:
            raise ValueError(f"a queue of {max_size} entries: use a power of two up to {MAX_QUEUE_SIZE}")
        self.index = index
        self.max_size = max_size
        self.more = False  # the last `available` ended with a full round
        self.mem = mem
        self.interrupt = interrupt
        # Orders a store before a later load of memory that the guest writes: taking a lock is a full barrier on x86,
        # where nothing else needs one (2.7.10.1, 2.7.13.3.1).
        self._barrier = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """As after the device's reset: no size of its own, no addresses, not enabled."""
        self.size = self.max_size
        self.desc = self.avail = self.used = 0
        self.enabled = self.ready = False
        self.indirect = self.event_idx = False  # features
        self._next_avail = self._next_used = self._signalled = 0
        self._rings: Any = None

    def start(self, features: int) -> None:
        """Begin to use the rings; raises QueueError or GuestMemoryError when they cannot be where the driver says."""
        size = self.size
        if size & (size - 1) or not 0 < size <= self.max_size:
            raise QueueError(f"queue {self.index}: size {size}")
        for name, address, alignment in (("desc", self.desc, 16), ("avail", self.avail, 2), ("used", self.used, 4)):
            if not address:
                raise QueueError(f"queue {self.index}: enabled without an address of {name}")
            if address % alignment:
                raise QueueError(f"queue {self.index}: {name} at {address:#x} is not aligned to {alignment}")
        window = self.mem.window
        self._rings = (
            window(self.desc, 16 * size),
            window(self.avail, 6 + 2 * size).cast("H"),
            window(self.used, 6 + 8 * size),
            window(self.used, 6 + 8 * size).cast("H"),
        )
        self.indirect = bool(features & F.INDIRECT_DESC)
        self.event_idx = bool(features & F.EVENT_IDX)
        self._rings[3][0] = 0  # 2.7.8: the device wants to be told of every buffer
        self._ask_for_kick()
        self.ready = True

    def stop(self) -> None:
        """Leave the rings alone from now on."""
        self.ready = False
        self._rings = None

    # For devices.

    def available(self) -> Iterator[Chain]:
        """Chains that the driver has made available, at most one round of the queue; none while it is not ready."""
        self.more = False
        for _ in range(self.size):
            chain = self.pop()
            if chain is None:
                return
            yield chain
        self.more = True

    def pop(self) -> Chain | None:
        """The next chain; None when there is none, and then the driver will kick for the next one.

        Raises QueueError or GuestMemoryError.
        """
        if not self.ready:
            return None
        avail = self._rings[1]
        if avail[1] == self._next_avail:
            self._ask_for_kick()
            if avail[1] == self._next_avail:
                return None
        count = avail[1] - self._next_avail & 0xFFFF
        under_way = self._next_avail - self._next_used & 0xFFFF
        if count + under_way > self.size:  # a driver reuses an entry only when it is back (2.7.13)
            raise QueueError(f"queue {self.index}: {count} available and {under_way} under way, it has {self.size}")
        head = avail[2 + self._next_avail % self.size]
        self._next_avail = self._next_avail + 1 & 0xFFFF
        return self._chain(head)

    def undo_pop(self) -> None:
        """Put the chain back that was popped last: there is nothing to do with it yet. Again: the one before it."""
        self._next_avail = self._next_avail - 1 & 0xFFFF

    def push(self, *chains: Chain) -> None:
        """Give chains back with their `written` bytes, all at the same moment; a no-op after the queue has stopped."""
        if not self.ready:
            return
        _, _, used, numbers = self._rings
        for chain in chains:
            struct.pack_into("<II", used, 4 + 8 * (self._next_used % self.size), chain.head, chain.written)
            self._next_used = self._next_used + 1 & 0xFFFF
        numbers[1] = self._next_used  # last, in one store: from here on the entries are the driver's (2.7.8.2)

    def signal(self) -> None:
        """Interrupt the driver if it wants to hear of what was pushed since the last call (2.7.7)."""
        if not self.ready or self._next_used == self._signalled:
            return
        with self._barrier:
            pass
        avail = self._rings[1]
        if self.event_idx:
            used_event = avail[2 + self.size]
            news = self._next_used - self._signalled & 0xFFFF
            wanted = (self._next_used - used_event - 1 & 0xFFFF) < news
        else:
            wanted = not avail[0] & NO_INTERRUPT
        self._signalled = self._next_used
        if wanted:
            self.interrupt(self)

    # For the twin, which does in C what `pop` and `push` do.

    @property
    def rings(self) -> tuple[memoryview, memoryview, memoryview]:
        """The bytes of descriptors, available ring and used ring; for a queue that is ready."""
        desc, avail, used, _ = self._rings
        return desc, avail.cast("B"), used

    @property
    def positions(self) -> tuple[int, int, int]:
        """Of the next entry in the available ring, of the next one in the used ring, and of the one there up to which
        the driver has been told, all modulo 2^16."""
        return self._next_avail, self._next_used, self._signalled

    @positions.setter
    def positions(self, positions: tuple[int, int, int]) -> None:
        self._next_avail, self._next_used, self._signalled = positions

    # State.

    def state(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "addresses": [self.desc, self.avail, self.used],
            "enabled": self.enabled,
            "ready": self.ready,
            "next": [self._next_avail, self._next_used, self._signalled],
        }

    def restore(self, state: dict[str, Any], features: int) -> None:
        """Take back what `state` gave, for a guest whose RAM is as it was then; raises ValueError, QueueError."""
        self.reset()
        try:
            self.size = int(state["size"])
            self.desc, self.avail, self.used = map(int, state["addresses"])
            positions = [int(position) & 0xFFFF for position in state["next"]]
            self.enabled, ready = bool(state["enabled"]), bool(state["ready"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"queue {self.index}: state has no usable {error}") from None
        self._next_avail, self._next_used, self._signalled = positions
        if ready:
            self.start(features)

    # Inside.

    def _ask_for_kick(self) -> None:
        """Let the driver kick for the next entry it makes available; then look again: it may just have (2.7.10)."""
        if self.event_idx:
            self._rings[3][2 + 4 * self.size] = self._next_avail  # avail_event, behind the used ring
        with self._barrier:
            pass

    def _chain(self, head: int) -> Chain:
        """The chain of descriptors that begins with `head`, each read once."""
        table, size, at = self._rings[0], self.size, head
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        unpack, window = DESC.unpack_from, self.mem.window
        total, in_indirect = 0, False
        for _ in range(2 * self.size):  # chained descriptors, then those of one indirect table
            if at >= size:
                raise QueueError(f"queue {self.index}: descriptor {at} of {size}")
            address, length, flags, following = unpack(table, 16 * at)
            if flags & DESC_F.INDIRECT:
                if not self.indirect or in_indirect or flags & DESC_F.NEXT or length % 16 or not length:
                    raise QueueError(f"queue {self.index}: bad indirect descriptor (flags {flags:#x}, {length} bytes)")
                in_indirect, at, size = True, 0, length // 16
                if size > self.size:
                    raise QueueError(f"queue {self.index}: indirect table of {size} descriptors")
                table = window(address, length)
                continue
            total += length
            if total > MAX_CHAIN_BYTES:
                raise QueueError(f"queue {self.index}: chain of more than 4 GiB")
            if not flags & DESC_F.WRITE and writable:
                raise QueueError(f"queue {self.index}: a readable descriptor behind a writable one")
            (writable if flags & DESC_F.WRITE else readable).append(window(address, length))
            if len(readable) + len(writable) > self.size:
                break
            if not flags & DESC_F.NEXT:
                return Chain(head, readable, writable)
            at = following
        raise QueueError(f"queue {self.index}: chain of more than {self.size} descriptors")
