"""Sizes and times as people write them."""

from __future__ import annotations

import re

from .errors import ConfigError

UNITS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
SIZE = "([0-9]{1,18})([BKMGT]?)(I?B)?"  # in capitals


def parse_size(text: str | int) -> int:
    """Bytes meant by `512M`, `2G`, `4096K` or a bare number, which counts MiB; raises ConfigError."""
    match = re.fullmatch(SIZE, str(text).upper() if str(text).isascii() else "")
    if match is None:
        raise ConfigError(f'invalid size "{text}"', "use e.g. 512M or 2G")
    return int(match[1]) << UNITS[match[2] or "M"]


def parse_seconds(text: str | None) -> float | None:
    """A time limit in seconds, None for none; raises ConfigError."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text, re.ASCII) or float(text) == 0:
        raise ConfigError(f'invalid time limit "{text}"', "use seconds, e.g. 10 or 0.5")
    return float(text)
