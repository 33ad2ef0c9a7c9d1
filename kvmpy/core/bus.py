"""An address space of devices: the same class serves I/O ports and MMIO."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from .typed import Any, NamedTuple, Protocol

# A guest may touch every byte of every device: the memo of resolved addresses stays this small. Each takes 750 bytes;
# all registers of 300 devices have room.
MAX_RESOLVED = 1 << 14


class BusDevice(Protocol):
    """What a bus needs of a device. Values are integers; offsets count from the device's base.

    `lock` is held by the bus around `read` and `write`: a device never runs two of its methods at once. One whose lock
    is None sees to that itself.

    A device may also have `resolve(offset, size)`, for speed: see Slot.
    """

    @property
    def lock(self) -> AbstractContextManager[Any] | None: ...

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class Range(NamedTuple):
    """`device` answers [base, end)."""

    base: int
    end: int
    device: BusDevice


class Slot(NamedTuple):
    """A resolved access: everything that a read or write of one address and size needs.

    `resolve` of a device gives the first three; it is asked once for each offset and size, so what it gives must stay
    right as long as the device has its place.
    """

    read: Callable[[], int]
    write: Callable[[int], None]
    lock: AbstractContextManager[Any] | None
    mask: int


class Bus:
    """Address to device. Ranges never overlap; unmapped reads float high, unmapped writes vanish.

    An access belongs to the device that answers all of it. One that leaves its device is unmapped and never split:
    the dword that Linux writes to 0xcf8 to look for PCI must not reach the reset register at 0xcf9.
    `unmapped(address, size, value)` is told of every access that no device answers (value None for a read).
    """

    def __init__(
        self,
        name: str,
        unmapped: Callable[[int, int, int | None], None] | None = None,
        *,
        slots: dict[int, Slot] | None = None,
        tag: int = 0,
    ) -> None:
        """Buses may share `slots`, the memo of resolved accesses, by size | address << 4 | tag."""
        self.name = name
        self.ranges: list[Range] = []
        self.slots: dict[int, Slot] = {} if slots is None else slots
        self._tag = tag
        self._unmapped = unmapped
        self._changing = threading.Lock()  # a leaf: held while `ranges` is replaced

    def add(self, base: int, size: int, device: BusDevice) -> None:
        """Give [base, base+size) to `device`; raises ValueError when it is empty or any of it is taken."""
        new = Range(base, base + size, device)
        if base < 0 or size <= 0:
            raise ValueError(f"{self.name}: {type(device).__name__} at {base:#x}+{size:#x} has no address")
        with self._changing:
            for old in self.ranges:
                if new.base < old.end and old.base < new.end:
                    raise ValueError(
                        f"{self.name}: {type(device).__name__} at {base:#x}+{size:#x} overlaps "
                        f"{type(old.device).__name__} at {old.base:#x}+{old.end - old.base:#x}"
                    )
            # Replaced, not changed: a vCPU may be looking something up.
            self.ranges = sorted([*self.ranges, new], key=lambda r: r.base)

    def remove(self, base: int) -> None:
        """Take the device away that answers from `base` on; raises ValueError when there is none.

        An access that has found it already may still reach it, as on its way over a real bus.
        """
        with self._changing:
            kept = [old for old in self.ranges if old.base != base]
            if len(kept) == len(self.ranges):
                raise ValueError(f"{self.name}: nothing begins at {base:#x}")
            self.ranges = kept
            self.slots.clear()  # behind `ranges`: see _resolve

    def read(self, address: int, size: int) -> int:
        """The value at `address`, masked to `size` bytes."""
        slot = self.slots.get(size | address << 4 | self._tag) or self._resolve(address, size)
        if slot is None:
            if self._unmapped is not None:
                self._unmapped(address, size, None)
            return (1 << 8 * size) - 1
        read, _, lock, mask = slot
        if lock is None:
            return read() & mask
        with lock:
            return read() & mask

    def write(self, address: int, size: int, value: int) -> None:
        """Write the low `size` bytes of `value` at `address`."""
        slot = self.slots.get(size | address << 4 | self._tag) or self._resolve(address, size)
        if slot is None:
            if self._unmapped is not None:
                self._unmapped(address, size, value)
            return
        _, write, lock, mask = slot
        if lock is None:
            write(value & mask)
            return
        with lock:
            write(value & mask)

    def _resolve(self, address: int, size: int) -> Slot | None:
        """Find the device that answers all of the access; one that straddles its end is unmapped."""
        ranges = self.ranges
        index = bisect_right(ranges, address, key=lambda r: r.base) - 1
        if index < 0 or address + size > ranges[index].end:
            return None
        base, _, device = ranges[index]
        offset = address - base
        resolve = getattr(device, "resolve", None)
        if resolve is None:
            read, write, lock = partial(device.read, offset, size), partial(device.write, offset, size), device.lock
        else:
            read, write, lock = resolve(offset, size)
        slot = Slot(read, write, lock, (1 << 8 * size) - 1)
        if len(self.slots) < MAX_RESOLVED:
            key = size | address << 4 | self._tag
            self.slots[key] = slot
            if self.ranges is not ranges:  # the device may have gone meanwhile: what it left must not be remembered
                self.slots.pop(key, None)
        return slot
