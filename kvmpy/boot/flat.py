"""Starts a flat image in real mode, the way a BIOS starts a boot sector.

There is one address for all of them, so that there is one thing to learn: the file goes, whole, to 0000:7C00, all
segments are 0, the stack grows down from there, DL is 0x80. Link or assemble with origin 0x7c00. (kvmtool starts flat
files at 1000:0000 instead; code that is position-independent within 64 KiB runs at both.) There is no BIOS.
"""

from __future__ import annotations

from ..core.errors import ConfigError, ImageError
from ..core.memory import GuestMemory
from ..x86 import layout
from .placement import require_ram
from .spec import BootSpec, EntryPoint, Mode

MAX = layout.EBDA - layout.BOOT_SECTOR  # the rest of conventional memory
FIRST_DISK = 0x80  # what a BIOS has in DL when it starts a boot sector


def has_boot_signature(data: memoryview) -> bool:
    return bytes(data[510:512]) == b"\x55\xaa"


def check(data: memoryview) -> None:
    """Raises ImageError for what cannot be a flat image."""
    if not data:
        raise ImageError("the file is empty", "give a kernel with --kernel")
    if len(data) > MAX:
        raise ImageError(
            f"a flat image of {len(data)} bytes, conventional memory has room for {MAX}",
            "if it is a disk image, give the kernel that is on it instead: there is no BIOS to read disks",
        )


def load(data: memoryview, mem: GuestMemory, spec: BootSpec) -> EntryPoint:
    """`data` to guest memory. Flat images are handed no command line; an initrd is refused with ConfigError."""
    if spec.initrd:
        raise ConfigError("a flat image takes no initrd", "leave --initrd out")
    require_ram(mem, layout.BOOT_SECTOR, len(data), "the image")
    mem.write(layout.BOOT_SECTOR, data)
    return EntryPoint("flat", Mode.REAL, layout.BOOT_SECTOR, {"rsp": layout.BOOT_SECTOR, "rdx": FIRST_DISK})
