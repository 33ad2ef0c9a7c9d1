"""The entry states, checked as the processor would: page walks, descriptors read back from the GDT."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmpy.core.errors import GuestMemoryError
from kvmpy.core.memory import GuestMemory, Region
from kvmpy.kvm.state import Segment, Sregs
from kvmpy.x86 import layout, longmode

Enter = Callable[[Sregs, GuestMemory], None]


@pytest.fixture
def mem() -> GuestMemory:
    """RAM full of ones: whatever an entry state needs to be zero, it has to write."""
    return GuestMemory([Region(0, memoryview(bytearray(b"\xff" * layout.HIGH_RAM)))])


@pytest.fixture
def reset() -> Sregs:
    """What KVM_GET_SREGS says of a fresh vCPU, as far as it matters."""
    real = Segment(limit=0xFFFF, type=3, present=1, s=1)
    return Sregs(
        cs=Segment(base=0xFFFF0000, limit=0xFFFF, selector=0xF000, type=0xB, present=1, s=1),
        ds=real,
        es=real,
        fs=real,
        gs=real,
        ss=real,
        cr0=0x60000010,
        apic_base=0xFEE00900,
    )


def walk(mem: GuestMemory, cr3: int, linear: int) -> int | None:
    """The physical address of a linear one (SDM vol. 3A, 4.5.4), None for a page fault on a write."""
    table = cr3 & ~0xFFF
    for shift in (39, 30, 21, 12):
        entry = int.from_bytes(mem.read(table + (linear >> shift & 511) * 8, 8), "little")
        if entry & 3 != 3:
            return None
        frame = entry & 0x000FFFFFFFFFF000
        if shift == 12 or (shift < 39 and entry & 0x80):
            offset = (1 << shift) - 1
            return frame & ~offset | linear & offset
        table = frame
    return None


def from_gdt(mem: GuestMemory, sregs: Sregs, selector: int) -> Segment:
    """The segment that loading `selector` would give (SDM vol. 3A, 3.4.5)."""
    assert selector + 7 <= sregs.gdt.limit
    low, high = struct.unpack("<II", mem.read(sregs.gdt.base + selector, 8))
    g = high >> 23 & 1
    limit = low & 0xFFFF | high & 0xF0000
    return Segment(
        base=low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000,
        limit=limit << 12 | 0xFFF if g else limit,
        selector=selector,
        type=high >> 8 & 0xF,
        s=high >> 12 & 1,
        dpl=high >> 13 & 3,
        present=high >> 15 & 1,
        avl=high >> 20 & 1,
        l=high >> 21 & 1,
        db=high >> 22 & 1,
        g=g,
    )


@pytest.mark.parametrize("linear", [0, 1, 0x7000, 0x1FFFFF, 0x200000, 1 << 30, (3 << 30) + 0x123456, (1 << 32) - 1])
def test_long_mode_maps_the_low_4_gib_one_to_one(mem: GuestMemory, reset: Sregs, linear: int) -> None:
    longmode.long_mode(reset, mem)

    assert walk(mem, reset.cr3, linear) == linear


@pytest.mark.parametrize("linear", [1 << 32, 1 << 39, 1 << 46, 0xFFFFFFFF80000000])
def test_long_mode_maps_nothing_else(mem: GuestMemory, reset: Sregs, linear: int) -> None:
    longmode.long_mode(reset, mem)

    assert walk(mem, reset.cr3, linear) is None


def test_page_tables_stay_in_their_place(mem: GuestMemory) -> None:
    longmode.identity_map(mem)

    assert mem.read(layout.PAGE_TABLES - 8, 8) == b"\xff" * 8
    assert mem.read(layout.MULTIBOOT_INFO, 8) == b"\xff" * 8


def test_long_mode_control_registers(mem: GuestMemory, reset: Sregs) -> None:
    longmode.long_mode(reset, mem)

    assert reset.cr0 == 0x80000011
    assert reset.cr4 == 0x20
    assert reset.efer == 0x500
    assert reset.apic_base == 0xFEE00900


def test_protected_mode_control_registers(mem: GuestMemory, reset: Sregs) -> None:
    longmode.protected_mode(reset, mem)

    assert (reset.cr0, reset.cr3, reset.cr4, reset.efer) == (0x11, 0, 0, 0)
    assert reset.apic_base == 0xFEE00900


@pytest.mark.parametrize("enter", [longmode.long_mode, longmode.protected_mode])
def test_segments_are_what_the_gdt_says(mem: GuestMemory, reset: Sregs, enter: Enter) -> None:
    enter(reset, mem)

    for segment in (reset.cs, reset.ds, reset.es, reset.fs, reset.gs, reset.ss, reset.tr):
        assert segment == from_gdt(mem, reset, segment.selector)


@pytest.mark.parametrize("enter", [longmode.long_mode, longmode.protected_mode])
def test_selectors_are_those_of_the_boot_protocol_and_flat(mem: GuestMemory, reset: Sregs, enter: Enter) -> None:
    enter(reset, mem)

    assert (reset.cs.selector, reset.ds.selector, reset.es.selector, reset.ss.selector) == (0x10, 0x18, 0x18, 0x18)
    assert {(segment.base, segment.limit) for segment in (reset.cs, reset.ds, reset.ss)} == {(0, 0xFFFFFFFF)}
    assert (reset.tr.base, reset.tr.limit, reset.tr.type, reset.tr.s) == (0, 0x67, 0xB, 0)


def test_code_is_64_bits_wide_in_long_mode_and_32_in_protected_mode(mem: GuestMemory, reset: Sregs) -> None:
    longmode.long_mode(reset, mem)
    long = (reset.cs.l, reset.cs.db)

    longmode.protected_mode(reset, mem)

    assert long == (1, 0)
    assert (reset.cs.l, reset.cs.db) == (0, 1)


def test_real_mode_starts_at_segment_zero(reset: Sregs) -> None:
    longmode.real_mode(reset)

    segments = [reset.cs, reset.ds, reset.es, reset.fs, reset.gs, reset.ss]
    assert {(segment.base, segment.selector, segment.limit) for segment in segments} == {(0, 0, 0xFFFF)}
    assert reset.cs.type & 8 and not reset.ds.type & 8
    assert not reset.cr0 & 0x80000001


def test_segment_registers_are_separate_values(mem: GuestMemory, reset: Sregs) -> None:
    longmode.long_mode(reset, mem)

    reset.fs.base = 0x1000

    assert reset.gs.base == 0


def test_too_little_ram_is_an_error_of_guest_memory(reset: Sregs) -> None:
    mem = GuestMemory([Region(0, memoryview(bytearray(0xA000)))])

    with pytest.raises(GuestMemoryError):
        longmode.long_mode(reset, mem)
