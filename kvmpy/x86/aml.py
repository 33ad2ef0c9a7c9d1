"""Encoder of ACPI Machine Language: each function returns the bytes of one term (ACPI 6.4, 20.2).

    scope("\\\\_SB", device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(io(0x3F8, 8)))))

Terms nest by concatenation. Wrong use (a name segment of five letters, a negative integer) raises ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

ZERO, ONE = b"\x00", b"\x01"  # 20.2.3: ZeroOp, OneOp
LOCAL0 = b"\x60"  # 20.2.6.2
SYSTEM_IO = 1  # 20.2.5.2: RegionSpace


# Names and lengths (20.2.2, 20.2.4)


def path(text: str) -> bytes:
    """NameString: `COM1`, `\\_SB.COM1`, `^PWRB`; segments of up to four characters, padded with `_`."""
    root = text[: len(text) - len(text.lstrip("\\^"))]
    segments = [segment for segment in text[len(root) :].split(".") if segment]
    encoded = b""
    for segment in segments:
        if len(segment) > 4 or segment[0].isdigit() or not segment.replace("_", "A").isalnum() or not segment.isupper():
            raise ValueError(f"{segment!r} in {text!r} is no ACPI name segment")
        encoded += segment.ljust(4, "_").encode("ascii")
    match len(segments):
        case 0:
            prefix, encoded = b"", ZERO  # NullName
        case 1:
            prefix = b""
        case 2:
            prefix = b"\x2e"  # DualNamePrefix
        case count:
            prefix = b"\x2f" + bytes([count])  # MultiNamePrefix
    return root.encode("ascii") + prefix + encoded


def _sized(body: bytes) -> bytes:
    """`body` behind its PkgLength, which counts its own one to four bytes too."""
    length = len(body) + 1
    if length < 1 << 6:
        return bytes([length]) + body
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | length & 0xF]) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"{len(body)} bytes are too many for one AML package")


# Data (20.2.3)


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value in (0, 1):
        return ONE if value else ZERO
    for prefix, code in ((0x0A, "B"), (0x0B, "H"), (0x0C, "I"), (0x0E, "Q")):
        if 0 <= value < 1 << 8 * struct.calcsize(code):
            return struct.pack("<B" + code, prefix, value)
    raise ValueError(f"{value} is no 64-bit unsigned integer")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\x00"


def buffer(data: bytes) -> bytes:
    return b"\x11" + _sized(integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    return b"\x12" + _sized(bytes([len(elements)]) + b"".join(elements))


def eisa_id(text: str) -> bytes:
    """`PNP0501` as the compressed integer that _HID takes (19.6.36): three letters of five bits, four hex digits."""
    letters, digits = text[:3], text[3:]
    if len(text) != 7 or not (letters.isalpha() and letters.isupper()):
        raise ValueError(f"{text!r} is no EISA id")
    first, second, third = (ord(letter) - ord("@") for letter in letters)
    number = first << 26 | second << 21 | third << 16 | int(digits, 16)
    return integer(int.from_bytes(number.to_bytes(4, "big"), "little"))


# Named objects (20.2.5.1, 20.2.5.2)


def name(where: str, value: bytes) -> bytes:
    return b"\x08" + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    return b"\x10" + _sized(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _sized(path(where) + b"".join(terms))


def method(where: str, args: int, *terms: bytes, serialized: bool = False) -> bytes:
    flags = args | serialized << 3
    return b"\x14" + _sized(path(where) + bytes([flags]) + b"".join(terms))


def operation_region(where: str, space: int, offset: int, length: int) -> bytes:
    return b"\x5b\x80" + path(where) + bytes([space]) + integer(offset) + integer(length)


def byte_field(region: str, units: Sequence[tuple[str, int]]) -> bytes:
    """Names for runs of bits of a region, in order: (name, up to 63 bits); byte access, no lock, preserved."""
    flags = 1  # ByteAcc, NoLock, Preserve
    body = path(region) + bytes([flags])
    for unit, bits in units:
        if not 0 < bits < 64:
            raise ValueError(f"field {unit!r} of {bits} bits")
        body += path(unit) + bytes([bits])
    return b"\x5b\x81" + _sized(body)


# Statements and expressions (20.2.5.3, 20.2.5.4)


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def and_(left: bytes, right: bytes) -> bytes:
    return b"\x7b" + left + right + ZERO  # no target


def if_(predicate: bytes, *terms: bytes) -> bytes:
    return b"\xa0" + _sized(predicate + b"".join(terms))


def notify(where: str, value: int) -> bytes:
    return b"\x86" + path(where) + integer(value)


# Resource descriptors (6.4)

FIXED = 1 << 2 | 1 << 3  # of address spaces, 6.4.3.5: both ends are fixed


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate: the descriptors and the end tag, whose checksum 0 stands for "not given" (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, size: int) -> bytes:
    """`size` ports from `base` on, fixed, 16 bits decoded (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def irq_no_flags(irq: int) -> bytes:
    """ISA interrupt 0-15: edge-triggered, active high, exclusive (6.4.2.1)."""
    return struct.pack("<BH", 0x22, 1 << irq)


def memory32_fixed(base: int, size: int) -> bytes:
    """`size` bytes of readable and writable address space from `base` on (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def bus_numbers(first: int, last: int) -> bytes:
    """The buses behind a bridge that produces them, positively decoded, fixed (6.4.3.5.3)."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, FIXED, 0, 0, first, last, 0, last - first + 1)


def dword_memory(base: int, size: int) -> bytes:
    """A window of `size` bytes below 4 GiB that a bridge passes on: uncached, readable and writable (6.4.3.5.2)."""
    read_write = 1 << 0
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, FIXED, read_write, 0, base, base + size - 1, 0, size)


def interrupt(gsi: int) -> bytes:
    """Extended interrupt: global system interrupt, consumed, edge-triggered, active high, exclusive (6.4.3.6)."""
    consumer, edge = 1 << 0, 1 << 1
    return struct.pack("<BHBBI", 0x89, 6, consumer | edge, 1, gsi)
