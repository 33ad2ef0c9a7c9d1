"""Enters a Multiboot kernel (Multiboot Specification, version 0.6.96)."""

from __future__ import annotations

import struct

from ..core.errors import ImageError
from ..core.memory import GuestMemory
from ..core.record import Record
from ..core.wire import Wire, b16, u32, u64
from ..x86 import layout
from . import elf
from .placement import Segment, check_segments, put_cmdline, put_initrd, put_segments, put_table
from .spec import BootSpec, EntryPoint, Mode

SEARCH = 8192  # 3.1: the header is in the first 8 KiB, at a multiple of 4
SEARCH_2, HEADER_MAGIC_2 = 32768, struct.pack("<I", 0xE85250D6)  # of Multiboot 2
HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002  # in EAX
REBUILD = "fix the Multiboot header and build the kernel again"
LOADER_NAME = b"kvmpy\0"

# 3.1.2: what a kernel may require of its loader. Page-aligned modules and memory information are always given, a
# graphics mode never: there is a serial console only, and kernels are to look whether they got what they prefer.
UNDERSTOOD = 0x0007
ADDRESSES = 1 << 16  # the header's address fields are valid

INFO_MEMORY, INFO_CMDLINE, INFO_MODULES = 1 << 0, 1 << 2, 1 << 3
INFO_MEMORY_MAP, INFO_LOADER_NAME = 1 << 6, 1 << 9


class Addresses(Wire):
    """3.1.3: the address fields, which follow magic, flags and checksum."""

    header_addr: u32
    load_addr: u32
    load_end_addr: u32
    bss_end_addr: u32
    entry_addr: u32


class Info(Wire):
    """3.3: boot information, up to the last field that is given."""

    flags: u32
    mem_lower: u32
    mem_upper: u32
    boot_device: u32
    cmdline: u32
    mods_count: u32
    mods_addr: u32
    syms: b16
    mmap_length: u32
    mmap_addr: u32
    drives_length: u32
    drives_addr: u32
    config_table: u32
    boot_loader_name: u32


class Module(Wire):
    """3.3: one element of the module list."""

    mod_start: u32
    mod_end: u32
    string: u32
    reserved: u32


class MemoryMapEntry(Wire):
    """3.3: one element of the memory map; `size` does not count itself."""

    size: u32
    base_addr: u64
    length: u64
    type: u32


MODULES = layout.MULTIBOOT_INFO + 0x80
NAME = layout.MULTIBOOT_INFO + 0x90
MEMORY_MAP = layout.MULTIBOOT_INFO + 0xA0
MEMORY_MAP_MAX = (layout.PAGE - 0xA0) // MemoryMapEntry.SIZE


class Multiboot(Record, frozen=True):
    """A checked Multiboot kernel."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        return max(segment.end for segment in self.segments)


def find(data: memoryview) -> int | None:
    """Where in the file the Multiboot header is."""
    head = bytes(data[: SEARCH + 8])
    magic = struct.pack("<I", HEADER_MAGIC)
    at = head.find(magic)
    while 0 <= at < SEARCH and at + 12 <= len(head):
        _, flags, checksum = struct.unpack_from("<III", head, at)
        if at % 4 == 0 and (HEADER_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
            return at
        at = head.find(magic, at + 1)
    return None


def is_version_2(data: memoryview) -> bool:
    """Whether there is a header of Multiboot 2 (its specification, 3.1.1), which this module does not know."""
    head = bytes(data[:SEARCH_2])
    at = head.find(HEADER_MAGIC_2)
    return at >= 0 and at % 8 == 0


def parse(data: memoryview) -> Multiboot:
    """Raises ImageError for a file without Multiboot header, or with one that cannot be followed."""
    at = find(data)
    if at is None:
        raise ImageError("no Multiboot header in its first 8 KiB", "use another --boot, or add the header")
    (flags,) = struct.unpack_from("<I", data, at + 4)
    if unknown := flags & 0xFFFF & ~UNDERSTOOD:
        raise ImageError(f"its Multiboot header requires features that there are not (flags {unknown:#x})", REBUILD)
    if flags & ADDRESSES:
        return _by_addresses(data, at)
    if not elf.is_elf(data):
        raise ImageError("its Multiboot header has no addresses, and it is no ELF file", REBUILD)
    image = elf.parse(data)
    entry = image.physical_entry()
    if entry >= 1 << 32 or not image.contains(entry):
        raise ImageError(f"its entry {entry:#x} is in no segment below 4 GiB", "link it with a physical entry address")
    return Multiboot(entry, image.segments)


def _by_addresses(data: memoryview, at: int) -> Multiboot:
    """3.1.3: the file as the header's address fields say, whatever its format."""
    try:
        fields = Addresses.read(data, at + 12)
    except struct.error:
        raise ImageError("the file ends within its Multiboot header", REBUILD) from None
    start = at - (fields.header_addr - fields.load_addr)
    length = fields.load_end_addr - fields.load_addr if fields.load_end_addr else len(data) - start
    if fields.header_addr < fields.load_addr or start < 0:
        raise ImageError(f"its Multiboot load_addr {fields.load_addr:#x} is not where the file starts", REBUILD)
    if length <= 0 or start + length > len(data):
        raise ImageError(
            f"its Multiboot header wants {length} bytes from {start:#x}, the file has {len(data)}", REBUILD
        )
    size = max(length, fields.bss_end_addr - fields.load_addr)
    segment = Segment(fields.load_addr, data[start : start + length], size)
    check_segments([segment])
    if not segment.base <= fields.entry_addr < segment.base + length:
        raise ImageError(f"its Multiboot entry_addr {fields.entry_addr:#x} is not in what is loaded", REBUILD)
    return Multiboot(fields.entry_addr, (segment,))


def load(image: Multiboot, mem: GuestMemory, spec: BootSpec) -> EntryPoint:
    """`image` to guest memory, with the boot information; the initrd is the one module."""
    put_segments(mem, image.segments)
    base, size = put_initrd(mem, spec, image.end)
    line = put_cmdline(mem, spec, layout.CMDLINE_MAX - 1)
    if len(spec.e820) > MEMORY_MAP_MAX:
        raise ValueError(f"{len(spec.e820)} memory map entries, the page has room for {MEMORY_MAP_MAX}")
    low = min(spec.ram_size, layout.HOLE)
    info = Info(
        flags=INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER_NAME | (INFO_MODULES if size else 0),
        mem_lower=layout.EBDA // layout.KIB,
        mem_upper=(low - layout.HIGH_RAM) // layout.KIB,
        boot_device=0,
        cmdline=line,
        mods_count=1 if size else 0,
        mods_addr=MODULES if size else 0,
        syms=bytes(16),
        mmap_length=len(spec.e820) * MemoryMapEntry.SIZE,
        mmap_addr=MEMORY_MAP,
        drives_length=0,
        drives_addr=0,
        config_table=0,
        boot_loader_name=NAME,
    )
    put_table(mem, layout.MULTIBOOT_INFO, bytes(info))
    put_table(mem, MODULES, bytes(Module(base, base + size, 0, 0)))
    put_table(mem, NAME, LOADER_NAME)
    for index, span in enumerate(spec.e820):
        entry = MemoryMapEntry(MemoryMapEntry.SIZE - 4, span.base, span.size, span.type)
        put_table(mem, MEMORY_MAP + index * MemoryMapEntry.SIZE, bytes(entry))
    registers = {"rax": LOADER_MAGIC, "rbx": layout.MULTIBOOT_INFO}
    return EntryPoint("multiboot", Mode.PROTECTED, image.entry, registers)
