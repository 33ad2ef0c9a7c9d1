"""Enters an ELF kernel at its 64-bit entry, as Linux's own decompressor does (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

from ..core.errors import ImageError
from ..core.memory import GuestMemory
from ..x86 import layout
from .bzimage import BzImage
from .cmdline import LINUX_LIMIT
from .elf import Elf
from .params import minimal_header, put_zero_page
from .placement import put_cmdline, put_initrd, put_segments
from .spec import BootSpec, EntryPoint, Mode


def check(elf: Elf) -> None:
    """Raises ImageError for an ELF file that cannot be entered in 64-bit mode."""
    if elf.bits != 64:
        raise ImageError("a 32-bit ELF file has no 64-bit entry", "use a 64-bit kernel, or one with a PVH entry")
    if not elf.contains(elf.entry):
        raise ImageError(f"its entry {elf.entry:#x} is in no segment", "link it with the physical address as entry")


def load(elf: Elf, source: BzImage | None, mem: GuestMemory, spec: BootSpec) -> EntryPoint:
    """`elf` to guest memory, with the setup header of `source`, the bzImage it came in, when there is one."""
    put_segments(mem, elf.segments)
    initrd = put_initrd(mem, spec, elf.end, source.initrd_ceiling if source else layout.HOLE)
    line = put_cmdline(mem, spec, source.cmdline_limit if source else LINUX_LIMIT)
    put_zero_page(mem, spec, source.header if source else minimal_header(), line, initrd)
    return EntryPoint("linux64", Mode.LONG, elf.entry, {"rsi": layout.ZERO_PAGE, "rsp": layout.BOOT_STACK})
