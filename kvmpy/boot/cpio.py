"""The "newc" cpio archive, which Linux unpacks as its initramfs.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst; cpio(5), "New ASCII Format".
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ..core.errors import ConfigError, ImageError, NotFoundError
from ..core.record import Record

MAGIC = b"070701"
MAGIC_CRC = b"070702"  # the same with a checksum that Linux ignores
FIELDS = struct.Struct(">13I")  # each byte as two hexadecimal digits, after the magic
HEADER = len(MAGIC) + 2 * FIELDS.size
ALIGN = 4  # of every header, name and content
BLOCK = 512  # archives are padded to this, as cpio(1) does
TRAILER = "TRAILER!!!"
PATH_MAX = 4096  # the kernel refuses longer names and link targets, their NUL included
MAX_FILE = (1 << 32) - 1
MAX_ENTRIES = 1 << 20  # an archive of headers alone must not cost minutes; the largest real initrds have some 10,000


class Entry(Record, frozen=True):
    """One file: `name` without a leading slash, `mode` with its type bits (stat.S_IFREG ...).

    data  the content, the target of a symbolic link, or the host's file to take the content from
    rdev  (major, minor) of a device node
    """

    name: str
    mode: int
    data: bytes | memoryview | Path = b""
    rdev: tuple[int, int] = (0, 0)


def write(out: BinaryIO, entries: Iterable[Entry]) -> None:
    """Append an archive of `entries` to `out`; the same entries give the same bytes, whoever writes them and when.

    Parents must come before what is in them. Contents of host files are streamed. Raises ConfigError for what the
    format cannot hold, NotFoundError for a host file that cannot be opened, OSError when a read or write fails.
    """
    size = 0
    for number, entry in enumerate(entries, 1):
        size += _write_one(out, entry, number)
    size += _write_one(out, Entry(TRAILER, 0), 0)
    out.write(bytes(-size % BLOCK))


def _write_one(out: BinaryIO, entry: Entry, number: int) -> int:
    """Write one entry; how many bytes that took, a multiple of ALIGN."""
    name = os.fsencode(entry.name) + b"\0"
    parts = entry.name.split("/")
    if not entry.name or entry.name.startswith("/") or ".." in parts or b"\0" in name[:-1] or len(name) > PATH_MAX:
        raise ConfigError(f"initramfs: bad file name {entry.name!r}", "give a path below / without '..' in it")
    if isinstance(entry.data, Path):
        try:
            file = entry.data.open("rb")
        except OSError as error:
            raise NotFoundError(f"{entry.data}: {error.strerror}", "give files that can be read") from None
        with file:
            length = os.fstat(file.fileno()).st_size
            _write_header(out, entry, name, length, number)
            shutil.copyfileobj(file, out, 1 << 20)
            if file.tell() != length:
                raise ImageError(f"{entry.data}: changed its size while it was read", "try again")
    else:
        length = len(entry.data)
        _write_header(out, entry, name, length, number)
        out.write(entry.data)
    out.write(bytes(-length % ALIGN))
    head = HEADER + len(name)
    return head + -head % ALIGN + length + -length % ALIGN


def _write_header(out: BinaryIO, entry: Entry, name: bytes, length: int, number: int) -> None:
    if length > MAX_FILE:
        raise ConfigError(f"initramfs: {entry.name} has {length >> 20} MiB; a file in it has less than 4 GiB")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = FIELDS.pack(number, entry.mode, 0, 0, links, 0, length, 0, 0, *entry.rdev, len(name), 0)
    out.write(MAGIC + fields.hex().encode("ascii") + name + bytes(-(HEADER + len(name)) % ALIGN))


def read(data: bytes | memoryview, start: int = 0) -> tuple[list[Entry], int]:
    """The entries of the archive at `start`, contents as views, and the offset past its trailer and padding.

    Raises ImageError when it is truncated or malformed. What follows may be another archive, compressed or not.
    """
    view = memoryview(data)
    entries: list[Entry] = []
    at = start
    while len(entries) < MAX_ENTRIES:
        header = bytes(view[at : at + HEADER])
        if len(header) < HEADER:
            raise ImageError(f"cpio archive: ends at offset {len(view)}, within a header", "is the file complete?")
        if header[:6] not in (MAGIC, MAGIC_CRC):
            raise ImageError(f"cpio archive: no newc header at offset {at}", "is it an uncompressed cpio archive?")
        try:
            fields = FIELDS.unpack(bytes.fromhex(header[len(MAGIC) :].decode("ascii")))
        except (ValueError, struct.error):
            raise ImageError(f"cpio archive: malformed header at offset {at}", "is the file damaged?") from None
        mode, length, name_length = fields[1], fields[6], fields[11]
        content = at + HEADER + name_length
        content += -(content - start) % ALIGN
        if not 0 < name_length <= PATH_MAX or content + length > len(view):
            raise ImageError(f"cpio archive: the entry at offset {at} runs past the end", "is the file complete?")
        name = os.fsdecode(bytes(view[at + HEADER : at + HEADER + name_length]).rstrip(b"\0"))
        at = content + length
        at += -(at - start) % ALIGN
        if name == TRAILER:
            return entries, _skip_zeros(view, at)
        entries.append(Entry(name, mode, view[content : content + length], (fields[9], fields[10])))
    raise ImageError(f"cpio archive: more than {MAX_ENTRIES} entries")


def _skip_zeros(view: memoryview, at: int) -> int:
    """The offset of the next byte that is not padding."""
    while at < len(view) and not view[at]:
        chunk = bytes(view[at : at + BLOCK])
        at += len(chunk) - len(chunk.lstrip(b"\0"))
    return min(at, len(view))
