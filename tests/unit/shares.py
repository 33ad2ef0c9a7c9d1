"""A guest's kernel for tests of FuseServer: it makes requests and reads answers, by name, as a file system client."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvmpy.host import fuse_wire as wire
from kvmpy.host.fuse_wire import FATTR, ROOT_ID, Op

ROOM = 1 << 16

Serve = Callable[[Sequence[bytes], int], bytes]  # the answer to a request in these parts, of at most so many bytes


class Attr(NamedTuple):
    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @property
    def permissions(self) -> int:
        return stat.S_IMODE(self.mode)


class Entry(NamedTuple):
    node: int
    attr: Attr
    valid: int  # seconds


class Client:
    """Requests to the server behind `serve`, as user `uid` and group `gid`; OSError is the server's error."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.uid = self.gid = 0
        self._unique = 0

    def call(self, op: int, node: int, args: bytes = b"", room: int = ROOM, data: bytes = b"") -> bytes:
        """What the answer has behind its header."""
        self._unique += 2
        length = wire.IN_HEADER.size + len(args) + len(data)
        header = wire.IN_HEADER.pack(length, op, self._unique, node, self.uid, self.gid, 1, 0, 0)
        answer = self.serve([header, args, data], wire.OUT_HEADER.size + room)
        length, error, unique = wire.OUT_HEADER.unpack_from(answer)
        assert (length, unique) == (len(answer), self._unique)
        if error:
            assert len(answer) == wire.OUT_HEADER.size
            raise OSError(-error, os.strerror(-error))
        return answer[wire.OUT_HEADER.size :]

    def silent(self, op: int, node: int, args: bytes = b"") -> None:
        header = wire.IN_HEADER.pack(wire.IN_HEADER.size + len(args), op, 0, node, 0, 0, 0, 0, 0)
        assert self.serve([header, args], 0) == b""

    def init(self, flags: int = 0xFFFFFFFF, major: int = wire.MAJOR, minor: int = 38) -> tuple[int, ...]:
        return wire.INIT_OUT.unpack(self.call(Op.INIT, 0, wire.INIT_IN.pack(major, minor, 1 << 17, flags) + bytes(48)))

    # Nodes.

    def lookup(self, name: bytes, folder: int = ROOT_ID) -> Entry:
        return entry(self.call(Op.LOOKUP, folder, name + b"\0"))

    def walk(self, path: str) -> int:
        """The node of a path with slashes."""
        node = ROOT_ID
        for name in path.split("/"):
            node = self.lookup(os.fsencode(name), node).node
        return node

    def getattr(self, node: int, fh: int | None = None) -> Attr:
        flags = 0 if fh is None else wire.GETATTR_FH
        return attr(self.call(Op.GETATTR, node, wire.GETATTR_IN.pack(flags, 0, fh or 0)), wire.ATTR_OUT.size)

    def setattr(self, node: int, valid: int, **values: int) -> Attr:
        names = "fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode unused4 uid gid unused5"
        fields = [values.get(name, 0) for name in names.split()]
        answer = self.call(Op.SETATTR, node, wire.SETATTR_IN.pack(valid, 0, *fields))
        return attr(answer, wire.ATTR_OUT.size)

    def chmod(self, node: int, mode: int) -> Attr:
        return self.setattr(node, FATTR.MODE, mode=mode)

    def truncate(self, node: int, size: int) -> Attr:
        return self.setattr(node, FATTR.SIZE, size=size)

    def forget(self, node: int, count: int = 1) -> None:
        self.silent(Op.FORGET, node, wire.FORGET_IN.pack(count))

    # Names.

    def mkdir(self, name: bytes, folder: int = ROOT_ID, mode: int = 0o755) -> Entry:
        return entry(self.call(Op.MKDIR, folder, wire.MKDIR_IN.pack(mode, 0) + name + b"\0"))

    def mknod(self, name: bytes, mode: int, folder: int = ROOT_ID, rdev: int = 0) -> Entry:
        return entry(self.call(Op.MKNOD, folder, wire.MKNOD_IN.pack(mode, rdev, 0, 0) + name + b"\0"))

    def symlink(self, name: bytes, target: bytes, folder: int = ROOT_ID) -> Entry:
        return entry(self.call(Op.SYMLINK, folder, name + b"\0" + target + b"\0"))

    def readlink(self, node: int) -> bytes:
        return self.call(Op.READLINK, node)

    def link(self, node: int, name: bytes, folder: int = ROOT_ID) -> Entry:
        return entry(self.call(Op.LINK, folder, wire.LINK_IN.pack(node) + name + b"\0"))

    def unlink(self, name: bytes, folder: int = ROOT_ID) -> None:
        self.call(Op.UNLINK, folder, name + b"\0")

    def rmdir(self, name: bytes, folder: int = ROOT_ID) -> None:
        self.call(Op.RMDIR, folder, name + b"\0")

    def rename(
        self, old: bytes, new: bytes, folder: int = ROOT_ID, target: int = ROOT_ID, flags: int | None = None
    ) -> None:
        if flags is None:
            self.call(Op.RENAME, folder, wire.RENAME_IN.pack(target) + old + b"\0" + new + b"\0")
        else:
            self.call(Op.RENAME2, folder, wire.RENAME2_IN.pack(target, flags, 0) + old + b"\0" + new + b"\0")

    # Files.

    def create(
        self, name: bytes, folder: int = ROOT_ID, mode: int = 0o644, flags: int = os.O_RDWR
    ) -> tuple[Entry, int]:
        """The entry and a handle."""
        answer = self.call(Op.CREATE, folder, wire.CREATE_IN.pack(flags, mode, 0, 0) + name + b"\0")
        return entry(answer), wire.OPEN_OUT.unpack_from(answer, wire.ENTRY_OUT.size + wire.ATTR.size)[0]

    def open(self, node: int, flags: int = os.O_RDONLY, more: int = 0) -> int:
        return self.open_out(node, flags, more)[0]

    def open_out(self, node: int, flags: int = os.O_RDONLY, more: int = 0) -> tuple[int, int]:
        fh, given, _ = wire.OPEN_OUT.unpack(self.call(Op.OPEN, node, wire.OPEN_IN.pack(flags, more)))
        return fh, given

    def read(self, fh: int, offset: int = 0, size: int = 4096, node: int = ROOT_ID) -> bytes:
        return self.call(Op.READ, node, wire.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), room=size)

    def write(self, fh: int, data: bytes, offset: int = 0, flags: int = 0) -> int:
        args = wire.WRITE_IN.pack(fh, offset, len(data), flags, 0, 0, 0)
        return wire.WRITE_OUT.unpack(self.call(Op.WRITE, ROOT_ID, args, data=data))[0]

    def release(self, fh: int, op: int = Op.RELEASE) -> None:
        self.call(op, ROOT_ID, wire.RELEASE_IN.pack(fh, 0, 0, 0))

    def content(self, node: int) -> bytes:
        """All of a file of up to 4 KiB."""
        fh = self.open(node)
        data = self.read(fh)
        self.release(fh)
        return data

    # Folders.

    def opendir(self, node: int = ROOT_ID) -> int:
        return wire.OPEN_OUT.unpack(self.call(Op.OPENDIR, node, wire.OPEN_IN.pack(0, 0)))[0]

    def readdir(self, fh: int, node: int = ROOT_ID, offset: int = 0, size: int = 4096) -> list[tuple[bytes, int, int]]:
        """(name, type, offset behind it) of each."""
        answer = self.call(Op.READDIR, node, wire.READ_IN.pack(fh, offset, size, 0, 0, 0, 0))
        found, at = [], 0
        while at < len(answer):
            _, after, length, kind = wire.DIRENT.unpack_from(answer, at)
            found.append((answer[at + wire.DIRENT.size :][:length], kind, after))
            at += -(-(wire.DIRENT.size + length) // 8) * 8
        return found

    def readdirplus(self, fh: int, node: int = ROOT_ID, offset: int = 0, size: int = 4096) -> dict[bytes, Entry]:
        answer = self.call(Op.READDIRPLUS, node, wire.READ_IN.pack(fh, offset, size, 0, 0, 0, 0))
        found, at = {}, 0
        while at < len(answer):
            start = at + wire.ENTRY_OUT.size + wire.ATTR.size
            _, _, length, _ = wire.DIRENT.unpack_from(answer, start)
            found[answer[start + wire.DIRENT.size :][:length]] = entry(answer[at:])
            at = start + -(-(wire.DIRENT.size + length) // 8) * 8
        return found

    def names(self, node: int = ROOT_ID) -> set[bytes]:
        """What is in a folder, read in small pieces."""
        fh = self.opendir(node)
        found: list[tuple[bytes, int, int]] = []
        while part := self.readdir(fh, node, found[-1][2] if found else 0, 300):
            found += part
        self.release(fh, Op.RELEASEDIR)
        names = {name for name, _, _ in found}
        assert len(names) == len(found)
        return names - {b".", b".."}

    # Extended attributes.

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self.call(Op.SETXATTR, node, wire.SETXATTR_IN.pack(len(value), flags) + name + b"\0" + value)

    def getxattr(self, node: int, name: bytes, size: int = 4096) -> bytes:
        return self.call(Op.GETXATTR, node, wire.GETXATTR_IN.pack(size, 0) + name + b"\0")

    def listxattr(self, node: int, size: int = 4096) -> bytes:
        return self.call(Op.LISTXATTR, node, wire.GETXATTR_IN.pack(size, 0))


def entry(answer: bytes) -> Entry:
    node, generation, valid, _, _, _ = wire.ENTRY_OUT.unpack_from(answer)
    assert generation == 0
    return Entry(node, attr(answer, wire.ENTRY_OUT.size), valid)


def attr(answer: bytes, at: int) -> Attr:
    return Attr._make(wire.ATTR.unpack_from(answer, at))
