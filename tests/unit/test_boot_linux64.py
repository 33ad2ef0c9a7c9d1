"""The 64-bit entry of an ELF kernel."""

from __future__ import annotations

import struct

import pytest
from images import BASE, MIB, Load, bzimage, elf, guest, kernel, pvh_elf, with_size

from kvmpy.boot import loader
from kvmpy.boot.spec import Mode
from kvmpy.core.errors import ConfigError, ImageError
from kvmpy.x86 import layout


def test_vmlinux() -> None:
    mem, spec = guest(64, cmdline="quiet", initrd=b"i" * 10, rsdp=layout.RSDP)

    entry = loader.load(kernel(elf()), mem, spec)

    page = mem.read(layout.ZERO_PAGE, 4096)
    assert (entry.protocol, entry.mode, entry.rip) == ("linux64", Mode.LONG, BASE)
    assert entry.registers["rsi"] == layout.ZERO_PAGE
    assert (page[0x1FE:0x200], page[0x202:0x206], page[0x210]) == (b"\x55\xaa", b"HdrS", 0xFF)
    assert struct.unpack_from("<II", page, 0x218) == (64 * MIB - 4096, 10)
    assert struct.unpack_from("<I", page, 0x228) == (layout.CMDLINE,)
    assert struct.unpack_from("<Q", page, 0x70) == (layout.RSDP,)
    assert page[0x1E8] == len(spec.e820)


def test_payload_gets_its_bzimages_setup_header_and_limits() -> None:
    data = bzimage(with_size("xz", pvh_elf()), cmdline_size=100, xloadflags=0x1234 | 1, initrd_addr_max=40 * MIB - 1)
    mem, spec = guest(64, initrd=b"i")

    entry = loader.load(kernel(data), mem, spec, "linux64")

    page = mem.read(layout.ZERO_PAGE, 4096)
    assert (entry.protocol, entry.rip) == ("linux64", BASE)
    assert struct.unpack_from("<H", page, 0x236) == (0x1235,)
    assert struct.unpack_from("<I", page, 0x218) == (40 * MIB - 4096,)

    mem, spec = guest(64, cmdline="x" * 101)
    with pytest.raises(ConfigError, match="this kernel takes 100"):
        loader.load(kernel(data), mem, spec, "linux64")


@pytest.mark.parametrize(
    "data, message",
    [
        (pvh_elf(32), "a 32-bit ELF file has no 64-bit entry"),
        (elf([Load(BASE, b"\xf4")], entry=BASE + 1), "its entry 0x1000001 is in no segment"),
    ],
)
def test_no_entry(data: bytes, message: str) -> None:
    mem, spec = guest()

    with pytest.raises(ImageError, match=message):
        loader.load(kernel(data), mem, spec, "linux64")
