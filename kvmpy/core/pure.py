"""Whether Python does everything itself: with KVMPY_PURE=1 in the environment, no hot path goes to its twin in C."""

from __future__ import annotations

import os

PURE = os.environ.get("KVMPY_PURE", "") not in ("", "0")
