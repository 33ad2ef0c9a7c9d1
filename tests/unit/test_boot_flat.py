"""Flat real-mode images."""

from __future__ import annotations

import pytest
from images import TEXT, boot_sector, guest, kernel

from kvmpy.boot import loader
from kvmpy.boot.spec import Mode
from kvmpy.core.errors import ConfigError, ImageError


def test_boot_sector_is_found_and_started_at_0x7c00() -> None:
    mem, spec = guest(1)

    entry = loader.load(kernel(boot_sector()), mem, spec)

    assert (entry.protocol, entry.mode, entry.rip) == ("flat", Mode.REAL, 0x7C00)
    assert entry.registers == {"rsp": 0x7C00, "rdx": 0x80}
    assert mem.read(0x7C00, 513) == boot_sector() + b"\0"


def test_anything_is_started_when_asked_for() -> None:
    mem, spec = guest(1)

    loader.load(kernel(TEXT), mem, spec, "flat")

    assert mem.read(0x7C00, len(TEXT)) == TEXT


def test_conventional_memory_is_the_limit() -> None:
    mem, spec = guest(1)
    largest = b"x" * (0x9FC00 - 0x7C00)

    loader.load(kernel(largest), mem, spec, "flat")
    with pytest.raises(ImageError, match="of 622593 bytes, conventional memory has room for 622592; if it is a disk"):
        loader.load(kernel(largest + b"x"), mem, spec, "flat")

    assert mem.read(0x9FBFF, 2) == b"x\0"


def test_empty() -> None:
    mem, spec = guest(1)

    with pytest.raises(ImageError, match="the file is empty"):
        loader.load(kernel(b""), mem, spec, "flat")


def test_initrd_is_refused() -> None:
    mem, spec = guest(1, initrd=b"x")

    with pytest.raises(ConfigError, match="a flat image takes no initrd; leave --initrd out"):
        loader.load(kernel(boot_sector()), mem, spec)
