"""What `kvmpy inspect` tells about a kernel image."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from ..core.errors import ImageError, KvmpyError
from . import elf, files, flat, multiboot, payload
from .bzimage import ENTRY_64, BzImage, is_bzimage
from .loader import PROTOCOLS, KernelImage, plan
from .params import XLOADFLAGS

Json = dict[str, Any]

# Kernel options that decide what a guest can do here, in the order they are shown.
OPTIONS = (
    "64BIT",
    "PVH",
    "KVM_GUEST",
    "SMP",
    "X86_X2APIC",
    "X86_MPPARSE",
    "ACPI",
    "SERIAL_8250",
    "SERIAL_8250_CONSOLE",
    "BLK_DEV_INITRD",
    "RD_GZIP",
    "RD_ZSTD",
    "DEVTMPFS",
    "DEVTMPFS_MOUNT",
    "PCI",
    "VIRTIO_MMIO",
    "VIRTIO_MMIO_CMDLINE_DEVICES",
    "VIRTIO_PCI",
    "VIRTIO_BLK",
    "VIRTIO_NET",
    "VIRTIO_CONSOLE",
    "HW_RANDOM_VIRTIO",
    "VIRTIO_VSOCKETS",
    "VIRTIO_FS",
    "NET_9P_VIRTIO",
    "EXT4_FS",
    "RANDOMIZE_BASE",
    "RELOCATABLE",
)
CONFIG_MAX = 4 << 20  # bytes of a kernel configuration; Debian's has 260 KB
RELEASE = re.compile(r"[A-Za-z0-9][\w.+~-]*", re.ASCII)  # of a kernel; it becomes part of a file name
IKCONFIG = b"IKCFG_ST"  # kernel/configs.c: before the gzipped configuration
BANNER = b"Linux version "  # init/version.c
BANNER_MAX = 400


def describe(image: KernelImage) -> Json:
    """Everything known about `image`, JSON-able; sizes and addresses in bytes.

    Parts that the image does not have, or that are damaged, are None or left out; "boot" says of every protocol
    whether it can be used and why not, "auto" which one is taken and why.
    """
    source, kernel = _parts(image)
    version = _version(source, kernel)
    boot, auto = _protocols(image)
    return {
        "file": image.path,
        "size": len(image.data),
        "format": _format(image),
        "container": image.container or None,
        "version": version,
        "setup": _setup(source) if source else None,
        "payload": _payload(source, kernel) if source and source.payload else None,
        "elf": _elf(kernel) if kernel else None,
        "entries": _entries(image, source, kernel),
        "kaslr": _kaslr(source, kernel) if source or kernel else None,
        "cmdline_limit": source.cmdline_limit if source else None,
        "min_memory": _min_memory(source, kernel),
        "boot": boot,
        "auto": auto,
        "config": _config(image, kernel, version),
    }


def _parts(image: KernelImage) -> tuple[BzImage | None, elf.Elf | None]:
    """The bzImage and the ELF kernel that can be had of `image`."""
    source = kernel = None
    try:
        source = image.bzimage
        kernel = image.elf
    except ImageError:
        pass  # "boot" has the reason
    return source, kernel


def _protocols(image: KernelImage) -> tuple[dict[str, str], Json]:
    """Of each protocol "yes" or why not, and what auto takes."""
    boot = {}
    for protocol in PROTOCOLS[1:]:
        try:
            plan(image, protocol)
            boot[protocol] = "yes"
        except ImageError as error:
            boot[protocol] = error.what.removeprefix(f"kernel {image.path}: ")
    try:
        chosen = plan(image)
        return boot, {"protocol": chosen.protocol, "why": chosen.why}
    except ImageError as error:
        return boot, {"protocol": None, "why": str(error)}


def _format(image: KernelImage) -> str:
    if is_bzimage(image.data):
        return "bzImage"
    if elf.is_elf(image.data):
        return "ELF"
    if multiboot.find(image.data) is not None:
        return "Multiboot"
    return "boot sector" if flat.has_boot_signature(image.data) else "unknown"


def _setup(source: BzImage) -> Json:
    header = source.header
    major, minor = divmod(header.version, 256)
    return {
        "protocol": f"{major}.{minor:02}",
        "relocatable": bool(header.relocatable_kernel),
        "kernel_alignment": header.kernel_alignment,
        "pref_address": header.pref_address,
        "init_size": header.init_size,
        "initrd_addr_max": source.initrd_ceiling - 1,
        "cmdline_size": source.cmdline_limit,
        "xloadflags": [name for bit, name in XLOADFLAGS.items() if header.xloadflags & bit],
    }


def _payload(source: BzImage, kernel: elf.Elf | None) -> Json:
    return {
        "compression": payload.identify(source.payload) or None,
        "compressed": len(source.payload),
        "size": len(kernel.data) if kernel else None,
    }


def _elf(kernel: elf.Elf) -> Json:
    return {
        "bits": kernel.bits,
        "entry": kernel.entry,
        "segments": [
            {"base": segment.base, "file_size": len(segment.content), "size": segment.size}
            for segment in kernel.segments
        ],
        "end": kernel.end,
    }


def _entries(image: KernelImage, source: BzImage | None, kernel: elf.Elf | None) -> Json:
    """Guest addresses at which each protocol enters, None where it cannot; `efi_stub` is the file's own entry."""
    return {
        "linux64": kernel.entry if kernel and kernel.bits == 64 else None,
        "pvh": kernel.pvh_entry if kernel else None,
        "decompressor": source.header.pref_address + ENTRY_64 if source and source.has_entry_64 else None,
        "efi_stub": source is not None and bytes(image.data[:2]) == b"MZ",
        "efi_handover_offset": source.header.handover_offset or None
        if source and source.header.version >= 0x20B
        else None,
    }


