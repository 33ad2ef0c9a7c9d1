"""Chooses the boot protocol by what a kernel image contains, and loads it that way."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property, partial

from ..core.errors import ConfigError, ImageError
from ..core.later import later
from ..core.memory import GuestMemory
from ..core.record import Record, replace
from ..core.typed import TYPE_CHECKING
from ..x86.layout import GIB
from . import files, payload
from .spec import BootSpec, EntryPoint

if TYPE_CHECKING:
    from . import bzimage, elf, flat, identify, linux64, multiboot, pvh
else:
    bzimage, elf, flat, identify, linux64, multiboot, pvh = later(
        __package__, "bzimage elf flat identify linux64 multiboot pvh"
    )

PROTOCOLS = ("auto", "pvh", "linux64", "decompressor", "multiboot", "flat")
MAX_FILE = 4 * GIB  # a vmlinux with all debug information there is has 2
USE_DECOMPRESSOR = "use --boot decompressor"
NO_KASLR = "skips the kernel's own decompressor and with it KASLR, which --boot decompressor keeps"


class KernelImage(Record, frozen=True):
    """A kernel file's content; parsed when asked, once."""

    path: str
    data: memoryview
    container: str = ""  # the format the whole file was compressed in

    @cached_property
    def bzimage(self) -> bzimage.BzImage | None:
        """Raises ImageError when it is a bzImage, but a damaged one."""
        return bzimage.parse(self.data) if bzimage.is_bzimage(self.data) else None

    @cached_property
    def elf(self) -> elf.Elf:
        """The ELF kernel that the file is, or that a bzImage has as its payload; raises ImageError."""
        if self.bzimage is None:
            if not elf.is_elf(self.data):
                raise identify.refuse(self.data) if self.unknown else ImageError("no ELF file", "use another --boot")
            return elf.parse(self.data)
        header = self.bzimage.header
        if not self.bzimage.payload:
            raise payload.UndecodableError("a bzImage that does not say where its payload is", USE_DECOMPRESSOR)
        limit = header.init_size if header.version >= 0x20A and header.init_size else payload.MAX
        content = memoryview(payload.decompress(self.bzimage.payload, limit))
        if not elf.is_elf(content):
            raise payload.UndecodableError("a bzImage with a payload that is no ELF file", USE_DECOMPRESSOR)
        return elf.parse(content)

    @property
    def unknown(self) -> bool:
        """Whether no protocol but "flat" can start it."""
        data = self.data
        return not (bzimage.is_bzimage(data) or elf.is_elf(data) or multiboot.find(data) is not None)


class Plan(Record, frozen=True):
    """A protocol that fits an image, why it was taken, and what does it."""

    protocol: str
    why: str
    load: Callable[[GuestMemory, BootSpec], EntryPoint]


def read_image(path: str | os.PathLike[str]) -> KernelImage:
    """The kernel at `path`, decompressed when the whole file is compressed.

    Raises NotFoundError, HostError, and ImageError when it is too large or its compression damaged.
    """
    data = files.read(path, "kernel", MAX_FILE, "strip its debug information (objcopy -S)")
    name = os.fspath(path)
    if container := payload.identify(data):
        try:
            return KernelImage(name, memoryview(payload.decompress(data)), container)
        except ImageError as error:
            raise ImageError(f"kernel {name}: {error.what}", error.remedy) from None
    return KernelImage(name, data)


def load(image: KernelImage, mem: GuestMemory, spec: BootSpec, protocol: str = "auto") -> EntryPoint:
    """Everything of a boot into `mem`, which must be fresh (all zero): image, initrd, command line, tables.

    Raises ImageError when the image cannot be started, by this protocol or in this much memory, and ConfigError for
    a command line that the kernel does not take.
    """
    chosen = plan(image, protocol)
    return replace(chosen.load(mem, spec), why=chosen.why)


def plan(image: KernelImage, protocol: str = "auto") -> Plan:
    """How `image` will be started; raises ImageError when it cannot be."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"no boot protocol {protocol!r}", f"use one of {', '.join(PROTOCOLS)}")
    try:
        return _auto(image) if protocol == "auto" else _explicit(image, protocol)
    except ImageError as error:
        raise ImageError(f"kernel {image.path}: {error.what}", error.remedy) from None


def _explicit(image: KernelImage, protocol: str) -> Plan:
    why = "asked for with --boot"
    if protocol == "pvh":
        pvh.check(image.elf)
        return Plan(protocol, why, partial(pvh.load, image.elf, image.bzimage))
    if protocol == "linux64":
        linux64.check(image.elf)
        return Plan(protocol, why, partial(linux64.load, image.elf, image.bzimage))
    if protocol == "decompressor":
        if image.bzimage is None:
            raise ImageError("no bzImage, so there is no decompressor in it", "use --boot auto")
        bzimage.require_entry_64(image.bzimage)
        return Plan(protocol, why, partial(bzimage.load, image.bzimage))
    if protocol == "multiboot":
        return Plan(protocol, why, partial(multiboot.load, multiboot.parse(image.data)))
    flat.check(image.data)
    return Plan(protocol, why, partial(flat.load, image.data))


def _auto(image: KernelImage) -> Plan:
    if image.bzimage is not None:
        return _auto_bzimage(image, image.bzimage)
    if elf.is_elf(image.data):
        return _auto_elf(image)
    if multiboot.find(image.data) is not None:
        return replace(_explicit(image, "multiboot"), why="it has a Multiboot header")
    efi = bytes(image.data[:2]) == b"MZ"  # or what is left of a bzImage
    if flat.has_boot_signature(image.data) and not efi:
        return replace(_explicit(image, "flat"), why="it has the signature of a boot sector, 55 AA")
    raise identify.refuse(image.data)


def _auto_elf(image: KernelImage) -> Plan:
    if image.elf.pvh_entry is not None:
        return replace(_explicit(image, "pvh"), why="an ELF kernel with a PVH entry; it runs where it was linked")
    if multiboot.find(image.data) is not None:
        return replace(_explicit(image, "multiboot"), why="an ELF kernel with a Multiboot header and no PVH entry")
    if multiboot.is_version_2(image.data):
        raise identify.refuse_multiboot2()
    if image.elf.bits == 32:
        raise ImageError("a 32-bit ELF file with neither PVH entry nor Multiboot header", "add one of them")
    return replace(
        _explicit(image, "linux64"),
        why="a 64-bit ELF kernel with no PVH entry, entered at its e_entry; it runs where it was linked",
    )


def _auto_bzimage(image: KernelImage, source: bzimage.BzImage) -> Plan:
    """The payload where it can be had, and the kernel's own decompressor where it cannot."""
    try:
        kernel = image.elf
    except payload.UndecodableError as error:
        return replace(_explicit(image, "decompressor"), why=error.what)
    what = f"a bzImage; its {payload.identify(source.payload)} payload, decompressed on the host, is an ELF kernel"
    if kernel.pvh_entry is not None:
        return replace(_explicit(image, "pvh"), why=f"{what} with a PVH entry; this {NO_KASLR}")
    bzimage.require_entry_64(source)
    return replace(_explicit(image, "linux64"), why=f"{what} with no PVH entry; this {NO_KASLR}")
