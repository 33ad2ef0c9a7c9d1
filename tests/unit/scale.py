"""How much of what is made at random a run has: KVMPY_HOSTILE=N has N times as much."""

from __future__ import annotations

import os

SCALE = max(1, int(os.environ.get("KVMPY_HOSTILE", "0")))


def examples(count: int) -> int:
    """`count` in every run, more where that is asked for."""
    return count * SCALE
