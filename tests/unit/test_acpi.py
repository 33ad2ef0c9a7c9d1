"""The ACPI tables as a kernel would find and read them, and as the reference compiler (iasl) does."""

from __future__ import annotations

import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from kvmpy.core.errors import ConfigError
from kvmpy.core.memory import GuestMemory, Region
from kvmpy.devices import acpi_ged, acpi_pm
from kvmpy.x86 import acpi, layout

VIRTIO = [(0xD0000000, 0x1000, 5), (0xD0001000, 0x1000, 6)]


def found(cpus: int, virtio: list[tuple[int, int, int]] | None = None, *, pci: bool = False) -> dict[bytes, bytes]:
    """The tables by signature, found by following the pointers from the RSDP through guest memory."""
    mem = GuestMemory([Region(0, memoryview(bytearray(layout.HIGH_RAM)))])
    rsdp = mem.read(acpi.write(mem, range(cpus), virtio or [], pci=pci), 36)
    tables = {b"RSDP": rsdp}

    def follow(gpa: int) -> bytes:
        signature, length = struct.unpack("<4sI", mem.read(gpa, 8))
        tables[signature] = mem.read(gpa, length)
        return tables[signature]

    xsdt = follow(*struct.unpack_from("<Q", rsdp, 24))
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        follow(gpa)
    follow(*struct.unpack_from("<Q", tables[b"FACP"], 140))
    return tables


def interrupt_controllers(madt: bytes) -> list[bytes]:
    """The MADT's structures, one after the other."""
    structures, at = [], 44
    while at < len(madt):
        structures.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    return structures


def test_pointers_lead_from_the_rsdp_to_all_tables() -> None:
    tables = found(1)

    assert list(tables) == [b"RSDP", b"XSDT", b"FACP", b"APIC", b"DSDT"]
    assert tables[b"RSDP"].startswith(b"RSD PTR ")


def test_mcfg_comes_with_pci_and_names_one_bus() -> None:
    mcfg = found(1, pci=True)[b"MCFG"]

    assert list(found(1, pci=True)) == [b"RSDP", b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]
    assert struct.unpack("<8xQHBB4x", mcfg[36:]) == (layout.PCI_ECAM, 0, 0, 0)


def test_fadt_does_not_forbid_message_signalled_interrupts() -> None:
    (boot_architecture,) = struct.unpack_from("<H", found(1, pci=True)[b"FACP"], 109)

    assert boot_architecture & 1 << 3 == 0


@pytest.mark.parametrize("cpus", [1, 2, 254, 255, 256, 4096])
def test_all_bytes_of_each_table_sum_to_zero(cpus: int) -> None:
    tables = found(cpus, VIRTIO, pci=True)

    sums = {signature: sum(table) & 0xFF for signature, table in tables.items()}

    assert set(sums.values()) == {0}
    assert sum(tables[b"RSDP"][:20]) & 0xFF == 0


def test_rsdp_is_where_kernels_search_and_aligned() -> None:
    assert 0xE0000 <= layout.RSDP < 0x100000
    assert layout.RSDP % 16 == 0


@pytest.mark.parametrize("cpus", [1, 255, acpi.MAX_PROCESSORS])
def test_tables_lie_apart_in_reserved_memory(cpus: int) -> None:
    placed = sorted((gpa, gpa + len(table)) for gpa, table in acpi.build(range(cpus), VIRTIO, pci=True))

    reserved = [span for span in layout.e820(layout.GIB) if span.type is layout.E820.RESERVED]

    assert all(end <= start for (_, end), (start, _) in pairwise(placed))
    assert all(any(span.base <= start and end <= span.end for span in reserved) for start, end in placed)
    assert all(start == layout.RSDP or end <= layout.BIOS for start, end in placed)


def test_more_processors_than_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="4097 CPUs"):
        acpi.build(range(acpi.MAX_PROCESSORS + 1))


def test_more_devices_than_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="room for"):
        acpi.build(range(acpi.MAX_PROCESSORS), VIRTIO * 100)


def test_fadt_declares_reduced_hardware_with_reset_and_sleep_registers() -> None:
    fadt = found(1)[b"FACP"]

    (flags,) = struct.unpack_from("<I", fadt, 112)
    registers = {at: struct.unpack_from("<BBBBQ", fadt, at) for at in (116, 244, 256)}

    assert fadt[8] == 6 and len(fadt) == 276
    assert flags & (1 << 20 | 1 << 10 | 1 << 4) == 1 << 20 | 1 << 10 | 1 << 4
    assert registers == {116: (1, 8, 0, 1, 0x602), 244: (1, 8, 0, 1, 0x600), 256: (1, 8, 0, 1, 0x601)}
    assert fadt[128] == 1  # value that resets


def test_fadt_hides_the_keyboard_controller_but_not_the_clock() -> None:
    (boot_architecture,) = struct.unpack_from("<H", found(1)[b"FACP"], 109)

    assert boot_architecture & (1 << 1 | 1 << 5) == 0


