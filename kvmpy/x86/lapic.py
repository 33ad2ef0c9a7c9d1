"""The local APIC's two pins as firmware leaves them (MP 1.4, 3.6.2.2, virtual wire mode)."""

from __future__ import annotations

import struct

LVT_LINT0, LVT_LINT1 = 0x350, 0x360  # Intel SDM vol. 3A, table 11-1
EXTINT, NMI, MASKED = 7 << 8, 4 << 8, 1 << 16  # delivery modes and mask (figure 11-8)


def virtual_wire(state: bytes, *, boot_cpu: bool) -> bytes:
    """struct kvm_lapic_state with the NMI on LINT1, and, for the boot CPU alone, the PICs on LINT0."""
    registers = bytearray(state)
    struct.pack_into("<I", registers, LVT_LINT0, EXTINT if boot_cpu else MASKED)
    struct.pack_into("<I", registers, LVT_LINT1, NMI)
    return bytes(registers)
