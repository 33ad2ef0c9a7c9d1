"""Structs of bytes: dense values are copied, overlays change the bytes themselves."""

from __future__ import annotations

import struct

import pytest

from kvmpy.core.wire import U8, U16, U32, U64, Overlay, Wire, b4, b6, u8, u16, u32, u64


class Desc(Wire):
    """VIRTIO 1.2, 2.7.5: struct virtq_desc."""

    addr: u64
    len: u32
    flags: u16
    next: u16 = 0


class Header(Wire):
    magic: b4
    version: u8
    mac: b6


class Zero(Overlay, size=0x20):
    first = U8(0)
    word = U16(0x01)
    dword = U32(0x04)
    qword = U64(0x18)


GOLDEN = bytes.fromhex("0010000000000000 00020000 0300 0700".replace(" ", ""))


def test_wire_reads_packed_little_endian() -> None:
    assert Desc.SIZE == 16
    assert Desc.read(GOLDEN) == Desc(addr=0x1000, len=0x200, flags=3, next=7)


def test_wire_writes_the_same_bytes() -> None:
    desc = Desc(addr=0x1000, len=0x200, flags=3, next=7)
    buf = bytearray(20)

    desc.write(buf, 2)

    desc.write(memoryview(whole := bytearray(16)))

    assert bytes(desc) == whole == GOLDEN
    assert buf == b"\0\0" + GOLDEN + b"\0\0"


def test_wire_has_no_padding_and_takes_bytes() -> None:
    header = Header(magic=b"KVMP", version=1, mac=b"\x52\x54\x00\x12\x34\x56")

    assert Header.SIZE == 11
    assert Header.read(bytes(header)) == header


def test_wire_defaults() -> None:
    assert bytes(Desc(1, 2, 3))[-2:] == b"\0\0"


def test_wire_is_a_copy() -> None:
    buf = bytearray(GOLDEN)
    desc = Desc.read(buf)

    buf[0:8] = bytes(8)

    assert desc.addr == 0x1000


def test_wire_reads_from_a_memoryview_at_an_offset() -> None:
    assert Desc.read(memoryview(b"xyz" + GOLDEN), 3).flags == 3


@pytest.mark.parametrize("at", [-1, -16, 1, 16, 1 << 40])
def test_wire_refuses_to_read_outside(at: int) -> None:
    with pytest.raises(struct.error):
        Desc.read(GOLDEN, at)


@pytest.mark.parametrize("at", [-1, -16, 1, 16, 1 << 40])
def test_wire_refuses_to_write_outside(at: int) -> None:
    buf = bytearray(GOLDEN)

    with pytest.raises(struct.error):
        Desc(1, 2, 3, 4).write(buf, at)

    assert buf == GOLDEN


@pytest.mark.parametrize("desc", [Desc(1 << 64, 0, 0), Desc(-1, 0, 0), Desc(0, 0, 1 << 16)])
def test_wire_refuses_numbers_that_do_not_fit(desc: Desc) -> None:
    with pytest.raises(struct.error):
        bytes(desc)


def test_overlay_changes_the_bytes_themselves() -> None:
    buf = bytearray(0x40)
    zero = Zero(buf, 0x10)

    zero.first, zero.word, zero.dword, zero.qword = 0xAA, 0x1122, 0x33445566, 0x778899AABBCCDDEE

    assert buf[0x10:0x18].hex() == "aa22110066554433"
    assert buf[0x28:0x30].hex() == "eeddccbbaa998877"
    assert (zero.first, zero.word, zero.dword, zero.qword) == (0xAA, 0x1122, 0x33445566, 0x778899AABBCCDDEE)


def test_overlay_sees_what_is_written_under_it() -> None:
    buf = bytearray(0x20)
    zero = Zero(memoryview(buf))

    buf[4] = 9

    assert zero.dword == 9


def test_overlay_of_its_own_is_zero() -> None:
    zero = Zero()

    assert (len(zero.buf), zero.qword) == (0x20, 0)


def test_overlay_class_has_the_offset() -> None:
    assert Zero.dword.offset == 4


def test_overlay_refuses_a_number_that_does_not_fit() -> None:
    with pytest.raises(struct.error):
        Zero().word = 1 << 16


@pytest.mark.parametrize(("length", "base"), [(0x1F, 0), (0x20, 1), (0x40, -1), (0, 0)])
def test_overlay_refuses_a_buffer_that_is_too_short(length: int, base: int) -> None:
    with pytest.raises(struct.error, match="Zero needs 32 bytes"):
        Zero(bytearray(length), base)


@pytest.mark.parametrize("field", [U32(0x1D), U8(0x20), U8(-1)])
def test_overlay_refuses_a_field_outside_its_size(field: object) -> None:
    with pytest.raises(TypeError, match=r"Bad\.field at"):
        type("Bad", (Overlay,), {"field": field}, size=0x20)
