"""Sizes and times as people write them."""

from __future__ import annotations

from .errors import ConfigError

SHIFTS = {"": 20, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
UNITS = {letter + tail: shift for tail in ("IB", "B", "") for letter, shift in SHIFTS.items()}  # B is the byte
DIGITS = 18  # the most that a size has


def parse_size(text: str | int) -> int:
    """Bytes meant by `512M`, `2G`, `4096K` or a bare number, which counts MiB; raises ConfigError."""
    words = str(text).upper() if str(text).isascii() else ""
    unit = words.lstrip("0123456789")
    number = words.removesuffix(unit)
    if not is_decimal(number, DIGITS) or unit not in UNITS:
        raise ConfigError(f'invalid size "{text}"', "use e.g. 512M or 2G")
    return int(number) << UNITS[unit]


def is_decimal(text: str, digits: int) -> bool:
    """Whether it is a number of at most so many digits, 0 to 9, and nothing else."""
    return text.isascii() and text.isdecimal() and len(text) <= digits


def parse_seconds(text: str | None, *, zero: bool = False) -> float | None:
    """A time limit in seconds, None for none; raises ConfigError, for 0 too unless that means something."""
    if text is None:
        return None
    whole, point, part = text.partition(".")
    if not is_decimal(whole, 9) or (point and not is_decimal(part, 9)) or (float(text) == 0 and not zero):
        raise ConfigError(f'invalid time limit "{text}"', "use seconds, e.g. 10 or 0.5")
    return float(text)
