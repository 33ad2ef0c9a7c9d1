"""All the code that stands in for a BIOS: at the reset vector, a guest that restarts finds the reset register.

Linux restarts so with reboot=bios and, whatever the FADT says, on hardware-reduced ACPI without EFI
(arch/x86/kernel/reboot.c, reboot_init).
"""

from __future__ import annotations

import struct

from ..core.memory import GuestMemory
from . import acpi, layout


def reset_code() -> bytes:
    """Real-mode code that resets the machine through ACPI's reset register (Intel SDM vol. 2, opcodes)."""
    return (
        struct.pack("<BH", 0xBA, acpi.RESET)  # mov dx, RESET
        + struct.pack("<BB", 0xB0, acpi.RESET_VALUE)  # mov al, RESET_VALUE
        + b"\xee"  # out dx, al
        + b"\xf4\xeb\xfd"  # hlt; jmp to the hlt
    )


def write(mem: GuestMemory) -> None:
    """Put the code at layout.RESET_VECTOR."""
    mem.write(layout.RESET_VECTOR, reset_code())
