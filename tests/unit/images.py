"""Tiny kernel images, made byte by byte, with every header field open to tests."""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lz4.block
import zstandard

from kvmpy.boot.loader import KernelImage
from kvmpy.boot.spec import BootSpec
from kvmpy.core.memory import GuestMemory, Region
from kvmpy.x86 import layout

MIB = 1 << 20
BASE = 16 * MIB  # where Linux is linked to run
TEXT = b"\xf4\xeb\xfd" + bytes(range(256)) * 8  # hlt; jmp to it; and something to recognise
BANNER = b"Linux version 6.1.0-test (someone@somewhere) #1 SMP\n\0"
VERSION = b"6.1.0-test (someone@somewhere) #1 SMP\0"


@dataclass(frozen=True)
class Load:
    """A PT_LOAD segment."""

    paddr: int
    content: bytes
    memsz: int | None = None
    vaddr: int | None = None


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    """One ELF note, padded to 4 bytes."""
    pad = lambda data: data + bytes(-len(data) % 4)  # noqa: E731
    return struct.pack("<III", len(name), len(desc), kind) + pad(name) + pad(desc)


def pvh_note(entry: int = BASE) -> bytes:
    return note(b"Xen\0", 18, struct.pack("<Q", entry))


def elf(
    loads: Sequence[Load] = (Load(BASE, TEXT + BANNER, 3 * MIB),),
    *,
    bits: int = 64,
    entry: int = BASE,
    notes: bytes = b"",
    machine: int | None = None,
    kind: int = 2,
    front: bytes = b"",
) -> bytes:
    """An ELF executable with its segments one after the other; `front` comes between headers and segments."""
    ehsize, phentsize = (64, 56) if bits == 64 else (52, 32)
    count = len(loads) + bool(notes)
    at = ehsize + count * phentsize + len(front)
    programs, contents = b"", b""
    for load in [*loads, *([Load(0, notes)] if notes else [])]:
        vaddr = load.paddr if load.vaddr is None else load.vaddr
        memsz = len(load.content) if load.memsz is None else load.memsz
        type_ = 4 if notes and load.content is notes else 1
        offset, filesz = at + len(contents), len(load.content)
        if bits == 64:
            programs += struct.pack("<IIQQQQQQ", type_, 7, offset, vaddr, load.paddr, filesz, memsz, 4)
        else:
            programs += struct.pack("<IIIIIIII", type_, offset, vaddr, load.paddr, filesz, memsz, 7, 4)
        contents += load.content
    if machine is None:
        machine = 62 if bits == 64 else 3
    word = "Q" if bits == 64 else "I"
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        f"<HHI{word}{word}{word}IHHHHHH", kind, machine, 1, entry, ehsize, 0, 0, ehsize, phentsize, count, 0, 0, 0
    )
    return header + programs + front + contents


def pvh_elf(bits: int = 64) -> bytes:
    return elf(bits=bits, notes=pvh_note())


def multiboot_header(flags: int = 3, addresses: bytes = b"", checksum: int | None = None) -> bytes:
    total = -(0x1BADB002 + flags) & 0xFFFFFFFF
    return struct.pack("<III", 0x1BADB002, flags, total if checksum is None else checksum) + addresses


def multiboot_elf(flags: int = 3, bits: int = 32) -> bytes:
    return elf([Load(MIB, multiboot_header(flags) + TEXT, 2 * len(TEXT))], bits=bits, entry=MIB + 12)


def multiboot_flat(
    header_addr: int = MIB, load_addr: int = MIB, load_end: int = 0, bss_end: int = 0, entry: int = MIB + 32
) -> bytes:
    """A file that only the address fields of its Multiboot header describe."""
    addresses = struct.pack("<IIIII", header_addr, load_addr, load_end, bss_end, entry)
    return multiboot_header(0x10003, addresses) + TEXT


def boot_sector() -> bytes:
    return TEXT[:510] + b"\x55\xaa"


