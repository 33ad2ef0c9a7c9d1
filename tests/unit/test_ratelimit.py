"""Limits on operations and bytes per second."""

from __future__ import annotations

import pytest

from kvmpy.core.errors import ConfigError
from kvmpy.core.ratelimit import BURST, LEAST_WAIT, RateLimit, TokenBucket, parse_bandwidth
from kvmpy.core.regs import Device
from kvmpy.testing import StepLoop


class Owner(Device):
    """Counts how often it may go on."""

    resumed = 0

    def resume(self) -> None:
        assert self.lock.locked()
        self.resumed += 1


@pytest.mark.parametrize(
    ("text", "bytes_per_second"), [("1", 1), ("512K", 512 << 10), ("10M", 10 << 20), ("2g", 2 << 30)]
)
def test_bandwidth(text: str, bytes_per_second: int) -> None:
    assert parse_bandwidth(text) == bytes_per_second


@pytest.mark.parametrize("text", ["", "0", "0M", "-1", "10 M", "10MB", "1.5M", "1_000", "\N{ARABIC-INDIC DIGIT ONE}"])
def test_bandwidth_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"10M"):
        parse_bandwidth(text)


def test_bucket_pays_its_debt_in_time() -> None:
    bucket = TokenBucket(1000, now=0.0)

    assert bucket.spend(int(1000 * BURST), now=0.0) == 0
    assert bucket.spend(500, now=0.0) == 0.5
    assert bucket.spend(0, now=0.25) == 0.25
    assert bucket.spend(0, now=0.5) == 0


def test_bucket_saves_up_only_so_much() -> None:
    bucket = TokenBucket(1000, now=0.0)

    assert bucket.spend(int(1000 * BURST) + 500, now=1e6) == 0.5


def test_both_limits_count() -> None:
    loop, owner = StepLoop(), Owner()
    limit = RateLimit(loop, owner, owner.resume, bandwidth=1000, iops=10)

    small = [limit.spend(1), limit.spend(1)]
    loop.advance(0.1)
    loop.advance(1)
    large = [limit.spend(1100)]
    loop.advance(0.9)
    early = owner.resumed
    loop.advance(0.1)

    assert (small, large) == ([True, False], [False])
    assert (early, owner.resumed) == (1, 2)
    assert not limit.waiting


def test_without_limits_nothing_waits() -> None:
    loop, owner = StepLoop(), Owner()
    limit = RateLimit(loop, owner, owner.resume, bandwidth=None, iops=None)

    assert all(limit.spend(1 << 40) for _ in range(100))


def test_small_operations_go_in_batches() -> None:
    """Not a timer for each: the loop rests for some milliseconds, and the mean is kept."""
    loop, owner = StepLoop(), Owner()
    limit = RateLimit(loop, owner, owner.resume, bandwidth=None, iops=10_000)
    count = 0

    for _ in range(1000):
        while not limit.waiting:
            limit.spend(1)
            count += 1
        loop.advance(LEAST_WAIT)

    assert owner.resumed == 1000
    assert count == pytest.approx(10_000 * (1000 * LEAST_WAIT + BURST), rel=0.01)
