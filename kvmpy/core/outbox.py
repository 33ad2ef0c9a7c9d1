"""Output bytes on their way from a guest's registers to a reader on another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .typed import Protocol

NEWLINE = 0x0A


class Outbox(Protocol):
    """Never blocks the writer. The reader is woken for the first byte, and again when it should not wait for more."""

    def put(self, data: bytes) -> bool:
        """Take all of `data`; False when that was the last that fits until the host has taken half the limit."""

    def waiting(self) -> tuple[int, bool]:
        """How many bytes `take` would give, and whether they may wait for more."""

    def take(self) -> bytes:
        """All bytes there are; the next one wakes the reader again."""

    def sent(self, count: int) -> bool:
        """The host has taken `count` bytes: whether a full outbox has room again."""

    @property
    def under_way(self) -> int:
        """Bytes that the host has not taken."""


class PlainOutbox:
    """The reference of kvm/fast.py's. Full at `limit` bytes under way; `wake` is called without the lock.

    Bytes wait for more until there are `batch` of them, or the end of a line.
    """

    def __init__(self, limit: int, batch: int, wake: Callable[[], None]) -> None:
        self.under_way = 0
        self._limit, self._batch, self._wake = limit, batch, wake
        self._data = bytearray()
        self._lingers = self._called = self._full = False
        self._lock = threading.Lock()

    def put(self, data: bytes) -> bool:
        with self._lock:
            self._data += data
            self.under_way += len(data)
            self._full = self._full or self.under_way >= self._limit
            room = not self._full
            wake = False
            if not self._called:
                self._called = len(self._data) >= self._batch or NEWLINE in data
                wake = self._called or not self._lingers
                self._lingers = True
        if wake:
            self._wake()
        return room

    def waiting(self) -> tuple[int, bool]:
        with self._lock:
            return len(self._data), self._lingers and not self._called

    def take(self) -> bytes:
        with self._lock:
            data, self._data = bytes(self._data), bytearray()
            self._lingers = self._called = False
        return data

    def sent(self, count: int) -> bool:
        with self._lock:
            self.under_way = max(0, self.under_way - count)
            drained = self._full and self.under_way <= self._limit // 2
            if drained:
                self._full = False
        return drained
