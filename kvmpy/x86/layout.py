"""Every guest-physical address, port and interrupt of the machine, once."""

from __future__ import annotations

from ..core.record import Record

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * KIB

# Low memory, written before the first instruction. All of it is RAM that Linux keeps off until it has read it.
GDT = 0x0500  # boot GDT; six descriptors
PVH_START_INFO = 0x6000  # hvm_start_info, its memory map and module list follow in the same page
ZERO_PAGE = 0x7000  # boot_params (Documentation/arch/x86/boot.rst), one page
BOOT_SECTOR = 0x7C00  # flat images: where a BIOS puts a boot sector; they get none of the tables around it
BOOT_STACK = 0x8FF0
PAGE_TABLES = 0x9000  # PML4, PDPT, then four page directories: 4 GiB mapped one to one in 2 MiB pages
MULTIBOOT_INFO = 0xF000
CMDLINE = 0x20000  # up to CMDLINE_MAX bytes, the NUL included
CMDLINE_MAX = 64 * KIB
EBDA = 0x9FC00  # end of conventional memory
FIRMWARE = 0xC0000  # option ROMs and BIOS in a PC; here RAM that the memory map reserves for the tables below
ACPI_TABLES = FIRMWARE  # up to the BIOS area: 192 KiB hold the tables of 4096 CPUs
BIOS = 0xF0000  # searched for both root pointers (ACPI 6.4, 5.2.5.1; MP 1.4, 4)
RSDP = BIOS
MPTABLE = BIOS + 0x40  # the MP floating pointer, its table behind it
RESET_VECTOR = 0xFFFF0  # where a BIOS has its entry, and guests jump to restart; 16 bytes
TABLES_END = 0xF8000  # end of both; with 254 CPUs the MP table ends below 0xF1800
# What is written below 1 MiB besides the kernel: images must keep off these (start, end), and may use the rest.
BOOT_TABLES = ((0, MULTIBOOT_INFO + PAGE), (CMDLINE, CMDLINE + CMDLINE_MAX), (FIRMWARE, TABLES_END))
HIGH_RAM = 0x100000  # 1 MiB: protected-mode kernels go here and above

# The hole below 4 GiB: no RAM, so that devices, the APICs and KVM's own pages have addresses.
HOLE = 0xC0000000
HOLE_END = 1 << 32
BOOT_TIMER = 0xC0000000  # Firecracker's boot timer, so that the same guest gives comparable figures
MMIO_DEVICES = 0xD0000000  # handed out upwards, one page a device
MMIO_DEVICES_END = 0xE0000000
PCI_ECAM = 0xE0000000  # configuration spaces of bus 0 (PCI Firmware 3.2, 4.1), one page a function
PCI_ECAM_SIZE = 0x100000
PCI_WINDOW = 0xE1000000  # where BARs can be
PCI_WINDOW_END = 0xF0000000
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000
KVM_IDENTITY_MAP = 0xFFFBC000  # one page (KVM_SET_IDENTITY_MAP_ADDR)
KVM_TSS = 0xFFFBD000  # three pages (KVM_SET_TSS_ADDR)

# I/O ports.
PORT_POST = 0x80  # POST codes; Linux writes here to wait a microsecond
PORT_92 = 0x92  # fast reset of the PS/2
PORT_CMOS = 0x70
PORT_I8042 = 0x60
PORT_COM1 = 0x3F8
PORT_DEBUGCON = 0x402  # SeaBIOS and OVMF debug output
PORT_BOCHS = 0xE9  # Bochs debug output
PORT_EXIT = 0x502  # kvmpy's own: the exit status of the guest's job (guests/init.c)
PORT_PVPANIC = 0x505
PORT_RESET_CONTROL = 0xCF9
PORT_ACPI_PM = 0x600  # sleep control, sleep status, reset
PORT_GED = 0x604  # which event the generic event device reports

# Interrupts: global system interrupt n is pin n of the in-kernel IOAPIC, for n below 16 of the PICs as well.
IOAPIC_PINS = 24
IRQ_I8042 = 1
IRQ_COM1 = 4
IRQ_GED = 9
IRQ_DEVICES = range(5, IOAPIC_PINS)  # what devices may get; the fixed ones below are taken out
IRQ_TAKEN = (8, IRQ_GED, 13)

MAX_RAM = 1 << 40  # a mistake in --mem ends here, not in the page tables of the host


class E820:
    """Address range types (ACPI 6.4, 15)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


class Span(Record, frozen=True):
    """`size` bytes of guest-physical address space from `base` on, of one type."""

    base: int
    size: int
    type: int  # of E820

    @property
    def end(self) -> int:
        return self.base + self.size


def ram(size: int) -> list[tuple[int, int]]:
    """(guest address, size) of the RAM slots of a machine with `size` bytes: below the hole, then from 4 GiB on."""
    low = min(size, HOLE)
    slots = [(0, low)]
    if size > low:
        slots.append((HOLE_END, size - low))
    return slots


def e820(size: int) -> list[Span]:
    """The memory map a guest with `size` bytes of RAM is told, from the same table as the slots."""
    spans = [
        Span(0, EBDA, E820.RAM),
        Span(EBDA, 0xA0000 - EBDA, E820.RESERVED),
        Span(FIRMWARE, HIGH_RAM - FIRMWARE, E820.RESERVED),
    ]
    for base, length in ram(size):
        start = max(base, HIGH_RAM)
        spans.append(Span(start, base + length - start, E820.RAM))
    return spans
