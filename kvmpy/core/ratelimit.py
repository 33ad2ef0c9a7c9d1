"""Limits on operations and bytes per second, as token buckets.

    limit = RateLimit(board.loop, device, resume, bandwidth=parse_bandwidth("10M"), iops=100)
    ...
    if limit.waiting or not limit.spend(size):
        return                                   # `resume` is called when more may follow

An operation may begin while no bucket is in debt and is paid for afterwards: its size need not be known before, one
that is larger than a bucket passes all the same, and the mean is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .errors import ConfigError
from .events import EventLoop

BURST = 0.1  # seconds: what a bucket saves up while nothing happens
LEAST_WAIT = 0.005  # seconds: small operations go in batches after it, or each would cost a timer; shorter than a burst
UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
BANDWIDTH = re.compile(r"([0-9]{1,15})([KMG]?)", re.ASCII | re.IGNORECASE)


def parse_bandwidth(text: str | int) -> int:
    """Bytes per second meant by `10M`, `512K` or a bare number of bytes; raises ConfigError."""
    match = BANDWIDTH.fullmatch(str(text))
    if match is None or not int(match[1]):
        raise ConfigError(f'invalid bandwidth "{text}"', "give bytes per second, e.g. 10M or 512K")
    return int(match[1]) << UNITS[match[2].upper()]


class TokenBucket:
    """Gets `rate` tokens a second and holds `burst` seconds' worth of them, at least one."""

    def __init__(self, rate: int, now: float, burst: float = BURST) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate * burst)
        self._tokens = self._capacity
        self._filled = now

    def spend(self, amount: int, now: float) -> float:
        """Take `amount` tokens, on credit if need be; returns the seconds until the debt is paid, 0 without one."""
        self._tokens = min(self._capacity, self._tokens + (now - self._filled) * self._rate) - amount
        self._filled = now
        return max(0.0, -self._tokens / self._rate)


class RateLimit:
    """Both limits of one device. Called with the owner's lock held; so is `resume`, on the event loop."""

    def __init__(
        self,
        loop: EventLoop,
        owner: Any,
        resume: Callable[[], None],
        *,
        bandwidth: int | None,
        iops: int | None,
        burst: float = BURST,
    ) -> None:
        """`bandwidth` in bytes per second, `iops` in operations per second (None: no limit), `burst` in seconds."""
        self._loop, self._owner, self._resume = loop, owner, resume
        now = loop.time()
        self._bytes = None if bandwidth is None else TokenBucket(bandwidth, now, burst)
        self._operations = None if iops is None else TokenBucket(iops, now, burst)
        self.limited = self._bytes is not None or self._operations is not None
        self.waiting = False  # nothing may begin until `resume` is called

    def spend(self, size: int) -> bool:
        """Account for an operation of `size` bytes; False when the next one has to wait for `resume`."""
        now = self._loop.time()
        wait = self._operations.spend(1, now) if self._operations is not None else 0.0
        if self._bytes is not None:
            wait = max(wait, self._bytes.spend(size, now))
        if wait > 0:
            self.waiting = True
            self._loop.after(max(wait, LEAST_WAIT), self._paid, owner=self._owner)
        return not wait

    def _paid(self) -> None:
        self.waiting = False
        self._resume()
