"""Inodes, directory entries and extended attributes of ext4 as bytes (Linux, Documentation/filesystems/ext4)."""

from __future__ import annotations

import stat
import struct
from functools import reduce

from ..core.errors import ImageError
from .tree import Node

BLOCK = 4096
INODE_SIZE = 256
OLD_SIZE, EXTRA_SIZE = 128, 32  # of an inode; extended attributes fill the rest
INLINE = 60  # bytes of i_block
EXTENTS_FL = 0x80000
MAX_LINKS = 65000
EXTENT_HEADER = struct.Struct("<HHHHI")
EXTENT = struct.Struct("<IHHI")
EXTENT_MAGIC = 0xF30A
EXTENT_BLOCKS = 32768  # the most in one extent
IN_INODE = (INLINE - EXTENT_HEADER.size) // EXTENT.size
IN_BLOCK = (BLOCK - EXTENT_HEADER.size) // EXTENT.size
XATTR_MAGIC = 0xEA020000
XATTR_ENTRY = struct.Struct("<BBHIII")
PREFIXES = {"user.": 1, "trusted.": 4, "security.": 6}
TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}  # fmt: skip
HASH = 0xFFFFFFFF


def entry(name: bytes, node: Node) -> bytes:
    """A directory entry (struct ext4_dir_entry_2) that is as long as its name needs."""
    length = 8 + (len(name) + 3 & ~3)
    head = struct.pack("<IHBB", node.inode, length, len(name), TYPES[stat.S_IFMT(node.mode)])
    return (head + name).ljust(length, b"\0")


