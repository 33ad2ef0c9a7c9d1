"""What auto chooses for each kind of kernel, and what it says of files that are none."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import pytest
from images import (
    BASE,
    COMPRESSORS,
    MIB,
    TEXT,
    Load,
    boot_sector,
    bzimage,
    compress,
    elf,
    guest,
    kernel,
    multiboot_elf,
    multiboot_flat,
    multiboot_header,
    pvh_elf,
    pvh_note,
    with_size,
)

from kvmpy.boot import loader
from kvmpy.core.errors import ConfigError, ImageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "data, protocol, why",
    [
        (bzimage(), "pvh", "its gzip payload, decompressed on the host, is an ELF kernel with a PVH entry; .* KASLR"),
        (bzimage(with_size("xz", elf())), "linux64", "its xz payload, .* with no PVH entry; .* KASLR"),
        (bzimage(with_size("gzip", pvh_elf(32)), xloadflags=0), "pvh", "with a PVH entry"),
        (bzimage(b"unheard of"), "decompressor", r"no known compression format \(75 6e 68 65\)"),
        (bzimage(with_size("gzip", b"no ELF file")), "decompressor", "a payload that is no ELF file"),
        (bzimage(payload_length=0), "decompressor", "does not say where its payload is"),
        (pvh_elf(), "pvh", "an ELF kernel with a PVH entry; it runs where it was linked"),
        (pvh_elf(32), "pvh", "an ELF kernel with a PVH entry"),
        (elf(), "linux64", "a 64-bit ELF kernel with no PVH entry"),
        (multiboot_elf(), "multiboot", "a Multiboot header and no PVH entry"),
        (elf([Load(BASE, multiboot_header() + TEXT)], notes=pvh_note()), "pvh", "with a PVH entry"),
        (multiboot_flat(), "multiboot", "it has a Multiboot header"),
        (boot_sector(), "flat", "the signature of a boot sector, 55 AA"),
    ],
)
def test_auto(data: bytes, protocol: str, why: str) -> None:
    mem, spec = guest()

    entry = loader.load(kernel(data), mem, spec)

    assert entry.protocol == protocol
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(entry.why)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_bzimage_with_every_payload(name: str) -> None:
    mem, spec = guest()

    entry = loader.load(kernel(bzimage(with_size(name, pvh_elf()))), mem, spec)

    assert (entry.protocol, entry.rip) == ("pvh", BASE)
    assert mem.read(BASE, len(TEXT)) == TEXT


def test_auto_leaves_to_the_guest_what_python_cannot_decompress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.setitem(sys.modules, "lz4.block", None)

    plan = loader.plan(kernel(bzimage(with_size("lz4", pvh_elf()))))

    assert plan.protocol == "decompressor"


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_damaged_payload_is_no_reason_to_try_in_the_guest(name: str) -> None:
    payload = bytearray(with_size(name, pvh_elf()))
    del payload[len(payload) // 2 :]

    with pytest.raises(ImageError, match=f"^kernel vmlinux: its {name} data (ends early|is damaged)"):
        loader.plan(kernel(bzimage(bytes(payload))))


def test_payload_is_held_to_init_size() -> None:
    with pytest.raises(ImageError, match="its gzip data has more than 4096 bytes"):
        loader.plan(kernel(bzimage(with_size("gzip", elf([Load(BASE, bytes(4096))])), init_size=4096)))


def test_unknown_protocol() -> None:
    with pytest.raises(ConfigError, match="no boot protocol 'uefi'; use one of auto, pvh, linux64, decompressor, "):
        loader.plan(kernel(boot_sector()), "uefi")


def arm64_image() -> bytes:
    """Documentation/arch/arm64/booting.rst: the header, with the EFI stub's MZ."""
    return b"MZ".ljust(0x38, b"\0") + b"ARM\x64" + bytes(4096)


def unified_kernel_image() -> bytes:
    sections = b"".join(name.ljust(40, b"\0") for name in (b".osrel", b".cmdline", b".linux"))
    return b"MZ".ljust(0x80, b"\0") + b"PE\0\0".ljust(264, b"\0") + sections + bytes(4096)


