"""The PVH boot: start info byte by byte, and the ELF kernel in memory."""

from __future__ import annotations

import struct

import pytest
from images import BANNER, BASE, MIB, TEXT, elf, guest, kernel, pvh_elf

from kvmpy.boot import loader
from kvmpy.boot.spec import Mode
from kvmpy.core.errors import ConfigError, ImageError
from kvmpy.x86 import layout


@pytest.mark.parametrize("bits", [32, 64])
def test_entry(bits: int) -> None:
    mem, spec = guest()

    entry = loader.load(kernel(pvh_elf(bits)), mem, spec)

    assert (entry.protocol, entry.mode, entry.rip) == ("pvh", Mode.PROTECTED, BASE)
    assert entry.registers == {"rbx": layout.PVH_START_INFO}
    assert mem.read(BASE, len(TEXT + BANNER)) == TEXT + BANNER


def test_start_info() -> None:
    mem, spec = guest(64, cmdline="quiet", initrd=b"i" * 5000, rsdp=0xE0000)

    loader.load(kernel(pvh_elf()), mem, spec, "pvh")

    # xen/include/public/arch-x86/hvm/start_info.h, the drawing in its comment
    info = layout.PVH_START_INFO
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = struct.unpack(
        "<IIIIQQQQII", mem.read(info, 56)
    )
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert mem.read(cmdline, 6) == b"quiet\0"
    assert rsdp == 0xE0000
    assert struct.unpack("<QQQQ", mem.read(modlist, 32)) == (64 * MIB - 8192, 5000, 0, 0)
    assert list(struct.iter_unpack("<QQII", mem.read(memmap, 24 * entries))) == [
        (span.base, span.size, span.type, 0) for span in spec.e820
    ]


def test_without_initrd_there_is_no_module() -> None:
    mem, spec = guest()

    loader.load(kernel(pvh_elf()), mem, spec)

    assert struct.unpack("<IQ", mem.read(layout.PVH_START_INFO + 12, 12)) == (0, 0)


def test_no_note() -> None:
    mem, spec = guest()

    with pytest.raises(ImageError, match="kernel vmlinux: a kernel without PVH entry; use --boot linux64"):
        loader.load(kernel(elf()), mem, spec, "pvh")


def test_kernel_larger_than_memory() -> None:
    mem, spec = guest(18)

    with pytest.raises(
        ImageError, match=r"the kernel needs guest memory \[0x1000000, 0x1300000\), .*; give at least --mem 19M"
    ):
        loader.load(kernel(pvh_elf()), mem, spec)


def test_initrd_must_not_reach_into_the_kernel() -> None:
    mem, spec = guest(20, initrd=bytes(MIB + 1))

    with pytest.raises(ImageError, match=r"between the kernel's end at 19.0 MiB and .*; give at least --mem 21M"):
        loader.load(kernel(pvh_elf()), mem, spec)


def test_initrd_right_above_the_kernel() -> None:
    mem, spec = guest(20, initrd=b"i" * MIB)

    loader.load(kernel(pvh_elf()), mem, spec)

    assert mem.read(19 * MIB - 1, 2) == b"\0i"


def test_command_line_over_the_limit_of_linux() -> None:
    mem, spec = guest(cmdline="x" * 2048)

    with pytest.raises(ConfigError, match="this kernel takes 2047"):
        loader.load(kernel(pvh_elf()), mem, spec)
