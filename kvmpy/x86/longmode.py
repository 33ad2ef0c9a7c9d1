"""The state in which the boot CPU enters a guest: real mode, flat protected mode, or long mode with an identity map."""

from __future__ import annotations

import struct

from ..core.memory import GuestMemory
from ..core.record import replace
from ..kvm.state import DescriptorTable, Segment, Sregs
from . import layout

# Intel SDM vol. 3A, 2.5 and 2.2.1.
CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10

# x87 and SSE control words after FNINIT and reset (SDM vol. 1, 8.1.5 and 10.2.3), for KVM_SET_FPU.
FCW = 0x37F
MXCSR = 0x1F80

# Selectors: the Linux boot protocol names the first two __BOOT_CS and __BOOT_DS (Documentation/arch/x86/boot.rst).
BOOT_CS, BOOT_DS, BOOT_TSS = 0x10, 0x18, 0x20

CODE, DATA = 0xB, 0x3  # readable code, writable data, both accessed (SDM vol. 3A, 3.4.5.1)
BUSY_TSS = 0xB  # 32-bit, or 64-bit in long mode (SDM vol. 3A, 3.5)

# Page table entries (SDM vol. 3A, 4.5.4).
PRESENT, WRITABLE, LARGE = 1 << 0, 1 << 1, 1 << 7
ENTRIES = 512  # per page
LARGE_PAGE = 2 * layout.MIB


def _flat(selector: int, type: int, *, long: bool = False) -> Segment:
    """Base 0, limit 4 GiB, ring 0; code of 64 bits when `long`, else 32 bits."""
    return Segment(selector=selector, limit=0xFFFFFFFF, type=type, present=1, s=1, g=1, db=int(not long), l=int(long))


def descriptor(segment: Segment) -> int:
    """The eight bytes of a segment as the GDT has them (SDM vol. 3A, 3.4.5)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        limit & 0xFFFF
        | (segment.base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def _load(sregs: Sregs, mem: GuestMemory, code: Segment) -> None:
    """Fill segment registers and GDT with flat code and data and a busy TSS."""
    data = _flat(BOOT_DS, DATA)
    tss = Segment(selector=BOOT_TSS, limit=0x67, type=BUSY_TSS, present=1)
    # In long mode, a TSS takes two places.
    gdt = struct.pack("<6Q", 0, 0, descriptor(code), descriptor(data), descriptor(tss), 0)
    mem.write(layout.GDT, gdt)
    sregs.gdt = DescriptorTable(layout.GDT, len(gdt) - 1)
    sregs.idt = DescriptorTable(0, 0)
    sregs.cs, sregs.tr = code, tss
    _set_data(sregs, data)


def _set_data(sregs: Sregs, data: Segment) -> None:
    sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss = (replace(data) for _ in range(5))


def real_mode(sregs: Sregs) -> None:
    """16-bit real mode with all segments at 0: RIP is the linear address, below 64 KiB."""
    sregs.cs = Segment(limit=0xFFFF, type=CODE, present=1, s=1)
    _set_data(sregs, Segment(limit=0xFFFF, type=DATA, present=1, s=1))
    sregs.idt = DescriptorTable(0, 0x3FF)
    sregs.cr0 &= ~(CR0_PE | CR0_PG)


def protected_mode(sregs: Sregs, mem: GuestMemory) -> None:
    """32-bit flat segments, paging off, as PVH (Xen, docs/misc/pvh.pandoc) and multiboot (0.6.96, 3.2) have them.

    Raises GuestMemoryError when there is no RAM for the GDT.
    """
    _load(sregs, mem, _flat(BOOT_CS, CODE))
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_PE | CR0_ET, 0, 0, 0


def long_mode(sregs: Sregs, mem: GuestMemory) -> None:
    """64-bit mode with the low 4 GiB mapped one to one, as the 64-bit boot protocol has it.

    Raises GuestMemoryError when there is no RAM for the GDT or the page tables.
    """
    _load(sregs, mem, _flat(BOOT_CS, CODE, long=True))
    sregs.cr3 = identity_map(mem)
    sregs.cr4 = CR4_PAE
    sregs.efer = EFER_LME | EFER_LMA
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG


def identity_map(mem: GuestMemory) -> int:
    """Write tables at layout.PAGE_TABLES that map 4 GiB one to one in 2 MiB pages; returns the value for CR3."""
    pml4 = layout.PAGE_TABLES
    pdpt = pml4 + layout.PAGE
    directories = pdpt + layout.PAGE
    table = PRESENT | WRITABLE
    gibs = layout.HOLE_END // layout.GIB
    mem.write(pml4, struct.pack("<Q", pdpt | table).ljust(layout.PAGE, b"\0"))
    pointers = (directories + index * layout.PAGE | table for index in range(gibs))
    mem.write(pdpt, struct.pack(f"<{gibs}Q", *pointers).ljust(layout.PAGE, b"\0"))
    pages = range(table | LARGE, layout.HOLE_END, LARGE_PAGE)
    mem.write(directories, struct.pack(f"<{gibs * ENTRIES}Q", *pages))
    return pml4