def multiboot2() -> bytes:
    return bytes(64) + struct.pack("<IIII", 0xE85250D6, 0, 16, -(0xE85250D6 + 16) & 0xFFFFFFFF) + TEXT


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "the file is empty; give the kernel"),
        (b"#!/bin/sh\necho hello\n", "a script; give the kernel"),
        (b"Hello, I am a text file.\n" * 100, "a text file; give the kernel"),
        (b"x", "a text file"),
        (bytes(100), "no kernel that is known .it starts with 00 00 00 00 00 00 00 00.; .*--boot flat"),
        (b"\x93\xf1\x07" * 400, "no kernel that is known"),
        (b"070701" + b"0" * 104, "a cpio archive, so probably an initrd; give it with --initrd"),
        (arm64_image(), "a kernel for ARM64; use a kernel for x86-64"),
        (b"MZ".ljust(0x38, b"\0") + b"RSC\x05" + bytes(4096), "a kernel for RISC-V; use a kernel for x86-64"),
        (bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(100), "a kernel for 32-bit ARM"),
        (b"MZ\0\0zimg" + bytes(100), "a self-decompressing EFI kernel for another architecture"),
        (b"\x27\x05\x19\x56" + bytes(100), "a U-Boot image"),
        (b"\xd0\x0d\xfe\xed" + bytes(100), "a device tree or FIT image"),
        (unified_kernel_image(), "a unified kernel image; take the kernel out: objcopy"),
        (b"MZ" + bytes(1000), "a program for EFI, which needs firmware"),
        (b"MZ" + bytes(508) + b"\x55\xaa", "a program for EFI"),  # a bzImage cut off after its first sector
        (multiboot2(), "a Multiboot 2 kernel; add a Multiboot 1 header or a PVH note"),
        (elf(front=multiboot2()[:80], bits=64), "a Multiboot 2 kernel"),
        (elf([Load(MIB, TEXT)], bits=32, entry=MIB), "a 32-bit ELF file with neither PVH entry nor Multiboot header"),
        (b"QFI\xfb" + bytes(100), "a disk image"),
        (
            boot_sector() + bytes(MIB),
            "a flat image of 1049088 bytes, .*; if it is a disk image, give the kernel that is on it",
        ),
        (b"PK\x03\x04" + bytes(100), "a zip archive; unpack it first"),
        (b"!<arch>\n" + bytes(100), "a Debian package or an archive; unpack it first"),
    ],
)
def test_what_is_no_kernel(data: bytes, what: str) -> None:
    with pytest.raises(ImageError, match=f"^kernel vmlinux: {what}") as caught:
        loader.plan(kernel(data))
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", ["pvh", "linux64"])
def test_what_is_no_kernel_is_named_for_other_protocols_too(protocol: str) -> None:
    with pytest.raises(ImageError, match="a script"):
        loader.plan(kernel(b"#!/bin/sh\n"), protocol)


@pytest.mark.parametrize(
    "data, protocol, message",
    [
        (multiboot_flat(), "linux64", "no ELF file; use another --boot"),
        (pvh_elf(), "decompressor", "no bzImage, so there is no decompressor in it"),
        (bzimage(b"unheard of"), "pvh", "a payload in no known compression format .*; use --boot decompressor"),
    ],
)
def test_protocols_that_do_not_fit(data: bytes, protocol: str, message: str) -> None:
    with pytest.raises(ImageError, match=f"^kernel vmlinux: {message}"):
        loader.plan(kernel(data), protocol)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())

    image = loader.read_image(path)

    assert (image.path, image.data, image.container) == (str(path), bzimage(), "")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    with pytest.raises(ImageError, match=r"^kernel .*/empty: the file is empty"):
        loader.plan(loader.read_image(tmp_path / "empty"))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressed_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "vmlinux").write_bytes(compress(name, pvh_elf()))

    image = loader.read_image(tmp_path / "vmlinux")

    assert (image.data, image.container) == (pvh_elf(), name)


def test_damaged_compressed_file(tmp_path: Path) -> None:
    (tmp_path / "vmlinux.gz").write_bytes(gzip.compress(pvh_elf())[:-20])

    with pytest.raises(ImageError, match=r"^kernel .*/vmlinux\.gz: its gzip data ends early; the file is damaged"):
        loader.read_image(tmp_path / "vmlinux.gz")


def test_compressed_initrd_as_kernel(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(gzip.compress(b"070701" + b"0" * 104))

    with pytest.raises(ImageError, match="a cpio archive, so probably an initrd"):
        loader.plan(loader.read_image(tmp_path / "initrd"))


def test_file_compressed_twice(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(gzip.compress(gzip.compress(pvh_elf())))

    with pytest.raises(ImageError, match="a gzip file within a gzip file; decompress it first"):
        loader.plan(loader.read_image(tmp_path / "kernel"))


def test_own_interpreter_is_a_program() -> None:
    with pytest.raises(ImageError, match="a program for Linux, not a kernel"):
        loader.plan(loader.read_image(sys.executable))