def test_tables_and_devices_agree() -> None:
    """Neither layer may import the other, so each has the numbers of their common interface."""
    assert acpi.S5 == acpi_pm.S5
    assert acpi.RESET_VALUE == acpi_pm.RESET_VALUE
    assert acpi.EVENT_POWER_BUTTON == acpi_ged.EVENT.POWER_BUTTON


def test_madt_lists_local_apics_and_x2apics_with_matching_uids() -> None:
    structures = interrupt_controllers(found(300)[b"APIC"])

    local = [struct.unpack("<BBBBI", entry) for entry in structures if entry[0] == 0]
    x2 = [struct.unpack("<BBHIII", entry) for entry in structures if entry[0] == 9]

    assert local == [(0, 8, apic_id, apic_id, 1) for apic_id in range(255)]
    assert x2 == [(9, 16, 0, apic_id, 1, apic_id) for apic_id in range(255, 300)]


def test_madt_has_one_ioapic_for_all_interrupts_and_nmi_on_lint1() -> None:
    structures = interrupt_controllers(found(1)[b"APIC"])

    assert struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0) in structures
    assert [entry for entry in structures if entry[0] in (4, 10)] == [bytes([4, 6, 0xFF, 0, 0, 1])]


def test_madt_gives_x2apics_their_own_nmi() -> None:
    structures = interrupt_controllers(found(256)[b"APIC"])

    assert struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1) in structures


def disassembled(tmp_path: Path, table: bytes) -> str:
    source = tmp_path / "table.dat"
    source.write_bytes(table)
    subprocess.run(["iasl", "-d", source], check=True, capture_output=True, timeout=60)
    return source.with_suffix(".dsl").read_text()


needs_iasl = pytest.mark.skipif(
    shutil.which("iasl") is None, reason="iasl is not installed (Debian package acpica-tools)"
)


@needs_iasl
@pytest.mark.parametrize("cpus", [1, 3, 300])
@pytest.mark.parametrize("signature", [b"DSDT", b"FACP", b"APIC", b"MCFG", b"XSDT"], ids=bytes.decode)
def test_iasl_recompiles_each_table_to_the_same_bytes(tmp_path: Path, signature: bytes, cpus: int) -> None:
    table = found(cpus, VIRTIO, pci=True)[signature]
    (tmp_path / "again.dsl").write_text(disassembled(tmp_path, table))

    result = subprocess.run(
        ["iasl", "-p", tmp_path / "again", tmp_path / "again.dsl"], capture_output=True, text=True, timeout=60
    )

    assert "0 Errors, 0 Warnings, 0 Remarks" in result.stdout
    assert (tmp_path / "again.aml").read_bytes()[36:] == table[36:]


@needs_iasl
def test_namespace_as_iasl_reads_it(tmp_path: Path) -> None:
    text = disassembled(tmp_path, found(2, VIRTIO)[b"DSDT"])

    lines = [" ".join(line.split("//")[0].split("/*")[0].split()) for line in text.splitlines()]
    ids = [line for line in lines if line.startswith("Name (_HID")]

    assert ids == [
        'Name (_HID, "ACPI0007"',
        'Name (_HID, "ACPI0007"',
        'Name (_HID, EisaId ("PNP0501")',
        'Name (_HID, EisaId ("PNP0B00")',
        'Name (_HID, EisaId ("PNP0C0C")',
        'Name (_HID, "ACPI0013"',
        'Name (_HID, "LNRO0005")',
        'Name (_HID, "LNRO0005")',
    ]
    assert lines.index("0xD0000000,") < lines.index("0xD0001000,")
    assert "OperationRegion (REGS, SystemIO, 0x0604, One)" in lines
    assert "Name (_S5, Package (0x04)" in lines


@needs_iasl
def test_pci_as_iasl_reads_it(tmp_path: Path) -> None:
    text = disassembled(tmp_path, found(1, pci=True)[b"DSDT"])
    lines = [" ".join(line.split("//")[0].split("/*")[0].split()) for line in text.splitlines()]

    bridge = lines[lines.index("Device (PCI0)") : lines.index("Device (ECAM)")]
    ecam = lines[lines.index("Device (ECAM)") :]

    assert 'Name (_HID, EisaId ("PNP0A08")' in bridge
    assert "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode," in bridge
    assert "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite," in bridge
    assert f"0x{layout.PCI_WINDOW:08X}," in bridge
    assert f"0x{layout.PCI_WINDOW_END - 1:08X}," in bridge
    assert 'Name (_HID, EisaId ("PNP0C02")' in ecam
    assert f"0x{layout.PCI_ECAM:08X}," in ecam


def test_pci_has_addresses_of_its_own() -> None:
    """The ECAM and the window lie in the hole, apart from each other and from what KVM answers itself."""
    spans = [
        (layout.HOLE, layout.MMIO_DEVICES),
        (layout.MMIO_DEVICES, layout.MMIO_DEVICES_END),
        (layout.PCI_ECAM, layout.PCI_ECAM + layout.PCI_ECAM_SIZE),
        (layout.PCI_WINDOW, layout.PCI_WINDOW_END),
        (layout.IOAPIC, layout.HOLE_END),
    ]

    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
