"""A bzImage: its setup header checked, its parts, its own 64-bit entry."""

from __future__ import annotations

from ..core.errors import ImageError
from ..core.memory import GuestMemory
from ..core.record import Record
from ..x86 import layout
from . import cmdline, params
from .params import SECTOR, XLF_KERNEL_64, SetupHeader
from .placement import Segment, put_cmdline, put_initrd, put_segments, require_ram, round_up
from .spec import BootSpec, EntryPoint, Mode

ENTRY_64 = 0x200  # of the protected-mode part (boot.rst, "64-bit Boot Protocol")
OLD_INITRD_MAX = 0x37FFFFFF  # before protocol 2.03
VERSION_MAX = 256  # bytes of the version string that are looked at
COPY_AGAIN = "the file is damaged or was not copied completely: get it again"


def is_bzimage(data: memoryview) -> bool:
    return bytes(data[0x202:0x206]) == b"HdrS"


class BzImage(Record, frozen=True):
    """A checked bzImage; fields that its protocol version does not have are as that version means them."""

    header: SetupHeader
    protected: memoryview  # the protected-mode part: decompressor and payload
    version: str  # of the kernel, "" when it does not say
    payload: memoryview  # compressed kernel, empty before protocol 2.08

    @property
    def has_entry_64(self) -> bool:
        return self.header.version >= 0x20C and bool(self.header.xloadflags & XLF_KERNEL_64)

    @property
    def cmdline_limit(self) -> int:
        return self.header.cmdline_size if self.header.version >= 0x206 else cmdline.OLD_LIMIT

    @property
    def initrd_ceiling(self) -> int:
        """The first address that the initrd must not reach."""
        return 1 + (self.header.initrd_addr_max if self.header.version >= 0x203 else OLD_INITRD_MAX)


def parse(data: memoryview) -> BzImage:
    """Raises ImageError for a file that is cut off, older than bzImage or contradicts itself."""
    if len(data) < 2 * SECTOR:
        raise ImageError(f"the file ends within its setup header, after {len(data)} bytes", COPY_AGAIN)
    header = SetupHeader(bytes(data[: params.HEADER_MAX]))
    if header.version < 0x200 or not header.loadflags & params.LOADED_HIGH:
        raise ImageError("a zImage, which is loaded low", "build the kernel as bzImage")
    setup_size = ((header.setup_sects or 4) + 1) * SECTOR  # boot.rst: 0 means 4
    size = setup_size + header.syssize * 16
    if len(data) < size:
        raise ImageError(f"the file has {len(data)} bytes, its setup header says {size}", COPY_AGAIN)
    protected = data[setup_size:size]
    if len(protected) <= ENTRY_64:
        raise ImageError("there is no protected-mode part", COPY_AGAIN)
    payload = memoryview(b"")
    if header.version >= 0x208:
        end = header.payload_offset + header.payload_length
        if end > len(protected):
            raise ImageError(
                f"its payload ends at {end:#x}, the protected-mode part at {len(protected):#x}", COPY_AGAIN
            )
        payload = protected[header.payload_offset : end]
    return BzImage(header, protected, _version(data[:setup_size], header), payload)


def load(image: BzImage, mem: GuestMemory, spec: BootSpec) -> EntryPoint:
    """The whole protected-mode part to guest memory, to be entered at its 64-bit entry: it decompresses itself."""
    header = image.header
    require_entry_64(image)
    base, end = _place(image, spec.ram_size)
    require_ram(mem, base, end - base, "the kernel, while it decompresses itself,")
    put_segments(mem, [Segment(base, image.protected, len(image.protected))])
    initrd = put_initrd(mem, spec, end, image.initrd_ceiling)
    line = put_cmdline(mem, spec, image.cmdline_limit)
    header = SetupHeader(bytearray(header.buf))
    header.code32_start = base
    params.put_zero_page(mem, spec, header, line, initrd)
    return EntryPoint("decompressor", Mode.LONG, base + ENTRY_64, {"rsi": layout.ZERO_PAGE, "rsp": layout.BOOT_STACK})


def require_entry_64(image: BzImage) -> None:
    """Raises ImageError for a kernel that cannot be entered in 64-bit mode."""
    if not image.has_entry_64:
        major, minor = divmod(image.header.version, 256)
        raise ImageError(
            f"a kernel without 64-bit entry (boot protocol {major}.{minor:02}, 32-bit or before Linux 3.8)",
            "use a 64-bit kernel from 3.8 on",
        )


def _place(image: BzImage, ram_size: int) -> tuple[int, int]:
    """Where the protected-mode part goes, and the end of what it needs from there on to decompress itself.

    boot.rst, init_size: a relocatable kernel runs from where it is loaded, rounded up to kernel_alignment; another
    moves itself to pref_address.
    """
    header = image.header
    alignment = max(header.kernel_alignment, 1)
    need = max(header.init_size, len(image.protected))
    preferred = header.pref_address or layout.HIGH_RAM
    if not header.relocatable_kernel:
        return layout.HIGH_RAM, max(preferred + need, layout.HIGH_RAM + len(image.protected))
    preferred = round_up(max(preferred, layout.HIGH_RAM), alignment)
    lowest = round_up(layout.HIGH_RAM, alignment)
    base = preferred if preferred + need <= ram_size else min(lowest, preferred)
    return base, base + need


def _version(setup: memoryview, header: SetupHeader) -> str:
    """The kernel's version string (boot.rst, kernel_version), or "" when it has none."""
    if not header.kernel_version:
        return ""
    start = header.kernel_version + 0x200
    return bytes(setup[start : start + VERSION_MAX]).split(b"\0")[0].decode("ascii", "replace")
