"""The code at the reset vector, as a disassembler reads it."""

from __future__ import annotations

import capstone

from kvmpy.core.memory import GuestMemory, Region
from kvmpy.x86 import acpi, bios, layout, mptable


def test_reset_vector_writes_the_reset_register_and_then_only_halts() -> None:
    mem = GuestMemory([Region(0, memoryview(bytearray(layout.HIGH_RAM)))])
    acpi.write(mem, range(acpi.MAX_PROCESSORS))
    mptable.write(mem, range(mptable.MAX_CPUS))
    bios.write(mem)

    code = mem.read(0xFFFF0, 16)
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_16)
    lines = [f"{address:#x} {name} {args}".strip() for address, _, name, args in decoder.disasm_lite(code, 0xFFF0)]

    assert lines[:5] == [
        "0xfff0 mov dx, 0x602",
        "0xfff3 mov al, 1",
        "0xfff5 out dx, al",
        "0xfff6 hlt",
        "0xfff7 jmp 0xfff6",
    ]
