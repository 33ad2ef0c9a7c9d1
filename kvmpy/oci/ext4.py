"""Writes an ext4 file system that is only to be read (Linux, Documentation/filesystems/ext4).

Contents are written as they come, one behind the other; then folders, inodes and bitmaps behind them, and last the
superblock, without which there is no file system. No journal, no checksums, no reserve: nothing is ever changed in it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from bisect import bisect
from collections.abc import Iterable
from contextlib import suppress

from ..core.errors import ImageError
from ..host import syscalls
from ..host.disk import KEEP_SIZE, PUNCH_HOLE
from .ext4_inode import BLOCK, INODE_SIZE, entry, inode, needs_block, target_is_inside, xattr_block
from .tree import Node, Tree

GROUP = 8 * BLOCK  # blocks in a group, and the most inodes: the bits of one block
DESCRIPTOR = struct.Struct("<IIIHHHHIHHHH")
SUPERBLOCK_AT, SUPERBLOCK_SIZE = 1024, 1024
ROOT_INODE, FIRST_INODE = 2, 11
MAGIC = 0xEF53
COMPAT = 0x8 | 0x200  # EXT_ATTR, SPARSE_SUPER2: with no backup of the superblock
INCOMPAT = 0x2 | 0x40 | 0x200  # FILETYPE, EXTENTS, FLEX_BG: bitmaps and inodes may be anywhere
RO_COMPAT = 0x1 | 0x2 | 0x20 | 0x40  # SPARSE_SUPER, LARGE_FILE, DIR_NLINK, EXTRA_ISIZE
BATCH = 4096  # inodes that are written at once


class Ext4:
    """A file system in the making in the empty file behind `fd`, of at most some `limit` bytes of content."""

    def __init__(self, fd: int, limit: int) -> None:
        self._fd = fd
        groups = limit // (BLOCK * GROUP) * 2 + 1024  # with all that is not content
        self._first = 1 + -(-groups * DESCRIPTOR.size // BLOCK)  # of the blocks for contents
        self._next = self._first

    def add(self, chunks: Iterable[bytes], node: Node) -> None:
        """Write what a node contains; raises OSError. Zeros that come as a whole chunk take no room."""
        start, size = self._next, 0
        for chunk in chunks:
            if chunk.count(0) < len(chunk):
                _write(self._fd, chunk, start * BLOCK + size)
            size += len(chunk)
        node.start, node.size = start, size
        self._next += -(-size // BLOCK)

    def finish(self, tree: Tree, name: bytes) -> None:
        """Write all the rest; `name` is what the file system's UUID is made from. Raises OSError and ImageError."""
        nodes = _number(tree)
        contents = self._next
        for folder, parent in tree.folders():
            self.add(_folder_blocks(folder, parent), folder)
        blocks = [self._extra_blocks(node) for node in nodes]
        root_blocks = self._extra_blocks(tree.root)
        groups, inodes = self._measure(len(nodes) + FIRST_INODE)
        table = -(-inodes * INODE_SIZE // BLOCK)  # blocks of inodes in each group
        bitmaps, tables = self._next, self._next + 2 * groups
        end = tables + groups * table
        os.ftruncate(self._fd, groups * GROUP * BLOCK)
        for at in range(0, len(nodes), BATCH):
            data = b"".join(map(inode, nodes[at : at + BATCH], blocks[at : at + BATCH]))
            _write(self._fd, data, tables * BLOCK + (FIRST_INODE - 1 + at) * INODE_SIZE)
        _write(self._fd, inode(tree.root, root_blocks), tables * BLOCK + INODE_SIZE)
        used = [(0, 1 + -(-groups * DESCRIPTOR.size // BLOCK)), *self._used(nodes, contents), (contents, end)]
        folders = [0] * groups
        for node in [tree.root, *nodes]:
            folders[(node.inode - 1) // inodes] += node.is_folder
        descriptors, free_blocks, free_inodes = b"", 0, 0
        for group in range(groups):
            bits, blocks_left = _bitmap(group * GROUP, GROUP, used)
            _write(self._fd, bits, (bitmaps + group) * BLOCK)
            bits, inodes_left = _bitmap(group * inodes, inodes, [(0, FIRST_INODE - 1 + len(nodes))])
            _write(self._fd, bits, (bitmaps + groups + group) * BLOCK)
            place = bitmaps + group, bitmaps + groups + group, tables + group * table
            descriptors += DESCRIPTOR.pack(*place, blocks_left, inodes_left, folders[group], 0, 0, 0, 0, 0, 0)
            free_blocks, free_inodes = free_blocks + blocks_left, free_inodes + inodes_left
        _write(self._fd, descriptors, BLOCK)
        _write(self._fd, _superblock(name, groups, inodes, free_blocks, free_inodes), SUPERBLOCK_AT)

    def _extra_blocks(self, node: Node) -> tuple[int, list[int]]:
        """Where the attributes of a node and the index of its extents are, which do not fit into its inode."""
        if stat.S_ISLNK(node.mode) and not target_is_inside(node):
            self.add([node.target], node)
        attributes = 0
        if node.xattrs and (block := xattr_block(node)):
            attributes = self._append(block)
        return attributes, [self._append(block) for block in needs_block(node)]

    def _append(self, block: bytes) -> int:
        _write(self._fd, block, self._next * BLOCK)
        self._next += 1
        return self._next - 1

    def _used(self, nodes: list[Node], end: int) -> list[tuple[int, int]]:
        """Blocks with the content of files, in order. Those of files that an upper layer has replaced go back to the
        host."""
        used, at = [], self._first
        begin = at
        files = sorted((node.start, node.size) for node in nodes if stat.S_ISREG(node.mode))
        for start, size in [*files, (end, 0)]:
            if start > at:
                used.append((begin, at))
                _punch(self._fd, at, start)
                begin = start
            at = max(at, start + -(-size // BLOCK))
        return [*used, (begin, at)]

    def _measure(self, inodes: int) -> tuple[int, int]:
        """How many groups it takes, and the inodes in each of them."""
        groups = -(-self._next // GROUP)
        while True:
            each = -(-inodes // (groups * 16)) * 16
            table = each * INODE_SIZE // BLOCK
            if each <= GROUP and self._next + groups * (2 + table) <= groups * GROUP:
                break
            groups += 1
        if 1 + -(-groups * DESCRIPTOR.size // BLOCK) > self._first:
            raise ImageError(f"{inodes} files are too many for their size", "use a smaller image")
        return groups, each


def _number(tree: Tree) -> list[Node]:
    """Give inodes to all nodes but the root, and count their names; those nodes, in the order of inodes."""
    nodes: list[Node] = []
    for folder, _ in tree.folders():
        folder.links += 2
        for child, _ in folder.children.values():
            if not child.inode:
                nodes.append(child)
                child.inode = FIRST_INODE - 1 + len(nodes)
            if child.is_folder:
                folder.links += 1
            else:
                child.links += 1
    tree.root.inode = ROOT_INODE
    return nodes


def _folder_blocks(folder: Node, parent: Node) -> list[bytes]:
    """Each ends with an entry that takes all that is left of it."""
    blocks, block, last = [], b"", 0
    names = [(b".", folder), (b"..", parent), *((name, node) for name, (node, _) in folder.children.items())]
    for name, node in names:
        new = entry(name, node)
        if len(block) + len(new) > BLOCK:
            blocks.append(_stretched(block, last))
            block = b""
        last = len(block)
        block += new
    return [*blocks, _stretched(block, last)]


def _stretched(block: bytes, last: int) -> bytes:
    length = struct.pack("<H", BLOCK - last)
    return (block[: last + 4] + length + block[last + 6 :]).ljust(BLOCK, b"\0")


def _bitmap(first: int, count: int, used: list[tuple[int, int]]) -> tuple[bytes, int]:
    """A block of bits for `count` things from number `first` on, and how many of them are not in the ranges `used`,
    which are in order."""
    bits, free = (1 << 8 * BLOCK) - (1 << count), count
    for begin, end in used[max(0, bisect(used, (first, 0)) - 1) :]:
        if begin >= first + count:
            break
        low, high = max(begin - first, 0), min(end - first, count)
        if low < high:
            bits |= (1 << high) - (1 << low)
            free -= high - low
    return bits.to_bytes(BLOCK, "little"), free


def _superblock(name: bytes, groups: int, inodes: int, free_blocks: int, free_inodes: int) -> bytes:
    data = bytearray(SUPERBLOCK_SIZE)
    counts = groups * inodes, groups * GROUP, 0, free_blocks, free_inodes, 0
    struct.pack_into("<13I", data, 0, *counts, 2, 2, GROUP, GROUP, inodes, 0, 0)
    struct.pack_into("<6H", data, 0x34, 0, 0xFFFF, MAGIC, 1, 1, 0)  # clean; goes on after errors
    struct.pack_into("<I", data, 0x4C, 1)  # s_rev_level
    struct.pack_into("<IHHIII", data, 0x54, FIRST_INODE, INODE_SIZE, 0, COMPAT, INCOMPAT, RO_COMPAT)
    data[0x68:0x78] = hashlib.sha256(name).digest()[:16]
    struct.pack_into("<HH", data, 0x15C, 32, 32)  # s_min_extra_isize, s_want_extra_isize
    return bytes(data)


def _punch(fd: int, begin: int, end: int) -> None:
    with suppress(OSError):  # a file system without holes keeps them
        syscalls.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, begin * BLOCK, (end - begin) * BLOCK)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
