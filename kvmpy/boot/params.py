"""The setup header of a bzImage, the zero page that carries it to a 64-bit kernel entry."""

from __future__ import annotations

from ..core.memory import GuestMemory
from ..core.wire import U8, U16, U32, U64, Overlay, Wire, u32, u64
from ..x86 import layout
from .placement import put_table
from .spec import BootSpec

HEADER = 0x1F1  # where the setup header starts, in the file and in the zero page
HEADER_MAX = 0x290  # struct boot_params leaves it room up to here
SECTOR = 512
BOOT_FLAG = 0xAA55
HDRS = int.from_bytes(b"HdrS", "little")
LOADED_HIGH = 0x01  # loadflags: the protected-mode part belongs at 1 MiB or above
UNDEFINED_LOADER = 0xFF  # type_of_loader without an assigned number
E820_MAX = 128  # E820_MAX_ENTRIES_ZEROPAGE

XLOADFLAGS = {  # arch/x86/include/uapi/asm/bootparam.h
    0x01: "XLF_KERNEL_64",
    0x02: "XLF_CAN_BE_LOADED_ABOVE_4G",
    0x04: "XLF_EFI_HANDOVER_32",
    0x08: "XLF_EFI_HANDOVER_64",
    0x10: "XLF_EFI_KEXEC",
    0x20: "XLF_5LEVEL",
    0x40: "XLF_5LEVEL_ENABLED",
}
XLF_KERNEL_64 = 0x01


class SetupHeader(Overlay, size=HEADER_MAX):
    """The first sectors of a bzImage (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header")."""

    setup_sects = U8(0x1F1)
    syssize = U32(0x1F4)
    boot_flag = U16(0x1FE)
    jump_length = U8(0x201)  # second byte of `jump`: the header ends at 0x202 + this
    header = U32(0x202)
    version = U16(0x206)
    kernel_version = U16(0x20E)
    type_of_loader = U8(0x210)
    loadflags = U8(0x211)
    code32_start = U32(0x214)
    ramdisk_image = U32(0x218)
    ramdisk_size = U32(0x21C)
    cmd_line_ptr = U32(0x228)
    initrd_addr_max = U32(0x22C)
    kernel_alignment = U32(0x230)
    relocatable_kernel = U8(0x234)
    min_alignment = U8(0x235)
    xloadflags = U16(0x236)
    cmdline_size = U32(0x238)
    payload_offset = U32(0x248)
    payload_length = U32(0x24C)
    pref_address = U64(0x258)
    init_size = U32(0x260)
    handover_offset = U32(0x264)


class BootParams(SetupHeader, size=layout.PAGE):
    """struct boot_params, the "zero page": the setup header where it is in the file, and what loaders add."""

    acpi_rsdp_addr = U64(0x070)
    e820_entries = U8(0x1E8)
    e820_table = 0x2D0


class E820Entry(Wire):
    """struct boot_e820_entry."""

    addr: u64
    size: u64
    type: u32


def put_zero_page(
    mem: GuestMemory, spec: BootSpec, header: SetupHeader, cmdline: int, initrd: tuple[int, int]
) -> BootParams:
    """Write the zero page around `header`; `cmdline` and `initrd` are where those are in guest memory.

    Everything lies below 4 GiB, so the ext_ upper halves of the pointers stay 0.
    """
    params = BootParams()
    end = min(0x202 + header.jump_length, HEADER_MAX)
    params.buf[HEADER:end] = header.buf[HEADER:end]
    params.type_of_loader = UNDEFINED_LOADER
    params.cmd_line_ptr = cmdline
    params.ramdisk_image, params.ramdisk_size = initrd
    params.acpi_rsdp_addr = spec.rsdp
    if len(spec.e820) > E820_MAX:
        raise ValueError(f"{len(spec.e820)} e820 entries, the zero page has room for {E820_MAX}")
    params.e820_entries = len(spec.e820)
    for index, span in enumerate(spec.e820):
        E820Entry(span.base, span.size, span.type).write(params.buf, params.e820_table + index * E820Entry.SIZE)
    put_table(mem, layout.ZERO_PAGE, params.buf)
    return params


def minimal_header() -> SetupHeader:
    """What a kernel without setup header of its own (a vmlinux) must find in the zero page."""
    header = SetupHeader()
    header.boot_flag = BOOT_FLAG
    header.jump_length = HEADER_MAX - 0x202
    header.header = HDRS
    header.version = 0x020F
    header.loadflags = LOADED_HIGH
    header.kernel_alignment = 16 * layout.MIB
    return header
