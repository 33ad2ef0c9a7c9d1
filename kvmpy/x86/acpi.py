"""The ACPI tables of the machine: hardware-reduced ACPI 6.4, found through the RSDP in the BIOS area."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..core.errors import ConfigError
from ..core.memory import GuestMemory
from ..core.wire import U8, U16, U32, U64, Overlay, Wire, b4, b6, b8, u8, u32, u64
from . import aml, layout

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"KVMPY ", b"KVMPY   ", b"KVMP"
CREATOR_REVISION = 1

# What the registers behind layout.PORT_ACPI_PM and layout.PORT_GED mean to the guest.
SLEEP_CONTROL, SLEEP_STATUS, RESET = layout.PORT_ACPI_PM, layout.PORT_ACPI_PM + 1, layout.PORT_ACPI_PM + 2
RESET_VALUE = 1
S5 = 5  # SLP_TYP of soft off
EVENT_POWER_BUTTON = 1 << 0
NOTIFY_PRESSED = 0x80  # ACPI 6.4, 5.6.6: S0 power button pressed

MAX_PROCESSORS = 0x1000  # C000 to CFFF: the names of the processor objects
X2APIC_FROM = 255  # ACPI 6.4, 5.2.12.12: ids from here on need an x2APIC structure


class Header(Wire):
    """System description table header (ACPI 6.4, 5.2.6)."""

    signature: b4
    length: u32
    revision: u8
    checksum: u8
    oem_id: b6
    oem_table_id: b8
    oem_revision: u32
    creator_id: b4
    creator_revision: u32


class GenericAddress(Wire):
    """Generic address structure (ACPI 6.4, 5.2.3.2)."""

    space: u8
    bit_width: u8
    bit_offset: u8
    access_size: u8
    address: u64


class Fadt(Overlay, size=276):
    """Fixed ACPI description table, revision 6 (ACPI 6.4, 5.2.9); what reduced hardware ignores stays 0."""

    DSDT = U32(40)
    IAPC_BOOT_ARCH = U16(109)
    Flags = U32(112)
    RESET_VALUE = U8(128)
    FADT_Minor_Version = U8(131)
    X_DSDT = U64(140)

    RESET_REG, SLEEP_CONTROL_REG, SLEEP_STATUS_REG = 116, 244, 256  # offsets of generic addresses

    # Fixed feature flags (5.2.9, table 5.10).
    WBINVD = 1 << 0
    PWR_BUTTON = 1 << 4  # no fixed power button: there is a control method device
    SLP_BUTTON = 1 << 5  # no fixed sleep button
    FIX_RTC = 1 << 6  # the RTC wakes through no fixed register
    RESET_REG_SUP = 1 << 10
    HW_REDUCED_ACPI = 1 << 20

    # IA-PC boot architecture flags (5.2.9.3): neither LEGACY_DEVICES nor 8042, since the namespace lists all there is.
    VGA_NOT_PRESENT = 1 << 2


def checksum(data: bytes) -> int:
    """The byte that makes the sum of `data` and itself 0 modulo 256."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = Header(
        signature, Header.SIZE + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, CREATOR_REVISION
    )
    header.checksum = checksum(bytes(header) + body)
    return bytes(header) + body


def pci_bridge() -> bytes:
    """The root of bus 0, without interrupt pins, and the ECAM as a resource that is taken (PCI Firmware 3.2, 4.1.2)."""
    window = aml.dword_memory(layout.PCI_WINDOW, layout.PCI_WINDOW_END - layout.PCI_WINDOW)
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name("_SEG", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.bus_numbers(0, 0), window)),
    ) + aml.device(
        "ECAM",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.memory32_fixed(layout.PCI_ECAM, layout.PCI_ECAM_SIZE))),
    )