def inode(node: Node, blocks: tuple[int, list[int]]) -> bytes:
    """The inode; `blocks` are those of its extended attributes (0: none) and of its extents, where those have some."""
    attributes, leaves = blocks
    if node.links > MAX_LINKS and not node.is_folder:
        raise ImageError(f"the image has a file with {node.links} names", f"ext4 allows {MAX_LINKS}")
    links = node.links if node.links <= MAX_LINKS else 1  # DIR_NLINK
    held = has_content(node)
    sectors = ((-(-node.size // BLOCK) if held else 0) + len(leaves) + bool(attributes)) * (BLOCK // 512)
    size = len(node.target) if stat.S_ISLNK(node.mode) else node.size
    seconds, nanoseconds = divmod(node.mtime, 10**9)
    seconds = min(max(seconds, -(1 << 31)), (3 << 32) + (1 << 31) - 1)
    time = seconds & 0xFFFFFFFF
    more = (seconds + (1 << 31) >> 32 & 3) | nanoseconds << 2
    data = struct.pack(
        "<HHIIIIIHHIII60sIIIIHHHHHH",
        *(node.mode & 0xFFFF, node.uid & 0xFFFF, size & 0xFFFFFFFF, time, time, time, 0, node.gid & 0xFFFF, links),
        *(sectors, EXTENTS_FL if held else 0, 0, _inline(node, leaves), 0, attributes, size >> 32, 0, 0, 0),
        *(node.uid >> 16, node.gid >> 16, 0, 0),
    )
    data += struct.pack("<HHIIIIIII", EXTRA_SIZE, 0, more, more, more, time, more, 0, 0)
    return (data + (b"" if attributes else _xattrs_inside(node))).ljust(INODE_SIZE, b"\0")


def has_content(node: Node) -> bool:
    return stat.S_ISREG(node.mode) or node.is_folder or (stat.S_ISLNK(node.mode) and not target_is_inside(node))


def target_is_inside(node: Node) -> bool:
    """Whether the target of a link fits into its inode, with a NUL."""
    return len(node.target) < INLINE


def needs_block(node: Node) -> list[bytes]:
    """Blocks of extents, for a file with more of them than an inode takes."""
    extents = _extents(node)
    if len(extents) <= IN_INODE:
        return []
    if len(extents) > IN_INODE * IN_BLOCK:
        raise ImageError(f"the image has a file of {node.size >> 30} GiB", "use an image without such files")
    parts = [extents[at : at + IN_BLOCK] for at in range(0, len(extents), IN_BLOCK)]
    return [(_extent_head(len(part), IN_BLOCK, 0) + b"".join(part)).ljust(BLOCK, b"\0") for part in parts]


def _inline(node: Node, leaves: list[int]) -> bytes:
    """What i_block has: extents, the target of a link, or the number of a device."""
    if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        major, minor = node.rdev
        return struct.pack("<II", 0, (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12)
    if not has_content(node):
        return node.target
    if leaves:
        index = [struct.pack("<IIHH", at * IN_BLOCK * EXTENT_BLOCKS, leaf, 0, 0) for at, leaf in enumerate(leaves)]
        return _extent_head(len(leaves), IN_INODE, 1) + b"".join(index)
    extents = _extents(node)
    return _extent_head(len(extents), IN_INODE, 0) + b"".join(extents)


def _extents(node: Node) -> list[bytes]:
    if not has_content(node):
        return []
    blocks = -(-node.size // BLOCK)
    return [
        EXTENT.pack(at, min(EXTENT_BLOCKS, blocks - at), 0, node.start + at) for at in range(0, blocks, EXTENT_BLOCKS)
    ]


def _extent_head(count: int, most: int, depth: int) -> bytes:
    return EXTENT_HEADER.pack(EXTENT_MAGIC, count, most, depth, 0)


# Extended attributes.


def _xattrs_inside(node: Node) -> bytes:
    """Those of a node whose attributes fit into its inode."""
    if not node.xattrs:
        return b""
    room = INODE_SIZE - OLD_SIZE - EXTRA_SIZE - 4
    packed = _pack(node, room, 0)
    return b"" if packed is None else struct.pack("<I", XATTR_MAGIC) + packed[0]


def xattr_block(node: Node) -> bytes:
    """A block with the extended attributes of a node, nothing if they fit into the inode; raises ImageError."""
    if _xattrs_inside(node):
        return b""
    packed = _pack(node, BLOCK - 32, 32)
    if packed is None:
        raise ImageError("the image has a file with extended attributes of more than 4 KiB", "use one without")
    body, hashes = packed
    total = reduce(lambda total, value: (total << 16 ^ total >> 16 ^ value) & HASH, hashes, 0)
    return struct.pack("<IIIII12x", XATTR_MAGIC, 1, 1, total, 0) + body


def _pack(node: Node, room: int, base: int) -> tuple[bytes, list[int]] | None:
    """Entries from the front of `room` bytes, values from its end; None if they do not fit. Offsets begin at `base`."""
    entries, values, hashes = b"", b"", []
    keys = []
    for name, value in node.xattrs.items():
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        rest = name.removeprefix(prefix).encode("utf-8", "surrogateescape")
        keys.append((PREFIXES[prefix], len(rest), rest, value))
    for index, length, rest, value in sorted(keys):
        padded = value.ljust(len(value) + 3 & ~3, b"\0")
        values = padded + values
        hashed = _hash(rest, padded) if base else 0
        hashes.append(hashed)
        at = base + room - len(values) if value else 0
        if length > 255 or at < 0:
            return None
        head = XATTR_ENTRY.pack(length, index, at, 0, len(value), hashed)
        entries += (head + rest).ljust(XATTR_ENTRY.size + (length + 3 & ~3), b"\0")
    if len(entries) + 4 + len(values) > room:
        return None
    return entries.ljust(room - len(values), b"\0") + values, hashes


def _hash(name: bytes, value: bytes) -> int:
    total = 0
    for byte in name:
        total = (total << 5 ^ total >> 27 ^ byte) & HASH
    for (word,) in struct.iter_unpack("<I", value):
        total = (total << 16 ^ total >> 16 ^ word) & HASH
    return total
