"""Decompresses clusters of a qcow2 image, never to more than one cluster."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

from ..core.errors import ImageError
from .qcow2_format import ZSTD

Decompressor = Callable[[bytes, int], bytes]

WBITS = -12  # raw deflate with a window of 4 KiB
MAX_WINDOW = 8 << 20  # bytes that a zstd stream may ask for: what RFC 8878, 3.1.1.1.2 tells decoders to support


class BadData(Exception):
    """Compressed data that is no such thing."""


def decompressor(compression_type: int, path: Path) -> Decompressor:
    """The function (data, size) -> `size` bytes at most, which raises BadData; ImageError when this host has none."""
    if compression_type != ZSTD:
        return inflate
    try:
        import zstandard
    except ImportError:
        raise ImageError(f"qcow2 image {path} is compressed with zstd", "pip install zstandard") from None

    def expand(data: bytes, size: int) -> bytes:
        try:
            with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(data) as reader:
                return reader.read(size)
        except zstandard.ZstdError as error:
            raise BadData(str(error)) from None

    return expand


def inflate(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(WBITS).decompress(data, size)
    except zlib.error as error:
        raise BadData(str(error)) from None
