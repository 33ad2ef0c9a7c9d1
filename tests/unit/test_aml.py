"""The AML encoder against what the reference compiler (iasl) makes of the same ASL."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpy.x86 import aml

# ASL, the bytes that iasl 20200925 compiles it to, the same by the encoder.
CASES = [
    ("Name (INT0, Zero)", "08494e543000", aml.name("INT0", aml.integer(0))),
    ("Name (INT1, One)", "08494e543101", aml.name("INT1", aml.integer(1))),
    ("Name (INT8, 0xFF)", "08494e54380aff", aml.name("INT8", aml.integer(0xFF))),
    ("Name (IN16, 0x0100)", "08494e31360b0001", aml.name("IN16", aml.integer(0x100))),
    ("Name (IN32, 0xFEE00000)", "08494e33320c0000e0fe", aml.name("IN32", aml.integer(0xFEE00000))),
    ("Name (IN64, 0x123456789A)", "08494e36340e9a78563412000000", aml.name("IN64", aml.integer(0x123456789A))),
    ('Name (STR0, "kvmpy")', "08535452300d6b766d707900", aml.name("STR0", aml.string("kvmpy"))),
    ("Name (BUF0, Buffer () { 1, 2, 3 })", "084255463011060a03010203", aml.name("BUF0", aml.buffer(b"\1\2\3"))),
    (
        'Name (PKG0, Package () { 5, "a" })',
        "08504b47301207020a050d6100",
        aml.name("PKG0", aml.package(aml.integer(5), aml.string("a"))),
    ),
    ('Name (EIS0, EisaId ("PNP0C0C"))', "08454953300c41d00c0c", aml.name("EIS0", aml.eisa_id("PNP0C0C"))),
    (
        """Name (CRS0, ResourceTemplate () {
            WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0, 0, 0x00FF, 0, 0x0100)
            DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                0, 0xE1000000, 0xEFFFFFFF, 0, 0x0F000000)
        })""",
        ("0843525330112f0a2c880d00020c0000000000ff0000000001871700000c0100000000000000e1ffffffef000000000000000f7900"),
        aml.name("CRS0", aml.resources(aml.bus_numbers(0, 0xFF), aml.dword_memory(0xE1000000, 0xF000000))),
    ),
    (
        """Scope (\\_SB) {
            Device (DEV0) {
                Name (_CRS, ResourceTemplate () {
                    IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08)
                    IRQNoFlags () { 12 }
                    Memory32Fixed (ReadWrite, 0xD0000000, 0x1000)
                    Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 20 }
                })
                OperationRegion (REG0, SystemIO, 0x0604, 0x02)
                Field (REG0, ByteAcc, NoLock, Preserve) { FLDA, 8, FLDB, 3 }
                Method (MTH0, 2, Serialized) {
                    Local0 = FLDA
                    If ((Local0 & 0x04)) { Notify (DEV0, 0x80) }
                    Notify (\\_SB.DEV0, 0x81)
                    Notify (^^DEV0.DEV1.DEV2, One)
                }
                Device (DEV1) { Device (DEV2) { Name (_UID, 2) } Name (_UID, One) }
            }
        }""",
        (
            "104d0a5c5f53425f5b82440a44455630085f43525311250a224701f803f8"
            "03010822001086090001000000d00010000089060003011400000079005b"
            "8052454730010b04060a025b81105245473001464c444108464c44420314"
            "394d5448300a70464c444160a00d7b600a040086444556300a80865c2e5f"
            "53425f444556300a81865e5e2f03444556304445563144455632015b8219"
            "444556315b820c44455632085f5549440a02085f55494401"
        ),
        aml.scope(
            "\\_SB",
            aml.device(
                "DEV0",
                aml.name(
                    "_CRS",
                    aml.resources(
                        aml.io(0x3F8, 8),
                        aml.irq_no_flags(12),
                        aml.memory32_fixed(0xD0000000, 0x1000),
                        aml.interrupt(20),
                    ),
                ),
                aml.operation_region("REG0", aml.SYSTEM_IO, 0x604, 2),
                aml.byte_field("REG0", [("FLDA", 8), ("FLDB", 3)]),
                aml.method(
                    "MTH0",
                    2,
                    aml.store(aml.path("FLDA"), aml.LOCAL0),
                    aml.if_(aml.and_(aml.LOCAL0, aml.integer(4)), aml.notify("DEV0", 0x80)),
                    aml.notify("\\_SB.DEV0", 0x81),
                    aml.notify("^^DEV0.DEV1.DEV2", 1),
                    serialized=True,
                ),
                aml.device(
                    "DEV1",
                    aml.device("DEV2", aml.name("_UID", aml.integer(2))),
                    aml.name("_UID", aml.integer(1)),
                ),
            ),
        ),
    ),
]


@pytest.mark.parametrize(("asl", "golden", "term"), CASES, ids=[asl.split("\n")[0] for asl, _, _ in CASES])
def test_encodes_what_iasl_compiles(asl: str, golden: str, term: bytes) -> None:
    assert term.hex() == golden


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed (Debian package acpica-tools)")
def test_golden_bytes_are_those_of_the_iasl_at_hand(tmp_path: Path) -> None:
    source = tmp_path / "golden.asl"
    body = "\n".join(asl for asl, _, _ in CASES)
    source.write_text(f'DefinitionBlock ("", "SSDT", 2, "KVMPY ", "KVMPY   ", 1)\n{{\n{body}\n}}\n')

    # -oa: names as written, so that the bytes depend on the source alone
    subprocess.run(["iasl", "-oa", "-p", tmp_path / "golden", source], check=True, capture_output=True, timeout=30)

    assert (tmp_path / "golden.aml").read_bytes()[36:].hex() == "".join(golden for _, golden, _ in CASES)


def unsize(data: bytes) -> tuple[int, int]:
    """(PkgLength, bytes that it takes) as ACPI 6.4, 20.2.4 reads it."""
    extra = data[0] >> 6
    if not extra:
        return data[0] & 0x3F, 1
    return data[0] & 0xF | int.from_bytes(data[1 : 1 + extra], "little") << 4, 1 + extra


@pytest.mark.parametrize("size", [0, 61, 62, 63, 4092, 4093, 4094, 1048571, 1048572, 1048573, 2000000])
def test_package_length_counts_itself_and_the_body(size: int) -> None:
    encoded = aml.scope("ABCD", bytes(size))

    length, taken = unsize(encoded[1:])

    assert encoded[1 + taken :] == b"ABCD" + bytes(size)
    assert length == taken + 4 + size


def test_package_length_is_as_short_as_can_be() -> None:
    bodies = {62 - 4: 1, 63 - 4: 2, 4093 - 4: 2, 4094 - 4: 3, 0xFFFFF - 3 - 4: 3, 0x100000 - 3 - 4: 4}

    taken = {size: unsize(aml.scope("ABCD", bytes(size))[1:])[1] for size in bodies}

    assert taken == bodies


def test_names_are_padded_and_prefixed() -> None:
    assert aml.path("GED") == b"GED_"
    assert aml.path("\\") == b"\\\0"
    assert aml.path("^A.B") == b"^\x2eA___B___"
    assert aml.path("\\_SB.A.B") == b"\\\x2f\x03_SB_A___B___"


@pytest.mark.parametrize("wrong", ["TOOLONG", "com1", "1ABC", "A-B", "\\_SB.TOOLONG"])
def test_wrong_names_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="name segment"):
        aml.path(wrong)


@pytest.mark.parametrize("wrong", [-1, 1 << 64])
def test_integers_out_of_range_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(wrong)


@pytest.mark.parametrize("wrong", ["PNP05", "pnp0501", "PN10501", "PNP05010", "PNPXYZW"])
def test_wrong_eisa_ids_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        aml.eisa_id(wrong)


@pytest.mark.parametrize("bits", [0, 64])
def test_fields_of_impossible_width_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        aml.byte_field("REGS", [("WIDE", bits)])


def test_packages_too_large_to_encode_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        aml.scope("ABCD", bytes(1 << 28))
