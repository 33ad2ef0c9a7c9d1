"""Enters an ELF kernel at its PVH entry (xen/include/public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc)."""

from __future__ import annotations

from ..core.errors import ImageError
from ..core.memory import GuestMemory
from ..core.wire import Wire, u32, u64
from ..x86 import layout
from .bzimage import BzImage
from .cmdline import LINUX_LIMIT
from .elf import Elf
from .placement import put_cmdline, put_initrd, put_segments, put_table
from .spec import BootSpec, EntryPoint, Mode

XEN_HVM_START_MAGIC_VALUE = 0x336EC578


class StartInfo(Wire):
    """struct hvm_start_info, version 1."""

    magic: u32
    version: u32
    flags: u32
    nr_modules: u32
    modlist_paddr: u64
    cmdline_paddr: u64
    rsdp_paddr: u64
    memmap_paddr: u64
    memmap_entries: u32
    reserved: u32


class Module(Wire):
    """struct hvm_modlist_entry."""

    paddr: u64
    size: u64
    cmdline_paddr: u64
    reserved: u64


class MemoryMapEntry(Wire):
    """struct hvm_memmap_table_entry."""

    addr: u64
    size: u64
    type: u32
    reserved: u32


MODULES = layout.PVH_START_INFO + StartInfo.SIZE
MEMORY_MAP = MODULES + Module.SIZE
MEMORY_MAP_MAX = (layout.PVH_START_INFO + layout.PAGE - MEMORY_MAP) // MemoryMapEntry.SIZE


def check(elf: Elf) -> int:
    """The PVH entry; raises ImageError when there is none."""
    if elf.pvh_entry is None:
        raise ImageError("a kernel without PVH entry", "use --boot linux64, or build it with CONFIG_PVH")
    return elf.pvh_entry


def load(elf: Elf, source: BzImage | None, mem: GuestMemory, spec: BootSpec) -> EntryPoint:
    """`elf` to guest memory, with start info; `source` is the bzImage it came in, when there is one."""
    entry = check(elf)
    put_segments(mem, elf.segments)
    base, size = put_initrd(mem, spec, elf.end)
    line = put_cmdline(mem, spec, source.cmdline_limit if source else LINUX_LIMIT)
    if len(spec.e820) > MEMORY_MAP_MAX:
        raise ValueError(f"{len(spec.e820)} memory map entries, the page has room for {MEMORY_MAP_MAX}")
    info = StartInfo(
        magic=XEN_HVM_START_MAGIC_VALUE,
        version=1,
        flags=0,
        nr_modules=1 if size else 0,
        modlist_paddr=MODULES if size else 0,
        cmdline_paddr=line,
        rsdp_paddr=spec.rsdp,
        memmap_paddr=MEMORY_MAP,
        memmap_entries=len(spec.e820),
        reserved=0,
    )
    memory_map = b"".join(bytes(MemoryMapEntry(span.base, span.size, span.type, 0)) for span in spec.e820)
    put_table(mem, layout.PVH_START_INFO, bytes(info) + bytes(Module(base, size, 0, 0)) + memory_map)
    return EntryPoint("pvh", Mode.PROTECTED, entry, {"rbx": layout.PVH_START_INFO})
