"""The files of a shared folder that a guest knows by number, found again without ever leaving the folder.

A node is the place where a file was seen last, a folder and a name in it, and what tells the file from all others
(device, inode number, type). It is opened when it is needed, step by step from a folder that is open: O_PATH, one name
at a time, no link followed; what is found there must be the same file, else the node is stale. So neither a link nor a
rename that comes in between leads anywhere else, and a guest may know many more files than this process may open.
A file without a name, deleted while the guest still uses it, stays open until the guest forgets it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict

from .fuse_wire import ROOT_ID

MAX_NODES = 1 << 18  # about half a KiB each
MAX_DEPTH = 1024  # folders to open for one node
LOST = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # when a step finds something else than before

Key = tuple[int, ...]  # device, inode number, type; of a link, where these are fixed, also its ctime


class Node:
    """One file. `users`: how often the guest has looked it up and not forgotten it, and nodes that lie in it."""

    __slots__ = ("content", "fd", "id", "kept", "key", "lookups", "name", "parent", "users")

    def __init__(self, id: int, key: Key, parent: Node | None, name: bytes) -> None:
        self.id = id
        self.key = key
        self.parent = parent
        self.name = name
        self.content: tuple[int, int, int] | None = None  # by which that of the last opening can be told from others
        self.fd = -1
        self.kept = False  # `fd` is all there is of it
        self.lookups = 0
        self.users = 0

    @property
    def kind(self) -> int:
        """The type, as in st_mode."""
        return self.key[2]


class Nodes:
    """All nodes of one guest. `root` is an open folder, which this owns; up to `keep` more descriptors stay open
    between requests, and as many for files without a name. With `fixed_links`, a link that has changed is another file:
    the guest may keep where it leads. Methods raise OSError: ESTALE for what is not there."""

    def __init__(self, root: int, keep: int, *, fixed_links: bool = False) -> None:
        self._keep = keep
        self._fixed_links = fixed_links
        self._nodes: dict[int, Node] = {}
        self._by_key: dict[Key, Node] = {}
        self._open: OrderedDict[Node, None] = OrderedDict()  # that can be opened again, the least recently used first
        self._nameless = 0
        self._next = ROOT_ID + 1
        self.root = Node(ROOT_ID, self._key_of(os.fstat(root)), None, b"")
        self.root.fd = root
        self.clear()

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, id: int) -> Node:
        node = self._nodes.get(id)
        if node is None:
            raise OSError(errno.ESTALE, f"no node {id}")
        return node

    def known(self, status: os.stat_result) -> Node | None:
        return self._by_key.get(self._key_of(status))

    def seen(self, parent: Node, name: bytes, status: os.stat_result) -> Node:
        """The node of what is `name` in `parent` now, looked up once more."""
        node = self._by_key.get(key := self._key_of(status))
        if node is None:
            if len(self._nodes) >= MAX_NODES:
                raise OSError(errno.ENFILE, "the guest knows too many files")
            node = Node(self._next, key, parent, name)
            self._next += 1
            parent.users += 1
            self._nodes[node.id] = self._by_key[key] = node
        else:
            self.moved(node, parent, name)
        node.lookups += 1
        node.users += 1
        return node

    def moved(self, node: Node, parent: Node, name: bytes) -> None:
        """`node` is `name` in `parent` now."""
        node.name = name
        if node.kept:
            node.kept = False
            self._nameless -= 1
            self._open[node] = None
        if node.parent is not parent and node is not self.root and parent.id in self._nodes:
            before, node.parent = node.parent, parent
            parent.users += 1
            self._drop(before)

    def fd(self, node: Node) -> int:
        """An O_PATH descriptor of the node, good until `trim`."""
        if node.fd >= 0:
            if node in self._open:
                self._open.move_to_end(node)
            return node.fd
        way = [node]
        while (folder := way[-1].parent) is not None and folder.fd < 0 and len(way) < MAX_DEPTH:
            way.append(folder)
        if folder is None or folder.fd < 0:
            raise OSError(errno.ESTALE, "no way from an open folder")
        fd = folder.fd
        for step in reversed(way):
            fd = step.fd = self._open_same(fd, step)
            self._open[step] = None
        return fd

    def losing_name(self, folder: Node, name: bytes) -> Node | None:
        """What is `name` in `folder` is about to be deleted: if the guest knows it, keep it open, and return it.

        If it was not deleted after all, call `moved` with the same place."""
        node = self.known(os.stat(name, dir_fd=self.fd(folder), follow_symlinks=False))
        if node is None or node is self.root:
            return None
        self.moved(node, folder, name)
        if self._nameless < self._keep:
            self.fd(node)
            self._open.pop(node, None)
            node.kept = True
            self._nameless += 1
        return node

    def forget(self, id: int, count: int) -> None:
        node = self._nodes.get(id)
        if node is not None and node is not self.root:
            count = min(count, node.lookups)
            node.lookups -= count
            node.users -= count - 1
            self._drop(node)

    def trim(self) -> None:
        """Close the descriptors that are too many; at the end of a request."""
        while len(self._open) > self._keep:
            node, _ = self._open.popitem(last=False)
            os.close(node.fd)
            node.fd = -1

    def clear(self) -> None:
        """Forget all but the root."""
        for node in self._nodes.values():
            if node.fd >= 0 and node is not self.root:
                os.close(node.fd)
                node.fd = -1
        self._open.clear()
        self._nameless = 0
        self.root.users = self.root.lookups = 1
        self._nodes = {ROOT_ID: self.root}
        self._by_key = {self.root.key: self.root}

    def close(self) -> None:
        self.clear()
        os.close(self.root.fd)

    def _drop(self, node: Node | None) -> None:
        """One user less; without any, a node goes, and its folder has one less."""
        while node is not None:
            node.users -= 1
            if node.users > 0 or node is self.root:
                return
            del self._nodes[node.id]
            del self._by_key[node.key]
            self._open.pop(node, None)
            if node.fd >= 0:
                os.close(node.fd)
                node.fd = -1
            if node.kept:
                self._nameless -= 1
            node = node.parent

    def _key_of(self, status: os.stat_result) -> Key:
        kind = stat.S_IFMT(status.st_mode)
        if self._fixed_links and kind == stat.S_IFLNK:  # inode numbers are given to new files again
            return status.st_dev, status.st_ino, kind, status.st_ctime_ns
        return status.st_dev, status.st_ino, kind

    def _open_same(self, folder: int, node: Node) -> int:
        """What has the node's name in `folder`, if that is the node's file."""
        try:
            fd = os.open(node.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            if error.errno in LOST:
                raise OSError(errno.ESTALE, "the file is no longer there") from None
            raise
        if self._key_of(os.fstat(fd)) != node.key:
            os.close(fd)
            raise OSError(errno.ESTALE, "another file is there now")
        return fd
