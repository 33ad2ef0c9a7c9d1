"""The MultiProcessor Specification 1.4 table, for kernels without ACPI."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..core.memory import GuestMemory
from . import layout

MAX_CPUS = 254  # APIC ids are one byte, 255 means all, and the IOAPIC takes one
SPEC_REVISION = 4  # 1.4
LAPIC_VERSION = 0x14  # KVM's local APIC
IOAPIC_VERSION = 0x11  # KVM's IOAPIC: 82093AA
ALL_LAPICS = 0xFF

# Entry types (MP 1.4, table 4-3).
PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
# Interrupt types (MP 1.4, table 4-11).
INT, NMI, EXTINT = 0, 1, 3

CPU_ENABLED, CPU_BOOT = 1 << 0, 1 << 1  # 4.3.1
CPU_SIGNATURE = 0x600  # family 6; kernels take the rest from CPUID
CPU_FEATURES = 1 << 0 | 1 << 9  # FPU, APIC
IOAPIC_ENABLED = 1 << 0  # 4.3.3
ISA_BUS = 0


def _summed(data: bytes, at: int) -> bytes:
    """`data` with the byte at `at`, 0 so far, set such that all bytes sum to 0 modulo 256."""
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]


def build(cpus: Sequence[int]) -> bytes:
    """The floating pointer for layout.MPTABLE with the table right behind it; `cpus` are APIC ids, boot CPU first.

    Interrupt n of the ISA bus is pin n of the IOAPIC, for all its pins, as KVM's own routing has it.
    Empty when there are more than MAX_CPUS, which the specification cannot express: such a guest needs ACPI.
    """
    if len(cpus) > MAX_CPUS or max(cpus) >= MAX_CPUS:
        return b""
    ioapic_id = max(cpus) + 1
    entries = [
        struct.pack(
            "<BBBBII8x",
            PROCESSOR,
            apic_id,
            LAPIC_VERSION,
            CPU_ENABLED | (CPU_BOOT if apic_id == cpus[0] else 0),
            CPU_SIGNATURE,
            CPU_FEATURES,
        )
        for apic_id in cpus
    ]
    entries.append(struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", IOAPIC, ioapic_id, IOAPIC_VERSION, IOAPIC_ENABLED, layout.IOAPIC))
    # Flags 0: polarity and trigger mode as the bus has them, active high and edge (4.3.4).
    for pin in range(layout.IOAPIC_PINS):
        entries.append(struct.pack("<BBHBBBB", IO_INTERRUPT, INT, 0, ISA_BUS, pin, ioapic_id, pin))
    entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, EXTINT, 0, ISA_BUS, 0, cpus[0], 0))  # the PICs: LINT0
    entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, ISA_BUS, 0, ALL_LAPICS, 1))  # LINT1

    body = b"".join(entries)
    header = struct.pack(  # 4.2
        "<4sHBB8s12sIHHIHBB",
        b"PCMP",
        44 + len(body),
        SPEC_REVISION,
        0,
        b"KVMPY   ",
        b"KVMPY       ",
        0,  # no OEM table
        0,
        len(entries),
        layout.LAPIC,
        0,  # no extended table
        0,
        0,
    )
    pointer = struct.pack("<4sIBBB5x", b"_MP_", layout.MPTABLE + 16, 1, SPEC_REVISION, 0)  # 4.1; virtual wire mode
    return _summed(pointer, 10) + _summed(header + body, 7)


def write(mem: GuestMemory, cpus: Sequence[int]) -> None:
    """Put the table into guest memory, or nothing when there are more than MAX_CPUS."""
    mem.write(layout.MPTABLE, build(cpus))
