"""Multiboot 1: both kinds of kernel, and the boot information byte by byte."""

from __future__ import annotations

import struct

import pytest
from images import MIB, TEXT, Load, elf, guest, kernel, multiboot_elf, multiboot_flat, multiboot_header

from kvmpy.boot import loader
from kvmpy.boot.spec import Mode
from kvmpy.core.errors import ConfigError, ImageError
from kvmpy.x86 import layout


@pytest.mark.parametrize("bits", [32, 64])
def test_elf_kernel(bits: int) -> None:
    mem, spec = guest()

    entry = loader.load(kernel(multiboot_elf(bits=bits)), mem, spec)

    assert (entry.protocol, entry.mode, entry.rip) == ("multiboot", Mode.PROTECTED, MIB + 12)
    assert entry.registers == {"rax": 0x2BADB002, "rbx": layout.MULTIBOOT_INFO}
    assert mem.read(MIB, 12 + len(TEXT)) == multiboot_header() + TEXT


def test_elf_kernel_in_the_higher_half() -> None:
    data = elf([Load(MIB, multiboot_header() + TEXT, vaddr=0xC0100000)], bits=32, entry=0xC010000C)
    mem, spec = guest()

    assert loader.load(kernel(data), mem, spec).rip == MIB + 12


def test_kernel_by_the_headers_addresses() -> None:
    mem, spec = guest()

    entry = loader.load(kernel(multiboot_flat()), mem, spec)

    assert (entry.protocol, entry.rip) == ("multiboot", MIB + 32)
    assert mem.read(MIB, len(multiboot_flat())) == multiboot_flat()


def test_addresses_choose_a_part_of_the_file() -> None:
    data = b"skip" * 4 + multiboot_flat(header_addr=MIB + 8, load_addr=MIB, load_end=MIB + 100, entry=MIB + 40)
    mem, spec = guest()

    loader.load(kernel(data), mem, spec)

    assert mem.read(MIB, 101) == data[8:108] + b"\0"


def test_boot_information() -> None:
    mem, spec = guest(64, cmdline="quiet", initrd=b"m" * 5000)

    loader.load(kernel(multiboot_elf()), mem, spec)

    # Multiboot Specification 0.6.96, 3.3, the drawing
    info = mem.read(layout.MULTIBOOT_INFO, 72)
    flags, lower, upper, device, cmdline, count, modules = struct.unpack_from("<IIIIIII", info)
    length, mmap = struct.unpack_from("<II", info, 44)
    (name,) = struct.unpack_from("<I", info, 64)
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (lower, upper, device, count) == (639, 63 * 1024, 0, 1)
    assert mem.read(cmdline, 6) == b"quiet\0"
    assert mem.read(name, 6) == b"kvmpy\0"
    start = 64 * MIB - 8192
    assert struct.unpack("<IIII", mem.read(modules, 16)) == (start, start + 5000, 0, 0)
    assert list(struct.iter_unpack("<IQQI", mem.read(mmap, length))) == [
        (20, span.base, span.size, span.type) for span in spec.e820
    ]


def test_without_initrd_there_is_no_module() -> None:
    mem, spec = guest()

    loader.load(kernel(multiboot_elf()), mem, spec)

    flags, *_, count, modules = struct.unpack("<IIIIIII", mem.read(layout.MULTIBOOT_INFO, 28))
    assert (flags & 1 << 3, count, modules) == (0, 0, 0)


def test_long_command_lines_are_fine() -> None:
    mem, spec = guest(cmdline="x" * 5000)

    loader.load(kernel(multiboot_elf()), mem, spec)

    assert mem.read(layout.CMDLINE, 5001) == b"x" * 5000 + b"\0"


def test_command_line_larger_than_its_place() -> None:
    mem, spec = guest(cmdline="x" * 65536)

    with pytest.raises(ConfigError, match="this kernel takes 65535"):
        loader.load(kernel(multiboot_elf()), mem, spec)


HIGH = 0xFFFFFFFF


@pytest.mark.parametrize(
    "data, message",
    [
        (elf(), "no Multiboot header in its first 8 KiB"),
        (elf(front=multiboot_header(checksum=1)), "no Multiboot header"),
        (elf(front=b"x" + multiboot_header()), "no Multiboot header"),  # not at a multiple of 4
        (elf(front=bytes(8192) + multiboot_header()), "no Multiboot header"),
        (multiboot_elf(flags=0x8), r"requires features that there are not \(flags 0x8\)"),
        (multiboot_header() + TEXT, "no addresses, and it is no ELF file"),
        (multiboot_flat()[:31], "the file ends within its Multiboot header"),
        (multiboot_flat(load_addr=MIB + 4), "load_addr 0x100004 is not where the file starts"),
        (multiboot_flat(load_addr=MIB - 4), "load_addr 0xffffc is not where the file starts"),
        (multiboot_flat(load_end=HIGH), r"wants 4293918719 bytes from 0x0, the file has \d+"),
        (multiboot_flat(load_end=MIB), "wants 0 bytes"),
        (multiboot_flat(load_end=1), "wants -1048575 bytes"),
        (multiboot_flat(entry=MIB - 1), "entry_addr 0xfffff is not in what is loaded"),
        (multiboot_flat(bss_end=HIGH), "the kernel needs guest memory .*, which is never RAM"),
        (multiboot_flat(bss_end=70 * MIB), "give at least --mem 70M"),
        (
            multiboot_flat(header_addr=0x8000, load_addr=0x8000, entry=0x8020),
            r"segment \[0x8000, .*\) covers the boot's own tables",
        ),
        (elf([Load(MIB, multiboot_header() + TEXT)], entry=5), "its entry 0x5 is in no segment below 4 GiB"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    mem, spec = guest(64)

    with pytest.raises(ImageError, match=message) as caught:
        loader.load(kernel(data), mem, spec, "multiboot")
    assert caught.value.remedy
