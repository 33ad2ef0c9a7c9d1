"""The MP table as a kernel without ACPI would find and read it."""

from __future__ import annotations

import struct

import pytest

from kvmpy.core.memory import GuestMemory, Region
from kvmpy.x86 import layout, mptable

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}  # MP 1.4, table 4-3


def search(mem: GuestMemory) -> int | None:
    """The floating pointer in the BIOS area, as MP 1.4, 4.1 has it found: by signature, on 16 bytes, summing to 0."""
    for gpa in range(0xF0000, 0x100000, 16):
        block = mem.read(gpa, 16)
        if block[:4] == b"_MP_" and sum(block) & 0xFF == 0:
            return gpa
    return None


def table_for(cpus: int) -> tuple[bytes, list[bytes]]:
    """(header, entries) of the table found in memory."""
    mem = GuestMemory([Region(0, memoryview(bytearray(layout.HIGH_RAM)))])
    mptable.write(mem, range(cpus))
    pointer = search(mem)
    assert pointer is not None
    (at,) = struct.unpack("<I", mem.read(pointer + 4, 4))
    (length,) = struct.unpack("<H", mem.read(at + 4, 2))
    table = mem.read(at, length)
    assert sum(table) & 0xFF == 0
    entries, offset = [], 44
    while offset < length:
        size = SIZES[table[offset]]
        entries.append(table[offset : offset + size])
        offset += size
    return table[:44], entries


def of_type(entries: list[bytes], number: int) -> list[bytes]:
    return [entry for entry in entries if entry[0] == number]


@pytest.mark.parametrize("cpus", [1, 2, 254])
def test_header_counts_what_follows(cpus: int) -> None:
    header, entries = table_for(cpus)

    assert header[:4] == b"PCMP" and header[6] == 4
    assert struct.unpack_from("<HI", header, 34) == (len(entries), 0xFEE00000)
    assert len(of_type(entries, 0)) == cpus


def test_entries_come_in_the_order_of_their_types() -> None:
    _, entries = table_for(4)

    types = [entry[0] for entry in entries]

    assert types == sorted(types)


def test_processors_are_enabled_and_the_first_boots() -> None:
    _, entries = table_for(3)

    processors = [(entry[1], entry[3]) for entry in of_type(entries, 0)]

    assert processors == [(0, 3), (1, 1), (2, 1)]


@pytest.mark.parametrize("cpus", [1, 2, 254])
def test_ioapic_id_is_its_own(cpus: int) -> None:
    _, entries = table_for(cpus)

    (ioapic,) = of_type(entries, 2)

    assert ioapic[1] not in range(cpus) and ioapic[1] != 0xFF
    assert struct.unpack_from("<BI", ioapic, 3) == (1, 0xFEC00000)
    assert {entry[6] for entry in of_type(entries, 3)} == {ioapic[1]}


def test_each_pin_of_the_ioapic_is_the_isa_interrupt_of_its_number() -> None:
    _, entries = table_for(2)

    (bus,) = of_type(entries, 1)
    routes = [(entry[4], entry[5], entry[7]) for entry in of_type(entries, 3)]

    assert bus == b"\x01\x00ISA   "
    assert routes == [(0, pin, pin) for pin in range(24)]


def test_local_interrupts_are_extint_for_the_boot_cpu_and_nmi_for_all() -> None:
    _, entries = table_for(2)

    local = [(entry[1], entry[6], entry[7]) for entry in of_type(entries, 4)]

    assert local == [(3, 0, 0), (1, 0xFF, 1)]


def test_more_cpus_than_the_specification_knows_get_no_table() -> None:
    mem = GuestMemory([Region(0, memoryview(bytearray(layout.HIGH_RAM)))])

    mptable.write(mem, range(mptable.MAX_CPUS + 1))

    assert search(mem) is None


def test_largest_table_stays_in_the_bios_area() -> None:
    size = len(mptable.build(range(mptable.MAX_CPUS)))

    assert layout.RSDP + 36 <= layout.MPTABLE
    assert layout.MPTABLE + size <= layout.HIGH_RAM
