"""Whether the compiled twins of Python code stay unused, because the environment says KVMPY_PURE=1."""

from __future__ import annotations

import os

PURE = os.environ.get("KVMPY_PURE", "") not in ("", "0")
