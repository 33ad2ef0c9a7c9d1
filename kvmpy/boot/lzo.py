"""Decompresses lzop files, for kernels built with CONFIG_KERNEL_LZO.

No maintained Python package does this. Written for clarity and bounds; it makes some 30 MB/s.
Format of the stream: Documentation/staging/lzo.rst; of the file: lzop's own header, as lib/decompress_unlzo.c reads it.
"""

from __future__ import annotations

import struct
import zlib

from .payload import LZO_MAGIC

OLDEST = 0x0940  # lzop versions before have a shorter header; the kernel's build has never used them
ADLER32_D, ADLER32_C = 0x0001, 0x0002  # header flags: which checksums a block has, of its data and of its compression
EXTRA_FIELD, CRC32_D, CRC32_C, FILTER = 0x0040, 0x0100, 0x0200, 0x0800


def decompress(data: memoryview, limit: int) -> tuple[bytes, int]:
    """The content of the lzop file at the start of `data`, and that file's length.

    Raises ValueError when it is damaged or would decompress to more than `limit` bytes.
    """
    try:
        return _blocks(data, limit)
    except (IndexError, struct.error):
        raise ValueError("ends early") from None


def _blocks(data: memoryview, limit: int) -> tuple[bytes, int]:
    flags, at = _header(data)
    out = bytearray()
    while True:  # ends: every block takes at least 8 of len(data) bytes
        (size,) = struct.unpack_from(">I", data, at)
        at += 4
        if size == 0:
            return bytes(out), at
        if len(out) + size > limit:
            raise ValueError(f"has more than {limit} bytes")
        (packed,) = struct.unpack_from(">I", data, at)
        at += 4
        adler = struct.unpack_from(">I", data, at)[0] if flags & ADLER32_D else None
        at += 4 * (bool(flags & ADLER32_D) + bool(flags & CRC32_D))
        if packed < size:
            at += 4 * (bool(flags & ADLER32_C) + bool(flags & CRC32_C))
        source = bytes(data[at : at + packed])
        at += packed
        if packed > size or len(source) < packed:
            raise ValueError("ends early")
        block = source if packed == size else _lzo1x(source, size)
        if adler is not None and zlib.adler32(block) != adler:
            raise ValueError("has a wrong checksum")
        out += block


def _header(data: memoryview) -> tuple[int, int]:
    """The flags, and where the first block starts."""
    version, _library, _needed, _method, _level, flags = struct.unpack_from(">HHHBBI", data, len(LZO_MAGIC))
    if version < OLDEST or flags & EXTRA_FIELD:
        raise ValueError("is of a kind of lzop file that no kernel build makes")
    at = len(LZO_MAGIC) + 12 + (4 if flags & FILTER else 0)
    at += 12  # mode, time of modification (two words)
    at += 1 + data[at]  # name
    return flags, at + 4  # checksum of the header


def _lzo1x(source: bytes, size: int) -> bytearray:
    """The `size` bytes that the LZO1X stream `source` stands for; raises ValueError or IndexError when it does not."""
    out = bytearray()
    at = 0
    literals = 0  # how many the last instruction copied, 4 for "4 or more": decides what opcodes below 16 mean

    def length(short: int, longest: int) -> int:
        """A length whose short form had `longest` as its largest value, and 0 for "continued"."""
        nonlocal at
        if short:
            return short
        total = longest
        while source[at] == 0:
            total += 255
            at += 1
        total += source[at]
        at += 1
        return total

    def copy_literals(count: int) -> None:
        nonlocal at
        if at + count > len(source) or len(out) + count > size:
            raise ValueError("is damaged")
        out.extend(source[at : at + count])
        at += count

    if source[0] > 17:
        at = 1
        literals = min(source[0] - 17, 4)
        copy_literals(source[0] - 17)
    while True:  # ends: every round takes at least one byte of `source`, and past its end is an IndexError
        op = source[at]
        at += 1
        if op >= 64:
            count = (op >> 5) + 1
            distance = (op >> 2 & 7) + (source[at] << 3) + 1
            at += 1
            literals = op & 3
        elif op >= 16:
            count = length(op & 31, 31) if op >= 32 else length(op & 7, 7)
            count += 2
            word = source[at] | source[at + 1] << 8
            at += 2
            distance = (word >> 2) + 1
            literals = word & 3
            if op < 32:
                distance += ((op & 8) << 11) + 0x3FFF
                if distance == 0x4000:  # the end marker
                    break
        elif literals == 0:
            copy_literals(length(op, 15) + 3)
            literals = 4
            continue
        else:
            count, nearest = (3, 2049) if literals == 4 else (2, 1)
            distance = (op >> 2) + (source[at] << 2) + nearest
            at += 1
            literals = op & 3
        start = len(out) - distance
        if start < 0 or len(out) + count > size:
            raise ValueError("is damaged")
        if distance >= count:
            out += out[start : start + count]
        else:  # the copy reads what it writes: a repetition
            out += (out[start:] * (count // distance + 1))[:count]
        if literals:
            copy_literals(literals)
    if len(out) != size or at != len(source):
        raise ValueError("is damaged")
    return out
