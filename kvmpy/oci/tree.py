"""The files of an image, as its layers leave them one after the other (OCI image-spec 1.1, layer.md).

Nothing here is a file of the host: names lead nowhere but to nodes of the tree. As with a container, links on the way
to a name are followed, `..` in them included, and end at the root of the image at most.
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Iterator
from typing import Any

from ..core.errors import ImageError

MAX_LINKS = 40  # followed on the way to one name, as in Linux
MAX_STEPS = 1024  # on the way to one name, those through links included
MAX_NAME = 255  # bytes: of Linux's file systems
MAX_PATH = 4096
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
REMEDY = "get the image from its source again, or do not trust it"


# A million nodes share these.
NO_XATTRS: dict[str, bytes] = {}
NO_CHILDREN: dict[bytes, Any] = {}


class Node:
    """A file of any kind; what a hard link shares."""

    __slots__ = (
        "children",
        "gid",
        "inode",
        "links",
        "mode",
        "mtime",
        "rdev",
        "size",
        "start",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0) -> None:
        self.mode, self.uid, self.gid = mode, uid, gid
        self.mtime = mtime  # ns since 1970
        self.xattrs = NO_XATTRS  # to be replaced, not changed
        self.rdev = (0, 0)
        self.target = b""  # of a symbolic link
        self.start = self.size = 0  # where the content is, for who has written it
        # Of a folder: with the layer that put it there.
        self.children: dict[bytes, tuple[Node, int]] = {} if stat.S_ISDIR(mode) else NO_CHILDREN
        self.inode = self.links = 0  # for who writes the tree

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Tree:
    """Layers are applied in their order, each entry of each in its order. Raises ImageError for what cannot be."""

    def __init__(self, max_files: int) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self.layer = 0  # the one that is applied now
        self._left = self._max_files = max_files

    def put(self, path: bytes, node: Node) -> None:
        """Have `node` at `path`, where it replaces what was there; a folder takes over what is in the one before it."""
        folder, name = self._place(path, True)
        if not name:
            if not node.is_folder:
                raise ImageError("the root of the image is no folder", REMEDY)
            node.children = self.root.children
            self.root = node
            return
        old, _ = folder.children.get(name, (None, 0))
        if old is not None and old.is_folder and node.is_folder:
            node.children = old.children
        self._add(folder, name, node)

    def link(self, path: bytes, target: bytes) -> None:
        """Another name for the file at `target`."""
        source_folder, source_name = self._place(target)
        source, _ = source_folder.children.get(source_name, (None, 0))
        if source is None or source.is_folder:
            kind = "a folder" if source is not None else "not there"
            raise ImageError(f"{shown(path)} is a hard link to {shown(target)}, which is {kind}", REMEDY)
        folder, name = self._place(path, True)
        if not name:
            raise ImageError("the root of the image is a hard link", REMEDY)
        self._add(folder, name, source)

    def whiteout(self, path: bytes) -> bool:
        """Whether `path` only says what lower layers have no more; that is gone then."""
        parent, _, name = path.rstrip(b"/").rpartition(b"/")
        if not name.startswith(WHITEOUT):
            return False
        if name == OPAQUE:
            self._hide_lower(self._folder(parent))
        elif not name.startswith(WHITEOUT + WHITEOUT):  # else a mark of aufs for itself
            name = name.removeprefix(WHITEOUT)
            if name in (b"", b".", b".."):
                raise ImageError(f"the whiteout {shown(path)} stands for no name", REMEDY)
            folder = self._folder(parent)
            old, layer = folder.children.get(name, (None, 0))
            if old is not None and layer < self.layer:
                del folder.children[name]
            elif old is not None and old.is_folder:
                self._hide_lower(old)
        return True

    def make_folder(self, path: bytes) -> None:
        """Have a folder at `path`, with those above it."""
        self._folder(path)

    def find(self, path: bytes) -> Node | None:
        """What is at `path`, which is a link if that is one."""
        node = self.root
        for part in path.split(b"/"):
            if part:
                found = node.children.get(part)
                if found is None:
                    return None
                node = found[0]
        return node

    def folders(self) -> Iterator[tuple[Node, Node]]:
        """Each folder with the one that it is in, parents first."""
        pending = deque([(self.root, self.root)])
        while pending:
            node, parent = pending.popleft()
            yield node, parent
            pending.extend((child, node) for child, _ in node.children.values() if child.is_folder)

    def _add(self, folder: Node, name: bytes, node: Node) -> None:
        self._left -= 1
        if self._left < 0:
            raise ImageError(
                f"the image has more than {self._max_files} files", "this is the limit; use a smaller image"
            )
        folder.children[name] = node, self.layer

    def _place(self, path: bytes, mark: bool = False) -> tuple[Node, bytes]:
        """The folder of `path`, which is made if need be, and the name in it; an empty one for the root."""
        parts = self._parts(path)
        return (self._walk(parts[:-1], path, mark), parts[-1]) if parts else (self.root, b"")

    @staticmethod
    def _parts(path: bytes) -> list[bytes]:
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if len(path) > MAX_PATH or b"\0" in path or any(len(part) > MAX_NAME for part in parts):
            raise ImageError(f"the name {shown(path)} is longer than Linux allows, or has a NUL", REMEDY)
        if b".." in parts:
            raise ImageError(f'the name {shown(path)} has ".." in it', REMEDY)
        return parts

    def _folder(self, path: bytes) -> Node:
        return self._walk(self._parts(path), path)

    def _walk(self, parts: list[bytes], path: bytes, mark: bool = False) -> Node:
        """The folder that `parts` lead to, through links; what is missing on the way is made. With `mark`, this layer
        has those on the way, whether lower layers have them or not."""
        stack = [self.root]
        pending, links = deque(parts), 0
        for _ in range(MAX_STEPS):
            if not pending:
                return stack[-1]
            part = pending.popleft()
            if part in (b"", b"."):
                continue
            if part == b"..":
                del stack[max(1, len(stack) - 1) :]
                continue
            node, _ = stack[-1].children.get(part, (None, 0))
            if node is None:
                node = Node(stat.S_IFDIR | 0o755)
                self._add(stack[-1], part, node)
            if node.is_folder:
                if mark:
                    stack[-1].children[part] = node, self.layer
                stack.append(node)
            elif stat.S_ISLNK(node.mode) and links < MAX_LINKS:
                links += 1
                if node.target.startswith(b"/"):
                    stack = [self.root]
                pending.extendleft(reversed(node.target.split(b"/")))
            else:
                why = "in a loop of links" if links == MAX_LINKS else "in what is no folder"
                raise ImageError(f"the name {shown(path)} is {why}", REMEDY)
        raise ImageError(f"the name {shown(path)} is too deep, or behind too many links", REMEDY)

    def _hide_lower(self, folder: Node) -> None:
        """Take away all below `folder` that this layer has not put there."""
        pending = [folder]
        while pending:
            children = pending.pop().children
            for name, (node, layer) in list(children.items()):
                if layer < self.layer:
                    del children[name]
                elif node.is_folder:
                    pending.append(node)


def shown(path: bytes) -> str:
    """A name from an image, fit for a message."""
    text = path.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 100 else text[:100] + "...")
