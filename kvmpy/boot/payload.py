"""Decompresses on the host what a kernel image would decompress in the guest."""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections import deque

from ..core import progress
from ..core.errors import ImageError
from ..core.typed import Any
from ..core.wire import Buffer
from ..x86.layout import GIB, MIB

MAX = GIB  # no kernel decompresses to more
MAX_DICTIONARY = 256 * MIB  # LZMA decoder memory; kernels are made with dictionaries of up to 128 MiB
LZ4_BLOCK = 8 * MIB  # the legacy format's fixed block size (lz4's doc/lz4_Frame_format.md, "Legacy frame")
MAX_THREADS = 4  # that decompress such blocks
ZSTD_STEP = 4096  # bytes of input at a time: even if all were RLE blocks, they make 128 MiB, no more
AGAIN = "the file is damaged or was not copied completely: get it again"

LZO_MAGIC = b"\x89LZO\x00\r\n\x1a\n"
MAGIC = {  # first bytes (boot.rst, payload_offset; lib/decompress.c)
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\x5d\x00\x00": "lzma",
    b"\xfd7zXZ\x00": "xz",
    LZO_MAGIC: "lzo",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# Decompressing these takes no longer than checking a cached copy: a 53 MB kernel 65 and 43 ms against 64 ms.
UNCACHED = ("lz4", "zstd")


class UndecodableError(ImageError):
    """A payload that only the guest can decompress: nothing says that it is damaged."""


def identify(data: Buffer) -> str:
    """The compression format of `data`, a value of MAGIC, or "" when it is none of them."""
    head = bytes(data[:16])
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")


def decompress(data: memoryview, limit: int = MAX) -> bytes:
    """The content of `data`, of at most `limit` bytes, from the user's cache where that is faster.

    `data` is one compressed stream, which the 4-byte size that kernel builds append may follow.
    Raises UndecodableError when the format is unknown or its Python package missing, and ImageError when the data is
    damaged or the content larger than `limit`.
    """
    name = identify(data)
    if not name:
        head = bytes(data[:4]).hex(" ")
        raise UndecodableError(f"a payload in no known compression format ({head})", "use --boot decompressor")
    limit = min(limit, MAX)
    if name in UNCACHED:
        content = _decompress(name, data, limit)
    else:
        from . import cache

        content = cache.recall(data, lambda: _decompress(name, data, limit))
    if len(content) > limit:
        raise ImageError(f"its {name} data has more than {limit} bytes", AGAIN)
    return content


def _decompress(name: str, data: memoryview, limit: int) -> bytes:
    try:
        with progress.working("decompressing the kernel"):
            content, rest = DECODERS[name](data, limit)
    except ValueError as error:
        raise ImageError(f"its {name} data {error}", AGAIN) from None
    except ImportError as error:
        raise UndecodableError(
            f"a {name} payload, and Python cannot {error.msg}", f"pip install {error.name}"
        ) from None
    if len(rest) == 4 and name != "gzip" and len(content) <= limit:
        (size,) = struct.unpack("<I", rest)  # scripts/Makefile.lib, size_append
        if size != len(content) & 0xFFFFFFFF:
            raise ImageError(f"its {name} data makes {len(content)} bytes instead of {size}", AGAIN)
    return content


# One decoder for each format: (content, what follows the stream). Each stops soon after `limit` bytes, and raises
# ValueError with a message that completes "its ... data".


def _gzip(data: memoryview, limit: int) -> tuple[bytes, bytes]:
    import zlib

    decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"is damaged ({error})") from None
    return _whole(decoder, content, limit)


def _bzip2(data: memoryview, limit: int) -> tuple[bytes, bytes]:
    import bz2

    decoder = bz2.BZ2Decompressor()
    try:
        content = decoder.decompress(data, limit + 1)
    except OSError as error:
        raise ValueError(f"is damaged ({error})") from None
    return _whole(decoder, content, limit)


def _lzma(data: memoryview, limit: int) -> tuple[bytes, bytes]:
    import lzma

    decoder = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=MAX_DICTIONARY)
    try:
        content = decoder.decompress(data, limit + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"is damaged ({error})") from None
    return _whole(decoder, content, limit)


def _zstd(data: memoryview, limit: int) -> tuple[bytes, bytes]:
    decoder, failure = _zstd_decoder()
    parts, total = [], 0
    for at in range(0, len(data), ZSTD_STEP):
        try:
            part = decoder.decompress(data[at : at + ZSTD_STEP])
        except failure as error:
            raise ValueError(f"is damaged ({error})") from None
        parts.append(part)
        total += len(part)
        if decoder.eof or total > limit:
            rest = decoder.unused_data + bytes(data[at + ZSTD_STEP :]) if decoder.eof else b""
            return b"".join(parts), rest
    raise ValueError("ends early")


def _zstd_decoder() -> tuple[Any, type[Exception]]:
    """A decoder of one frame, and the exception it raises."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdDecompressor(), zstd.ZstdError
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


def _lzo(data: memoryview, limit: int) -> tuple[bytes, bytes]:
    from . import lzo

    content, end = lzo.decompress(data, limit)
    return content, bytes(data[end : end + 8])


def _lz4(data: memoryview, limit: int) -> tuple[bytes, bytes]:
    """The legacy frame: blocks of a 4-byte length and data, each of 8 MiB but the last; no end mark, no checksum.

    They need nothing of each other, so that several CPUs can work on them.
    """
    import lz4.block

    blocks: list[memoryview] = []
    at = 4
    most = limit // LZ4_BLOCK + 2  # which make more than the limit
    while at + 4 < len(data) and len(blocks) < most:
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size > len(data) - at:
            raise ValueError("ends early")
        blocks.append(data[at : at + size])
        at += size
    parts = [b""] * len(blocks)
    waiting = deque(range(len(blocks)))
    failures: list[str] = []

    def work() -> None:
        while not failures and sum(map(len, parts)) <= limit:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            try:
                parts[number] = lz4.block.decompress(blocks[number], uncompressed_size=LZ4_BLOCK)
                if not parts[number]:
                    failures.append("has an empty block")
            except (lz4.block.LZ4BlockError, ValueError) as error:
                failures.append(f"is damaged ({error})")

    helpers = [threading.Thread(target=work) for _ in range(min(MAX_THREADS, os.cpu_count() or 1, len(blocks)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise ValueError(failures[0])
    if len(blocks) == most and sum(map(len, parts)) <= limit:
        raise ValueError("has blocks that are too small")
    return b"".join(parts), bytes(data[at:])


def _whole(decoder: Any, content: bytes, limit: int) -> tuple[bytes, bytes]:
    """What a decoder of the standard library made in one step, unless the stream goes on after its input's end."""
    if not decoder.eof and len(content) <= limit:
        raise ValueError("ends early")
    return content, decoder.unused_data


DECODERS = {"gzip": _gzip, "bzip2": _bzip2, "lzma": _lzma, "xz": _lzma, "lzo": _lzo, "lz4": _lz4, "zstd": _zstd}