# Setup header fields that tests set: offset and format (Documentation/arch/x86/boot.rst).
FIELDS = {
    "setup_sects": (0x1F1, "B"),
    "syssize": (0x1F4, "I"),
    "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"),
    "header": (0x202, "I"),
    "version": (0x206, "H"),
    "kernel_version": (0x20E, "H"),
    "loadflags": (0x211, "B"),
    "code32_start": (0x214, "I"),
    "initrd_addr_max": (0x22C, "I"),
    "kernel_alignment": (0x230, "I"),
    "relocatable_kernel": (0x234, "B"),
    "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"),
    "payload_offset": (0x248, "I"),
    "payload_length": (0x24C, "I"),
    "pref_address": (0x258, "Q"),
    "init_size": (0x260, "I"),
    "handover_offset": (0x264, "I"),
}
PROTECTED = 1024  # where the protected-mode part of `bzimage` starts
PAYLOAD = 0x300  # offset of the payload in there


def bzimage(payload: bytes | None = None, **fields: int) -> bytes:
    """A bzImage around `payload` (default: a gzipped PVH kernel)."""
    if payload is None:
        payload = with_size("gzip", pvh_elf())
    protected = (b"\xf4" * PAYLOAD + payload).ljust(-(-(PAYLOAD + len(payload)) // 16) * 16, b"\0")
    values = {
        "setup_sects": 1,
        "syssize": len(protected) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "header": int.from_bytes(b"HdrS", "little"),
        "version": 0x20F,
        "kernel_version": 0x100,
        "loadflags": 1,
        "code32_start": MIB,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 2 * MIB,
        "relocatable_kernel": 1,
        "xloadflags": 0x7F,
        "cmdline_size": 2047,
        "payload_offset": PAYLOAD,
        "payload_length": len(payload),
        "pref_address": BASE,
        "init_size": 4 * MIB,
        "handover_offset": 0x190,
    } | fields
    setup = bytearray(PROTECTED)
    setup[:2] = b"MZ"
    setup[0x300 : 0x300 + len(VERSION)] = VERSION
    setup[0x1EF:0x1F1] = b"\xff\xff"  # the sentinel, which must not be copied
    for name, value in values.items():
        offset, code = FIELDS[name]
        struct.pack_into("<" + code, setup, offset, value)
    return bytes(setup) + protected


def _lz4(data: bytes) -> bytes:
    block = 8 * MIB
    parts = [lz4.block.compress(data[at : at + block], store_size=False) for at in range(0, len(data), block)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(part)) + part for part in parts)


def lzop(data: bytes) -> bytes:
    """An lzop file of stored blocks; for compressed ones the tests have golden files."""
    header = struct.pack(">HHHBBIIIIB", 0x1040, 0x20A0, 0x0940, 3, 9, 0x03000001, 0o100644, 0, 0, 0)
    parts = [b"\x89LZO\x00\r\n\x1a\n", header, struct.pack(">I", zlib.adler32(header))]
    for at in range(0, len(data), 256 << 10):
        block = data[at : at + (256 << 10)]
        parts.append(struct.pack(">III", len(block), len(block), zlib.adler32(block)) + block)
    return b"".join(parts) + bytes(4)


XZ_FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]  # as scripts/xz_wrap.sh
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=XZ_FILTERS),
    "lzo": lzop,
    "lz4": _lz4,
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(data),
}


def compress(name: str, data: bytes) -> bytes:
    return COMPRESSORS[name](data)


def with_size(name: str, data: bytes) -> bytes:
    """`data` compressed as kernel builds do: all formats but gzip with its size appended (scripts/Makefile.lib)."""
    return compress(name, data) + (b"" if name == "gzip" else struct.pack("<I", len(data)))


def guest(mib: int = 64, **fields: Any) -> tuple[GuestMemory, BootSpec]:
    """Fresh RAM below 3 GiB and the rest of a boot for it."""
    size = mib * MIB
    mem = GuestMemory([Region(0, memoryview(mmap.mmap(-1, size)))])
    return mem, BootSpec(size, layout.e820(size), **fields)


def kernel(data: bytes) -> KernelImage:
    """`data` as `loader.read_image` would give it."""
    return KernelImage("vmlinux", memoryview(data))
