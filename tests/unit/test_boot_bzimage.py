"""bzImages: the setup header, and the boot by the kernel's own decompressor."""

from __future__ import annotations

import struct

import pytest
from images import BASE, FIELDS, MIB, PROTECTED, VERSION, bzimage, guest, kernel

from kvmpy.boot import loader
from kvmpy.boot.bzimage import parse
from kvmpy.boot.spec import EntryPoint, Mode
from kvmpy.core.errors import ConfigError, ImageError
from kvmpy.core.memory import GuestMemory
from kvmpy.x86 import layout

CMDLINE = "console=ttyS0 panic=-1"


def boot(data: bytes, mib: int = 64, initrd: bytes = b"", cmdline: str = CMDLINE) -> tuple[GuestMemory, EntryPoint]:
    mem, spec = guest(mib, cmdline=cmdline, initrd=initrd, rsdp=layout.RSDP)
    return mem, loader.load(kernel(data), mem, spec, "decompressor")


def zero_page(mem: GuestMemory, name: str) -> int:
    offset, code = FIELDS[name]
    return int(struct.unpack_from("<" + code, mem.read(layout.ZERO_PAGE, 4096), offset)[0])


def word(mem: GuestMemory, offset: int, code: str = "I") -> int:
    return int(struct.unpack_from("<" + code, mem.read(layout.ZERO_PAGE, 4096), offset)[0])


def test_version_and_payload() -> None:
    image = parse(memoryview(bzimage(b"payload")))

    assert image.version == VERSION[:-1].decode()
    assert image.payload == b"payload"


def test_entry_is_0x200_after_the_preferred_address() -> None:
    data = bzimage()

    mem, entry = boot(data)

    assert (entry.protocol, entry.mode, entry.rip) == ("decompressor", Mode.LONG, BASE + 0x200)
    assert entry.registers["rsi"] == layout.ZERO_PAGE
    assert mem.read(BASE, len(data) - PROTECTED) == data[PROTECTED:]


def test_zero_page_is_seeded_from_the_setup_header() -> None:
    mem, _ = boot(bzimage(xloadflags=0x3F), initrd=b"i" * 5000)

    assert zero_page(mem, "header") == int.from_bytes(b"HdrS", "little")
    assert zero_page(mem, "xloadflags") == 0x3F
    assert zero_page(mem, "init_size") == 4 * MIB
    assert zero_page(mem, "code32_start") == BASE
    assert mem.read(layout.ZERO_PAGE + 0x210, 1) == b"\xff"  # type_of_loader
    assert mem.read(layout.ZERO_PAGE + 0x1EF, 1) == b"\0"  # sentinel: 0 says that the loader was careful
    assert word(mem, 0x228) == layout.CMDLINE
    assert mem.read(layout.CMDLINE, len(CMDLINE) + 1) == CMDLINE.encode() + b"\0"
    assert word(mem, 0x070, "Q") == layout.RSDP
    assert [word(mem, offset) for offset in (0x0C0, 0x0C4, 0x0C8)] == [0, 0, 0]  # ext_: upper halves of the pointers


def test_zero_page_stops_where_the_header_does() -> None:
    data = bytearray(bzimage(jump=0x2AEB))  # the header ends at 0x202 + 0x2a
    data[0x22C:0x230] = bytes(4)

    mem, _ = boot(bytes(data).replace(b"\0", b"\0"), initrd=b"")

    assert mem.read(layout.ZERO_PAGE + 0x22C, 0x264 - 0x22C) == bytes(0x264 - 0x22C)


def test_e820_is_the_specs() -> None:
    mem, _ = boot(bzimage(), mib=64)

    spans = [(span.base, span.size, int(span.type)) for span in layout.e820(64 * MIB)]
    table = mem.read(layout.ZERO_PAGE + 0x2D0, 20 * len(spans))
    assert mem.read(layout.ZERO_PAGE + 0x1E8, 1) == bytes([len(spans)])
    assert list(struct.iter_unpack("<QQI", table)) == spans


