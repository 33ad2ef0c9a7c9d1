"""Says what a file is that is no kernel for this machine."""

from __future__ import annotations

from ..core.errors import ImageError
from . import multiboot, payload

GET_X86 = "use a kernel for x86-64"
TAKE_KERNEL = "give the kernel (bzImage or vmlinux) with --kernel"
TEXT = 512  # bytes that are looked at to call a file text

# (offset, magic, what it is, remedy)
KNOWN = (
    (0x38, b"ARM\x64", "a kernel for ARM64", GET_X86),  # Documentation/arch/arm64/booting.rst
    (0x38, b"RSC\x05", "a kernel for RISC-V", GET_X86),  # Documentation/arch/riscv/boot-image-header.rst
    (0x24, b"\x18\x28\x6f\x01", "a kernel for 32-bit ARM", GET_X86),
    (0x04, b"zimg", "a self-decompressing EFI kernel for another architecture", GET_X86),
    (0, b"\x27\x05\x19\x56", "a U-Boot image (uImage)", "take the kernel out of it (dumpimage), or use bzImage"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", TAKE_KERNEL),
    (0, b"07070", "a cpio archive, so probably an initrd", "give it with --initrd"),
    (0, b"#!", "a script", TAKE_KERNEL),
    (0, b"QFI\xfb", "a disk image (qcow2)", TAKE_KERNEL),
    (0, b"hsqs", "a file system image (squashfs)", TAKE_KERNEL),
    (0x438, b"\x53\xef", "a file system image (ext4)", TAKE_KERNEL),
    (0x8001, b"CD001", "a CD image", TAKE_KERNEL),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first"),
    (0x101, b"ustar", "a tar archive", "unpack it first"),
    (0, b"!<arch>\n", "a Debian package or an archive", "unpack it first (dpkg -x)"),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "unpack it first (rpm2cpio)"),
)


def refuse(data: memoryview) -> ImageError:
    """The error for a file that no boot protocol takes; its text says what the file looks like."""
    if not data:
        return ImageError("the file is empty", TAKE_KERNEL)
    for offset, magic, what, remedy in KNOWN:
        if data[offset : offset + len(magic)] == magic:
            return ImageError(what, remedy)
    if bytes(data[:2]) == b"MZ":
        return _efi(data)
    if multiboot.is_version_2(data):
        return refuse_multiboot2()
    if name := payload.identify(data):
        return ImageError(f"a {name} file within a {name} file", "decompress it first")
    if _is_text(bytes(data[:TEXT])):
        return ImageError("a text file", TAKE_KERNEL)
    return ImageError(
        f"no kernel that is known (it starts with {bytes(data[:8]).hex(' ')})", f"{TAKE_KERNEL}, or --boot flat"
    )


def refuse_multiboot2() -> ImageError:
    return ImageError("a Multiboot 2 kernel", "add a Multiboot 1 header or a PVH note")


def _efi(data: memoryview) -> ImageError:
    """For a PE file that is no bzImage."""
    if b".linux\0\0" in bytes(data[:4096]):  # Unified Kernel Image Specification: the section with the kernel
        extract = "take the kernel out: objcopy -O binary --only-section=.linux FILE KERNEL"
        return ImageError("a unified kernel image", extract)
    return ImageError("a program for EFI, which needs firmware", TAKE_KERNEL)


def _is_text(head: bytes) -> bool:
    printable = sum((byte >= 0x20 and byte != 0x7F) or byte in b"\t\n\r\f" for byte in head)
    return printable == len(head)