def _kaslr(source: BzImage | None, kernel: elf.Elf | None) -> Json:
    """Whether the kernel can be moved at random: its decompressor does that, from a table appended to the ELF file."""
    table = len(kernel.data) - kernel.file_end if source and kernel else 0
    return {
        "relocations": table > 0,
        "applied_by": "decompressor" if table > 0 else None,
    }


def _min_memory(source: BzImage | None, kernel: elf.Elf | None) -> int | None:
    """RAM that the kernel's own memory image takes, from address 0 on; a usable guest needs more."""
    if source and source.header.version >= 0x20A:
        return int(source.header.pref_address + source.header.init_size)
    return kernel.end if kernel else None


def _version(source: BzImage | None, kernel: elf.Elf | None) -> str | None:
    """The version string of the setup header, or of a vmlinux's banner."""
    if source and source.version:
        return source.version
    for segment in kernel.segments if kernel else ():
        content = bytes(segment.content)
        at = content.find(BANNER)
        if at >= 0:
            banner = content[at + len(BANNER) : at + len(BANNER) + BANNER_MAX]
            return re.split(rb"[\0\n]", banner)[0].decode("ascii", "replace")
    return None


def _config(image: KernelImage, kernel: elf.Elf | None, version: str | None) -> Json | None:
    """The OPTIONS as the kernel's configuration has them, y, m, a value, or None for not set."""
    text, where = _embedded_config(kernel), "embedded (IKCONFIG)"
    if text is None:
        text, where = _config_file(image, version)
    if text is None:
        return None
    values = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))
    return {"source": where, "options": {name: values.get(name) for name in OPTIONS}}


def _embedded_config(kernel: elf.Elf | None) -> str | None:
    for segment in kernel.segments if kernel else ():
        content = bytes(segment.content)
        at = content.find(IKCONFIG)
        if at >= 0:
            try:
                decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
                return decoder.decompress(content[at + len(IKCONFIG) :], CONFIG_MAX).decode("utf-8", "replace")
            except zlib.error:
                return None
    return None


def _config_file(image: KernelImage, version: str | None) -> tuple[str | None, str]:
    """The configuration that distributions install beside the kernel or under its release's name."""
    release = (version or "").split(" ")[0]
    if not RELEASE.fullmatch(release):
        return None, ""
    beside = Path(image.path).resolve().parent
    modules = Path("/lib/modules") / release
    for path in (beside / f"config-{release}", beside / "config", Path(f"/boot/config-{release}"), modules / "config"):
        try:
            return bytes(files.read(path, "configuration", CONFIG_MAX)).decode("utf-8", "replace"), str(path)
        except KvmpyError:
            continue
    return None, ""
