"""Sizes as people write them."""

from __future__ import annotations

import re

from .errors import ConfigError

UNITS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
SIZE = re.compile(r"(?P<number>[0-9]{1,18})(?P<unit>[BKMGT]?)(?:I?B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes meant by `512M`, `2G`, `4096K` or a bare number, which counts MiB; raises ConfigError."""
    match = SIZE.fullmatch(str(text))
    if match is None:
        raise ConfigError(f'invalid size "{text}"', "use e.g. 512M or 2G")
    return int(match["number"]) << UNITS[(match["unit"] or "M").upper()]
