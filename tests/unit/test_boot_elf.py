"""ELF kernels: what is read out of them, and every way they can be wrong."""

from __future__ import annotations

import struct

import pytest
from images import BASE, MIB, TEXT, Load, elf, note, pvh_elf, pvh_note

from kvmpy.boot.elf import Elf, parse
from kvmpy.core.errors import ImageError


def parsed(data: bytes) -> Elf:
    return parse(memoryview(data))


def refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        parsed(data)
    assert caught.value.remedy


def patched(data: bytes, offset: int, code: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<" + code, changed, offset, value)
    return bytes(changed)


# Offsets in the images that `elf` makes: Elf64_Ehdr, then the first Elf64_Phdr at 64.
E_PHOFF, E_PHENTSIZE, E_PHNUM = 32, 54, 56
P_OFFSET, P_PADDR, P_FILESZ, P_MEMSZ = 64 + 8, 64 + 24, 64 + 32, 64 + 40


@pytest.mark.parametrize("bits", [32, 64])
def test_pvh_kernel(bits: int) -> None:
    image = parsed(pvh_elf(bits))

    assert (image.bits, image.entry, image.pvh_entry) == (bits, BASE, BASE)
    assert [(segment.base, segment.size) for segment in image.segments] == [(BASE, 3 * MIB)]
    assert image.segments[0].content[: len(TEXT)] == TEXT
    assert image.end == BASE + 3 * MIB


def test_kernel_without_notes_has_no_pvh_entry() -> None:
    assert parsed(elf()).pvh_entry is None


@pytest.mark.parametrize(
    "notes",
    [
        note(b"Xen\0", 7, b"2.6\0") + note(b"GNU\0", 3, bytes(20)) + pvh_note(),
        note(b"Linux\0", 257, b"") + pvh_note(),  # a name of 6, padded to 8
        note(b"", 0, b"") + pvh_note(),
        note(b"Xen\0", 18, struct.pack("<I", BASE)),
        pvh_note() + bytes(11),  # less than a note
    ],
)
def test_pvh_note_among_others(notes: bytes) -> None:
    assert parsed(elf(notes=notes)).pvh_entry == BASE


def test_note_of_another_owner_is_not_the_pvh_entry() -> None:
    assert parsed(elf(notes=note(b"Zen\0", 18, bytes(8)))).pvh_entry is None


def test_segments_with_nothing_in_memory_are_left_out() -> None:
    image = parsed(elf([Load(BASE, TEXT), Load(0, b"", 0)]))

    assert len(image.segments) == 1


def test_entry_is_taken_from_virtual_to_physical() -> None:
    image = parsed(elf([Load(MIB, TEXT, vaddr=0xC0100000)], entry=0xC0100004))

    assert image.physical_entry() == MIB + 4


@pytest.mark.parametrize(
    "notes, message",
    [
        (note(b"Xen\0", 18, b""), "a PVH note of 0 bytes instead of 4 or 8"),
        (note(b"Xen\0", 18, bytes(12)), "a PVH note of 12 bytes"),
        (struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0", "the note at 0x0 ends after the notes do"),
        (struct.pack("<III", 0xFFFFFFFF, 8, 18) + b"Xen\0", "the note at 0x0 ends after the notes do"),
        (pvh_note(BASE + 3 * MIB), "its PVH entry 0x1300000 is in no segment"),
        (pvh_note(BASE + MIB), "is in no segment"),  # in memory, but of the zeros after the file's content
        (pvh_note((1 << 32) + BASE), "is in no segment"),
        (bytes(1 << 20), "notes of more than 65536 bytes, which no kernel has"),
        (note(b"GNU\0", 1, bytes(16)), "a program for Linux, not a kernel"),
    ],
)
def test_bad_notes(notes: bytes, message: str) -> None:
    refused(elf(notes=notes), message)


def test_note_segment_of_size_0_is_no_note() -> None:
    data = elf(notes=pvh_note())

    assert parsed(patched(data, 64 + 56 + 32, "Q", 0)).pvh_entry is None


@pytest.mark.parametrize(
    "offset, code, value, message",
    [
        (E_PHNUM, "H", 65535, "65535 program headers, a kernel has at most 256"),
        (E_PHNUM, "H", 256, "ends before its program headers do"),
        (E_PHNUM, "H", 0, "an ELF file with nothing to load"),
        (E_PHOFF, "Q", (1 << 64) - 1, "ends before its program headers do"),
        (E_PHENTSIZE, "H", 0, "program headers of 0 bytes instead of 56"),
        (P_FILESZ, "Q", 1 << 40, "segment 0 ends at .*, the file has"),
        (P_FILESZ, "Q", (1 << 64) - 1, "segment 0 ends at .*, the file has"),
        (P_OFFSET, "Q", (1 << 64) - 1, "segment 0 ends at .*, the file has"),
        (P_MEMSZ, "Q", 5, r"segment 0 has more bytes in the file \(0x837\) than in memory \(0x5\)"),
        (P_PADDR, "Q", 0x7000, r"segment \[0x7000, .*\) covers the boot's own tables in \[0x0, 0x10000\)"),
        (4, "B", 3, "ELF class 3, neither 32 nor 64 bits"),
        (16, "H", 1, "an object file, not a kernel"),
        (16, "H", 4, "a core dump, not a kernel"),
        (16, "H", 999, "an ELF file of type 999, not a kernel"),
        (64, "I", 3, "a program for Linux, not a kernel"),  # PT_INTERP
    ],
)
def test_bad_headers(offset: int, code: str, value: int, message: str) -> None:
    refused(patched(elf([Load(BASE, TEXT + bytes(52))]), offset, code, value), message)


@pytest.mark.parametrize(
    "machine, name", [(183, "ARM64"), (40, "32-bit ARM"), (243, "RISC-V"), (8, "MIPS"), (0x9026, "e_machine 36902")]
)
def test_other_architectures(machine: int, name: str) -> None:
    refused(elf(machine=machine), f"for .*{name}.*use one for x86-64")


def test_big_endian() -> None:
    data = bytearray(elf())
    data[5] = 2
    data[18:20] = (22).to_bytes(2, "big")

    refused(bytes(data), "S390")


@pytest.mark.parametrize("base, end", [(0x10000, 0x20000), (0x30000, 0xC0000), (0xF8000, MIB)])
def test_segments_below_1_mib_between_the_boots_own_tables(base: int, end: int) -> None:
    assert parsed(elf([Load(base, TEXT, end - base)], entry=base)).end == end


def test_headers_that_the_linker_puts_before_1_mib() -> None:
    """With -Ttext=0x100000, GNU ld makes the page with the file's headers part of the first segment."""
    assert parsed(elf([Load(0xFF000, TEXT, 0x2000)], entry=MIB)).segments[0].base == 0xFF000


@pytest.mark.parametrize("base, end", [(0xFFFF, 0x10000), (0x1FFFF, 0x20001), (0xF7FFF, MIB), (0x10000, MIB)])
def test_segments_over_the_boots_own_tables(base: int, end: int) -> None:
    refused(elf([Load(base, b"x", end - base)], entry=base), "covers the boot's own tables")


def test_overlapping_segments() -> None:
    refused(
        elf([Load(2 * MIB, TEXT), Load(MIB, TEXT, MIB + 1)]),
        r"segments \[0x100000, 0x200001\) and \[0x200000, 0x200803\) overlap",
    )