def test_initrd_is_at_the_top_of_ram() -> None:
    mem, _ = boot(bzimage(), mib=64, initrd=b"i" * 5000)

    assert (word(mem, 0x218), word(mem, 0x21C)) == (64 * MIB - 8192, 5000)
    assert mem.read(64 * MIB - 8192, 5001) == b"i" * 5000 + b"\0"


def test_initrd_stays_below_initrd_addr_max() -> None:
    mem, _ = boot(bzimage(initrd_addr_max=48 * MIB - 1), mib=64, initrd=b"i" * 4096)

    assert word(mem, 0x218) == 48 * MIB - 4096


def test_without_initrd_there_is_none() -> None:
    mem, _ = boot(bzimage())

    assert (word(mem, 0x218), word(mem, 0x21C)) == (0, 0)


def test_little_memory_moves_a_relocatable_kernel_down() -> None:
    mem, entry = boot(bzimage(), mib=8)

    assert entry.rip == 2 * MIB + 0x200
    assert zero_page(mem, "code32_start") == 2 * MIB


def test_other_kernels_are_loaded_at_1_mib_and_move_themselves() -> None:
    _, entry = boot(bzimage(relocatable_kernel=0))

    assert entry.rip == MIB + 0x200


@pytest.mark.parametrize("relocatable, need", [(1, 6), (0, 20)])
def test_too_little_memory(relocatable: int, need: int) -> None:
    with pytest.raises(ImageError, match=f"more than there is; give at least --mem {need}M"):
        boot(bzimage(relocatable_kernel=relocatable), mib=5)


def test_initrd_larger_than_memory() -> None:
    with pytest.raises(ImageError, match=r"the initrd \(60.0 MiB\) does not fit .*; give at least --mem 80M"):
        boot(bzimage(), mib=64, initrd=bytes(60 * MIB))

    boot(bzimage(), mib=80, initrd=bytes(60 * MIB))


def test_initrd_that_no_memory_would_help() -> None:
    with pytest.raises(ImageError, match="32 MiB, where it must end; make the initrd smaller"):
        boot(bzimage(initrd_addr_max=32 * MIB - 1), mib=64, initrd=bytes(13 * MIB))


def test_command_line_over_the_kernels_limit() -> None:
    with pytest.raises(ConfigError, match="has 256 bytes, this kernel takes 255"):
        boot(bzimage(cmdline_size=255), cmdline="x" * 256)


def test_command_line_of_exactly_the_limit() -> None:
    mem, _ = boot(bzimage(cmdline_size=255), cmdline="x" * 255)

    assert mem.read(layout.CMDLINE, 256) == b"x" * 255 + b"\0"


@pytest.mark.parametrize(
    "fields",
    [{"xloadflags": 0}, {"version": 0x20B}],
    ids=["32-bit kernel", "kernel before 3.8"],
)
@pytest.mark.parametrize("protocol", ["auto", "decompressor"])
def test_kernels_without_64_bit_entry(fields: dict[str, int], protocol: str) -> None:
    mem, spec = guest()

    with pytest.raises(ImageError, match=r"without 64-bit entry .*; use a 64-bit kernel from 3\.8 on"):
        loader.load(kernel(bzimage(b"unknown", **fields)), mem, spec, protocol)


@pytest.mark.parametrize(
    "data, message",
    [
        (bzimage()[:1000], "ends within its setup header, after 1000 bytes"),
        (bzimage()[:-1], r"the file has \d+ bytes, its setup header says \d+"),
        (bzimage(setup_sects=0), r"its setup header says"),  # 0 means 4
        (bzimage(syssize=0xFFFFFFFF), r"its setup header says 68719477744"),
        (bzimage(syssize=0), "there is no protected-mode part"),
        (bzimage(loadflags=0), "a zImage, which is loaded low; build the kernel as bzImage"),
        (bzimage(version=0x1FF), "a zImage"),
        (bzimage(payload_length=0xFFFFFFFF), "its payload ends at 0x1000002ff, the protected-mode part at"),
        (bzimage(payload_offset=0xFFFFFFFF), "its payload ends at"),
    ],
)
def test_damaged(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        boot(data)
    assert caught.value.remedy