def mcfg() -> bytes:
    """Where the configuration spaces are (PCI Firmware 3.2, 4.1.2): segment 0, bus 0."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", layout.PCI_ECAM, 0, 0, 0))


def dsdt(cpus: Sequence[int], virtio: Sequence[tuple[int, int, int]] = (), *, pci: bool = False) -> bytes:
    """Differentiated system description table: the devices that cannot be found by probing."""
    if len(cpus) > MAX_PROCESSORS:
        raise ConfigError(f"{len(cpus)} CPUs are too many for ACPI", f"use {MAX_PROCESSORS} or fewer")
    # A Device, not the Processor operator: its _UID can match x2APIC entries, and ACPI 6.4 has dropped the other.
    processors = [
        aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(apic_id)))
        for index, apic_id in enumerate(cpus)
    ]
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.io(layout.PORT_COM1, 8), aml.irq_no_flags(layout.IRQ_COM1))),
    )
    rtc = aml.device(  # no interrupt: the clock has no alarm
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io(layout.PORT_CMOS, 2))),
    )
    power_button = aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")))
    events = aml.device(  # 5.6.9: interrupt-signalled events
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.interrupt(layout.IRQ_GED))),
        aml.operation_region("REGS", aml.SYSTEM_IO, layout.PORT_GED, 1),
        aml.byte_field("REGS", [("EVTS", 8)]),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.path("EVTS"), aml.LOCAL0),  # reading clears
            aml.if_(aml.and_(aml.LOCAL0, aml.integer(EVENT_POWER_BUTTON)), aml.notify("PWRB", NOTIFY_PRESSED)),
            serialized=True,
        ),
    )
    virtio_mmio = [
        aml.device(
            f"V{index:03X}",
            aml.name("_HID", aml.string("LNRO0005")),
            aml.name("_UID", aml.integer(index)),
            aml.name("_CCA", aml.ONE),
            aml.name("_CRS", aml.resources(aml.memory32_fixed(base, size), aml.interrupt(gsi))),
        )
        for index, (base, size, gsi) in enumerate(virtio)
    ]
    s5 = aml.name("_S5", aml.package(aml.integer(S5), aml.ZERO, aml.ZERO, aml.ZERO))  # 7.4.2.6
    return _table(
        b"DSDT",
        2,  # integers of 64 bits
        aml.scope("_SB", *processors, com1, rtc, power_button, events, *virtio_mmio, pci_bridge() if pci else b"") + s5,
    )


def fadt(dsdt_gpa: int) -> bytes:
    """Fixed ACPI description table: soft off and reset through layout.PORT_ACPI_PM."""
    table = Fadt()
    table.DSDT = table.X_DSDT = dsdt_gpa
    table.IAPC_BOOT_ARCH = Fadt.VGA_NOT_PRESENT
    table.Flags = (
        Fadt.WBINVD | Fadt.PWR_BUTTON | Fadt.SLP_BUTTON | Fadt.FIX_RTC | Fadt.RESET_REG_SUP | Fadt.HW_REDUCED_ACPI
    )
    table.RESET_VALUE = RESET_VALUE
    table.FADT_Minor_Version = 4
    for at, port in (
        (Fadt.RESET_REG, RESET),
        (Fadt.SLEEP_CONTROL_REG, SLEEP_CONTROL),
        (Fadt.SLEEP_STATUS_REG, SLEEP_STATUS),
    ):
        GenericAddress(aml.SYSTEM_IO, bit_width=8, bit_offset=0, access_size=1, address=port).write(table.buf, at)
    return _table(b"FACP", 6, bytes(table.buf[Header.SIZE :]))


def madt(cpus: Sequence[int]) -> bytes:
    """Multiple APIC description table (5.2.12) of the CPUs with these APIC ids, the boot CPU first.

    No interrupt source override: with KVM's own routing, ISA interrupt n is pin n of the IOAPIC, 0 included.
    """
    enabled = 1
    any_processor, any_x2apic_processor = 0xFF, 0xFFFFFFFF
    pcat_compat = 1  # there are two 8259s; they must be masked
    body = struct.pack("<II", layout.LAPIC, pcat_compat)
    for apic_id in cpus:
        if apic_id < X2APIC_FROM:
            body += struct.pack("<BBBBI", 0, 8, apic_id, apic_id, enabled)  # 5.2.12.2: uid, APIC id
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, enabled, apic_id)  # 5.2.12.12: x2APIC id, flags, uid
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0)  # 5.2.12.3: id 0, interrupts from 0 on
    body += struct.pack("<BBBHB", 4, 6, any_processor, 0, 1)  # 5.2.12.7: NMI is LINT1
    if max(cpus) >= X2APIC_FROM:
        body += struct.pack("<BBHIB3x", 10, 12, 0, any_x2apic_processor, 1)  # 5.2.12.13
    return _table(b"APIC", 5, body)


def rsdp(xsdt_gpa: int) -> bytes:
    """Root system description pointer, revision 2 (5.2.5.3), without an RSDT."""
    v1 = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, 0)
    v1 = v1[:8] + bytes([checksum(v1)]) + v1[9:]
    v2 = v1 + struct.pack("<IQ", 36, xsdt_gpa)
    return v2 + bytes([checksum(v2), 0, 0, 0])


def build(
    cpus: Sequence[int], virtio: Sequence[tuple[int, int, int]] = (), *, pci: bool = False
) -> list[tuple[int, bytes]]:
    """(guest address, bytes) of each table: RSDP, DSDT, FADT, MADT, XSDT; with `pci` the MCFG before the last.

    `cpus` are APIC ids, the boot CPU first; `virtio` is (base, bytes, gsi) of each virtio-mmio device, in the order
    in which the guest is to find them. Raises ConfigError when the tables do not fit.
    """
    tables: list[tuple[int, bytes]] = []
    gpa = layout.ACPI_TABLES

    def place(table: bytes) -> int:
        nonlocal gpa
        here = gpa
        gpa += -(-len(table) // 16) * 16
        tables.append((here, table))
        return here

    found = [place(fadt(place(dsdt(cpus, virtio, pci=pci)))), place(madt(cpus))]
    if pci:
        found.append(place(mcfg()))
    xsdt_gpa = place(_table(b"XSDT", 1, struct.pack(f"<{len(found)}Q", *found)))
    size, room = gpa - layout.ACPI_TABLES, layout.BIOS - layout.ACPI_TABLES
    if size > room:
        raise ConfigError(f"the ACPI tables need {size} bytes and have room for {room}", "use fewer CPUs or devices")
    return [(layout.RSDP, rsdp(xsdt_gpa)), *tables]


def write(
    mem: GuestMemory, cpus: Sequence[int], virtio: Sequence[tuple[int, int, int]] = (), *, pci: bool = False
) -> int:
    """Put the tables (see `build`) into guest memory; returns the RSDP's address."""
    for gpa, table in build(cpus, virtio, pci=pci):
        mem.write(gpa, table)
    return layout.RSDP
