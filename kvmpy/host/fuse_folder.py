"""The operations of FUSE on a folder of the host: what each request of a guest does (<linux/fuse.h>).

A hostile guest may name what it likes: names are single steps, and fuse_nodes.py sees to it that no step leaves the
folder. Only regular files and folders are opened or made. Of extended attributes only user.* is there. What a guest has
written is in the host's page cache when the request is answered, and on the disk after an fsync.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..core.buffers import behind, pieces, total
from ..core.errors import ConfigError, HostError, NotFoundError
from . import fuse_wire as wire
from . import syscalls
from .fuse_nodes import Node, Nodes
from .fuse_owners import SAME, Owners
from .fuse_wire import FATTR, FOPEN

MAX_TRANSFER = 1 << 20  # bytes of one READ or WRITE
MAX_LISTING = 1 << 16  # bytes of one READDIR
MAX_COPY = 1 << 26  # bytes of one COPY_FILE_RANGE, since others wait meanwhile
MAX_XATTR = 1 << 16
MAX_OFFSET = (1 << 63) - 1
DESCRIPTORS = 1 << 16  # the most that are asked of the host
IOV_MAX = 1024
SETTLED = 1_000_000_000  # ns since a file's last change, after which its times tell the next one: clocks have ticks
USER_XATTR = b"user."
OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_SYNC | os.O_DSYNC  # of the guest's that the host gets
FALLOCATE_MODES = 0x01 | 0x02 | 0x10  # FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE

Answer = bytes | int  # the bytes behind the header, or how many of them are there already


class Request:
    """What a handler gets: the header's numbers, `args` copied, `data` behind them, and `room` for its answer."""

    __slots__ = ("args", "data", "gid", "limit", "nodeid", "room", "uid")

    def __init__(self, nodeid: int, uid: int, gid: int, args: bytes) -> None:
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.args = args
        self.data: Sequence[memoryview] = ()
        self.room: Sequence[memoryview] = ()  # with the header of the answer
        self.limit = 0  # bytes behind that header


class Handle:
    """What OPEN, CREATE and OPENDIR give: a descriptor, and of a folder what was read and not yet told."""

    __slots__ = ("entries", "fd", "node", "offset")

    def __init__(self, fd: int, node: Node) -> None:
        self.fd = fd
        self.node = node
        self.entries: list[tuple[int, int, int, bytes]] = []  # ino, offset behind it, type, name; the next one last
        self.offset = 0  # of what comes next


class SharedFolder:
    """The folder `path` for one guest. The methods with a Request are named as FUSE's operations, and raise OSError.

    valid     seconds for which the guest believes what it was told of names and attributes
    trusting  nobody else changes the folder: data and names that are not there it may believe as long
    xattrs    whether there are extended attributes; without, the guest asks for one once and no more
    Of a folder that is read-only, it may also keep where links lead and, for as long as the rest, which names there are
    not. What it has read it may keep until the file has changed.
    Raises NotFoundError, ConfigError or HostError when the folder cannot be had.
    """

    def __init__(self, path: Path, *, read_only: bool, valid: int, trusting: bool, xattrs: bool = True) -> None:
        self.read_only = read_only
        self.xattrs = xattrs
        self._valid = valid
        self._trusting = trusting
        self._root_fd = _open_folder(path, os.O_RDONLY)
        self._proc = _open_folder(Path("/proc/self/fd"), os.O_PATH)
        self.max_handles = _descriptors() // 4
        self.nodes = Nodes(self._root_fd, keep=self.max_handles // 2, fixed_links=read_only)
        self.owners = Owners(self._proc)
        syscalls.load()
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._devices = {os.fstat(self._root_fd).st_dev: 0}

    def reset(self) -> None:
        """Close all that the guest had open, and forget what it knew."""
        for handle in self.handles.values():
            os.close(handle.fd)
        self.handles.clear()
        self.nodes.clear()

    def close(self) -> None:
        self.reset()
        self.nodes.close()
        os.close(self._proc)

    # The file system.

    def statfs(self, request: Request) -> Answer:
        status = os.statvfs(self._root_fd)
        return wire.STATFS_OUT.pack(
            *(status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree),
            *(status.f_bsize, status.f_namemax, status.f_frsize),
        )

    def syncfs(self, request: Request) -> Answer:
        syscalls.syncfs(self._root_fd)
        return b""

    # Nodes.

    def lookup(self, request: Request) -> Answer:
        (name,) = wire.names(request.args, 1)
        folder = self.nodes.find(request.nodeid)
        try:
            status = os.stat(name, dir_fd=self.nodes.fd(folder), follow_symlinks=False)
        except FileNotFoundError:
            if not (self._trusting or self.read_only):
                raise
            return wire.ENTRY_OUT.pack(0, 0, self._valid, 0, 0, 0) + bytes(wire.ATTR.size)  # that, too, it may keep
        return self._entry(folder, name, status)

    def forget(self, request: Request) -> Answer:
        (count,) = wire.unpack(wire.FORGET_IN, request.args)
        self.nodes.forget(request.nodeid, count)
        return b""

    def batch_forget(self, request: Request) -> Answer:
        count, _ = wire.unpack(wire.BATCH_FORGET_IN, request.args)
        end = wire.BATCH_FORGET_IN.size + count * wire.FORGET_ONE.size
        if end > len(request.args):
            raise OSError(errno.EINVAL, "fewer than it says")
        for nodeid, lookups in wire.FORGET_ONE.iter_unpack(request.args[wire.BATCH_FORGET_IN.size : end]):
            self.nodes.forget(nodeid, lookups)
        return b""

    def getattr(self, request: Request) -> Answer:
        flags, _, fh = wire.unpack(wire.GETATTR_IN, request.args)
        if flags & wire.GETATTR_FH:
            return self._attr_out(os.fstat(self._handle(fh).fd))
        return self._attr_out(os.fstat(self.nodes.fd(self.nodes.find(request.nodeid))))

    def setattr(self, request: Request) -> Answer:
        valid, _, fh, size, _, atime, mtime, _, atimensec, mtimensec, _, mode, _, uid, gid, _ = wire.unpack(
            wire.SETATTR_IN, request.args
        )
        node = self.nodes.find(request.nodeid)
        fd = self.nodes.fd(node)
        if valid & (FATTR.UID | FATTR.GID):
            self.owners.chown(fd, uid if valid & FATTR.UID else SAME, gid if valid & FATTR.GID else SAME)
        if valid & FATTR.MODE:
            if node.kind == stat.S_IFLNK:
                raise OSError(errno.EOPNOTSUPP, "a link has no mode")
            self.owners.chmod(fd, mode)
        if valid & FATTR.SIZE:
            _check_range(size, 0)
            if valid & FATTR.FH:
                os.ftruncate(self._handle(fh).fd, size)
            else:
                opened = self._reopen(node, os.O_WRONLY)
                try:
                    os.ftruncate(opened, size)
                finally:
                    os.close(opened)
            if valid & FATTR.KILL_SUIDGID:
                self.owners.drop_privileges(fd)
        if valid & (FATTR.ATIME | FATTR.MTIME):
            now, status = time.time_ns(), os.fstat(fd)
            accessed, modified = status.st_atime_ns, status.st_mtime_ns
            if valid & FATTR.ATIME:
                accessed = now if valid & FATTR.ATIME_NOW else wire.nanoseconds(atime, atimensec)
            if valid & FATTR.MTIME:
                modified = now if valid & FATTR.MTIME_NOW else wire.nanoseconds(mtime, mtimensec)
            try:
                os.utime(str(fd), ns=(accessed, modified), dir_fd=self._proc)
            except OverflowError:
                raise OSError(errno.EINVAL, "no such time") from None
        return self._attr_out(os.fstat(fd))

    def readlink(self, request: Request) -> Answer:
        node = self.nodes.find(request.nodeid)
        if node.kind != stat.S_IFLNK:
            raise OSError(errno.EINVAL, "no link")
        return os.readlink(b"", dir_fd=self.nodes.fd(node))

    # Names.

    def symlink(self, request: Request) -> Answer:
        name, target = wire.names(request.args, 2, targets=1)
        folder = self.nodes.find(request.nodeid)
        there = self.nodes.fd(folder)
        os.symlink(target, name, dir_fd=there)
        return self._made(request, folder, name, _open_new(name, there, stat.S_IFLNK), None)

    def mknod(self, request: Request) -> Answer:
        mode, _, _, _ = wire.unpack(wire.MKNOD_IN, request.args)
        (name,) = wire.names(request.args[wire.MKNOD_IN.size :], 1)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise OSError(errno.EPERM, "only files and folders can be made")
        folder = self.nodes.find(request.nodeid)
        return self._made(request, folder, name, _new_file(name, self.nodes.fd(folder), os.O_WRONLY), mode)

    def mkdir(self, request: Request) -> Answer:
        mode, _ = wire.unpack(wire.MKDIR_IN, request.args)
        (name,) = wire.names(request.args[wire.MKDIR_IN.size :], 1)
        folder = self.nodes.find(request.nodeid)
        there = self.nodes.fd(folder)
        os.mkdir(name, 0o700, dir_fd=there)
        return self._made(request, folder, name, _open_new(name, there, stat.S_IFDIR), mode)

    def unlink(self, request: Request) -> Answer:
        return self._delete(request, os.unlink)

    def rmdir(self, request: Request) -> Answer:
        return self._delete(request, os.rmdir)

    def rename(self, request: Request) -> Answer:
        (target,) = wire.unpack(wire.RENAME_IN, request.args)
        return self._move(request, target, 0, request.args[wire.RENAME_IN.size :])

    def rename2(self, request: Request) -> Answer:
        target, flags, _ = wire.unpack(wire.RENAME2_IN, request.args)
        return self._move(request, target, flags, request.args[wire.RENAME2_IN.size :])

    def link(self, request: Request) -> Answer:
        (target,) = wire.unpack(wire.LINK_IN, request.args)
        (name,) = wire.names(request.args[wire.LINK_IN.size :], 1)
        folder = self.nodes.find(request.nodeid)
        there = self.nodes.fd(folder)
        os.link(str(self.nodes.fd(self.nodes.find(target))), name, src_dir_fd=self._proc, dst_dir_fd=there)
        return self._entry(folder, name, os.stat(name, dir_fd=there, follow_symlinks=False))

    # Files.

    def open(self, request: Request) -> Answer:
        flags, more = wire.unpack(wire.OPEN_IN, request.args)
        fd, node = self._open_file(self.nodes.find(request.nodeid), flags, more)
        return self._open_out(fd, node, FOPEN.KEEP_CACHE if self._is_unchanged(fd, node) else 0)

    def create(self, request: Request) -> Answer:
        flags, mode, _, more = wire.unpack(wire.CREATE_IN, request.args)
        (name,) = wire.names(request.args[wire.CREATE_IN.size :], 1)
        folder = self.nodes.find(request.nodeid)
        there = self.nodes.fd(folder)
        self._check_handles()
        try:
            fd = _new_file(name, there, flags & OPEN_FLAGS & ~os.O_TRUNC)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            answer = self._entry(folder, name, os.stat(name, dir_fd=there, follow_symlinks=False))
            node = self.nodes.find(_node_of(answer))
            try:
                return answer + self._open_out(*self._open_file(node, flags, more))
            except OSError:
                self.nodes.forget(node.id, 1)
                raise
        answer = self._made(request, folder, name, fd, mode, close=False)
        return answer + self._open_out(fd, self.nodes.find(_node_of(answer)))

    def read(self, request: Request) -> Answer:
        fh, offset, size, *_ = wire.unpack(wire.READ_IN, request.args)
        _check_range(offset, size)
        fd = self._handle(fh).fd
        rest = pieces(request.room, wire.OUT_HEADER.size, min(size, request.limit, MAX_TRANSFER))
        done = 0
        while rest:
            count = os.preadv(fd, rest[:IOV_MAX], offset + done)
            done += count
            if not count or len(rest) <= IOV_MAX:
                break  # short only at the end of the file
            rest = behind(rest, count)
        return done

    def write(self, request: Request) -> Answer:
        fh, offset, size, flags, *_ = wire.unpack(wire.WRITE_IN, request.args)
        _check_range(offset, size)
        if size > min(total(request.data), MAX_TRANSFER):
            raise OSError(errno.EINVAL, "more than there is")
        handle = self._handle(fh)
        rest = pieces(request.data, 0, size)
        done = 0
        while rest:
            try:
                count = os.pwritev(handle.fd, rest[:IOV_MAX], offset + done)
            except OSError:
                if done:
                    break
                raise
            done += count
            rest = behind(rest, count) if count else []
        if flags & wire.WRITE_KILL_SUIDGID:
            self.owners.drop_privileges(handle.fd)
        return wire.WRITE_OUT.pack(done, 0)

    def release(self, request: Request) -> Answer:
        fh, *_ = wire.unpack(wire.RELEASE_IN, request.args)
        handle = self._handle(fh)
        del self.handles[fh]
        os.close(handle.fd)
        return b""

    def fsync(self, request: Request) -> Answer:
        fh, flags, _ = wire.unpack(wire.FSYNC_IN, request.args)
        (os.fdatasync if flags & wire.FSYNC_FDATASYNC else os.fsync)(self._handle(fh).fd)
        return b""

    def fallocate(self, request: Request) -> Answer:
        fh, offset, length, mode, _ = wire.unpack(wire.FALLOCATE_IN, request.args)
        _check_range(offset, length)
        if mode & ~FALLOCATE_MODES:
            raise OSError(errno.EOPNOTSUPP, "no such mode")
        syscalls.fallocate(self._handle(fh).fd, mode, offset, length)
        return b""

    def lseek(self, request: Request) -> Answer:
        fh, offset, whence, _ = wire.unpack(wire.LSEEK_IN, request.args)
        _check_range(offset, 0)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the guest's kernel knows the others")
        return wire.LSEEK_OUT.pack(os.lseek(self._handle(fh).fd, offset, whence))

    def copy_file_range(self, request: Request) -> Answer:
        fh_in, off_in, _, fh_out, off_out, size, flags = wire.unpack(wire.COPY_FILE_RANGE_IN, request.args)
        size = min(size, MAX_COPY)
        _check_range(off_in, size)
        _check_range(off_out, size)
        if flags:
            raise OSError(errno.EINVAL, "no such flag")
        source, target = self._handle(fh_in).fd, self._handle(fh_out).fd
        return wire.WRITE_OUT.pack(os.copy_file_range(source, target, size, off_in, off_out), 0)

    # Folders.

    def opendir(self, request: Request) -> Answer:
        node = self.nodes.find(request.nodeid)
        if node.kind != stat.S_IFDIR:
            raise OSError(errno.ENOTDIR, "no folder")
        self._check_handles()
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.nodes.fd(node))
        return self._open_out(fd, node, FOPEN.CACHE_DIR if self._trusting else 0)

    def readdir(self, request: Request) -> Answer:
        return self._list(request, plus=False)

    def readdirplus(self, request: Request) -> Answer:
        return self._list(request, plus=True)

    def releasedir(self, request: Request) -> Answer:
        return self.release(request)

    def fsyncdir(self, request: Request) -> Answer:
        return self.fsync(request)

    # Extended attributes.

    def setxattr(self, request: Request) -> Answer:
        size, flags = wire.unpack(wire.SETXATTR_IN, request.args)
        name, end, value = request.args[wire.SETXATTR_IN.size :].partition(b"\0")
        if not end or len(value) != size:
            raise OSError(errno.EINVAL, "not what it says")
        if size > MAX_XATTR or flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
            raise OSError(errno.EINVAL, "too long, or flags that are none")
        os.setxattr(self._xattrs(request, name), name, value, flags)
        return b""

    def getxattr(self, request: Request) -> Answer:
        size, _ = wire.unpack(wire.GETXATTR_IN, request.args)
        name, end, _ = request.args[wire.GETXATTR_IN.size :].partition(b"\0")
        if not end:
            raise OSError(errno.EINVAL, "a name without end")
        return wire.sized(os.getxattr(self._xattrs(request, name), name), size)

    def listxattr(self, request: Request) -> Answer:
        size, _ = wire.unpack(wire.GETXATTR_IN, request.args)
        names = map(os.fsencode, os.listxattr(self._xattrs(request, USER_XATTR)))
        return wire.sized(b"".join(name + b"\0" for name in names if name.startswith(USER_XATTR)), size)

    def removexattr(self, request: Request) -> Answer:
        name, _, _ = request.args.partition(b"\0")
        os.removexattr(self._xattrs(request, name), name)
        return b""

    # Steps of the above.

    def _handle(self, fh: int) -> Handle:
        handle = self.handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, f"no handle {fh}")
        return handle

    def _check_handles(self) -> None:
        if len(self.handles) >= self.max_handles:
            raise OSError(errno.ENFILE, "the guest has too many files open")

    def _open_file(self, node: Node, flags: int, more: int) -> tuple[int, Node]:
        if self.read_only and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            raise OSError(errno.EROFS, "a read-only share")
        self._check_handles()
        fd = self._reopen(node, flags & OPEN_FLAGS)
        if flags & os.O_TRUNC and more & wire.OPEN_KILL_SUIDGID:
            self.owners.drop_privileges(fd)
        return fd, node

    def _reopen(self, node: Node, flags: int) -> int:
        """The file of a node, opened. O_PATH keeps what it is: nothing else can have come there since the look."""
        if node.kind == stat.S_IFDIR:
            raise OSError(errno.EISDIR, "a folder")
        if node.kind != stat.S_IFREG:
            raise OSError(errno.ENXIO, "no regular file")
        return os.open(str(self.nodes.fd(node)), flags | os.O_CLOEXEC, dir_fd=self._proc)

    def _open_out(self, fd: int, node: Node, flags: int = 0) -> bytes:
        """A handle for `fd`, which is its own from here on."""
        handle = self._next_handle
        self._next_handle += 1
        self.handles[handle] = Handle(fd, node)
        return wire.OPEN_OUT.pack(handle, flags | (FOPEN.KEEP_CACHE if self._trusting else 0), 0)

    def _is_unchanged(self, fd: int, node: Node) -> bool:
        """Whether the content is what it was when the guest opened the file last."""
        status = os.fstat(fd)
        before, content = node.content, (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        node.content = content if abs(time.time_ns() - status.st_ctime_ns) > SETTLED else None
        return before == content

    def _made(
        self, request: Request, folder: Node, name: bytes, fd: int, mode: int | None, *, close: bool = True
    ) -> bytes:
        """The entry of `fd`, which was just made: it gets its mode, and the owner that the guest says. Its group it
        may have from its folder. On an error it is deleted again."""
        there = self.nodes.fd(folder)
        try:
            status = os.fstat(fd)
            self.owners.give(fd, there, request.uid, request.gid, mode)
            answer = self._entry(folder, name, os.fstat(fd))
        except BaseException:
            os.close(fd)
            (os.rmdir if stat.S_ISDIR(status.st_mode) else os.unlink)(name, dir_fd=there)
            raise
        if close:
            os.close(fd)
        return answer

    def _delete(self, request: Request, delete: Callable[..., None]) -> bytes:
        (name,) = wire.names(request.args, 1)
        folder = self.nodes.find(request.nodeid)
        node = self.nodes.losing_name(folder, name)
        try:
            delete(name, dir_fd=self.nodes.fd(folder))
        except OSError:
            self._still_there(node, folder, name)
            raise
        return b""

    def _move(self, request: Request, target: int, flags: int, names: bytes) -> bytes:
        old, new = wire.names(names, 2)
        source, folder = self.nodes.find(request.nodeid), self.nodes.find(target)
        here, there = self.nodes.fd(source), self.nodes.fd(folder)
        moved = [(folder, there, new)]
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "no such flag")
        if flags:
            syscalls.renameat2(here, old, there, new, flags)
            if flags & syscalls.RENAME_EXCHANGE:
                moved.append((source, here, old))
        else:
            replaced = None
            with suppress(FileNotFoundError):
                replaced = self.nodes.losing_name(folder, new)
            try:
                os.rename(old, new, src_dir_fd=here, dst_dir_fd=there)
            except OSError:
                self._still_there(replaced, folder, new)
                raise
        for place, fd, name in moved:
            node = self.nodes.known(os.stat(name, dir_fd=fd, follow_symlinks=False))
            if node is not None:
                self.nodes.moved(node, place, name)
        return b""

    def _still_there(self, node: Node | None, folder: Node, name: bytes) -> None:
        if node is not None:
            self.nodes.moved(node, folder, name)

    def _list(self, request: Request, *, plus: bool) -> bytes:
        fh, offset, size, *_ = wire.unpack(wire.READ_IN, request.args)
        handle = self._handle(fh)
        node = self.nodes.find(request.nodeid)
        if handle.node is not node or node.kind != stat.S_IFDIR:
            raise OSError(errno.EBADF, "not this folder's handle")
        if offset != handle.offset:
            _check_range(offset, 0)
            os.lseek(handle.fd, offset, os.SEEK_SET)
            handle.entries, handle.offset = [], offset
        limit = min(size, request.limit, MAX_LISTING)
        out: list[bytes] = []
        while True:
            if not handle.entries:
                handle.entries = syscalls.getdents(handle.fd)
                if not handle.entries:
                    break
            ino, after, kind, name = handle.entries[-1]
            record = wire.DIRENT.pack(ino, after, len(name), kind) + name
            record += bytes(-len(record) % 8)
            limit -= len(record) + plus * (wire.ENTRY_OUT.size + wire.ATTR.size)
            if limit < 0:
                if not out:
                    raise OSError(errno.EINVAL, "no room for one entry")
                break
            if plus:
                out.append(self._entry_or_none(node, name, handle.fd))
            out.append(record)
            handle.entries.pop()
            handle.offset = after
        return b"".join(out)

    def _entry_or_none(self, folder: Node, name: bytes, fd: int) -> bytes:
        """The entry for a name that was listed; one without a node when it is gone, or needs none."""
        if name not in (b".", b".."):
            try:
                return self._entry(folder, name, os.stat(name, dir_fd=fd, follow_symlinks=False))
            except OSError:
                pass
        return bytes(wire.ENTRY_OUT.size + wire.ATTR.size)

    def _entry(self, folder: Node, name: bytes, status: os.stat_result) -> bytes:
        node = self.nodes.seen(folder, name, status)
        return wire.ENTRY_OUT.pack(node.id, 0, self._valid, self._valid, 0, 0) + self._attr(status)

    def _attr_out(self, status: os.stat_result) -> bytes:
        return wire.ATTR_OUT.pack(self._valid, 0, 0) + self._attr(status)

    def _attr(self, status: os.stat_result) -> bytes:
        uid, gid = self.owners.shown(status)
        inode = status.st_ino
        if mount := self._devices.setdefault(status.st_dev, len(self._devices)):
            inode = (inode + (mount << 48)) & 0xFFFFFFFFFFFFFFFF  # programs tell files apart by number alone
        (accessed, a), (modified, m), (changed, c) = (
            divmod(time, 1_000_000_000) for time in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        )
        return wire.ATTR.pack(
            *(inode, status.st_size, status.st_blocks, accessed, modified, changed, a, m, c, status.st_mode),
            *(status.st_nlink, uid, gid, wire.device(status.st_rdev), status.st_blksize, 0),
        )

    def _xattrs(self, request: Request, name: bytes) -> str:
        """The path by which extended attributes of the node can be had; raises OSError for all but user.*."""
        if not self.xattrs:
            raise OSError(errno.ENOSYS, "no extended attributes")
        node = self.nodes.find(request.nodeid)
        if not name.startswith(USER_XATTR) or node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.EOPNOTSUPP, "only user.*, of files and folders")
        return f"/proc/self/fd/{self.nodes.fd(node)}"


def _open_folder(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"no folder {path}", "make it, or name another") from None
    except NotADirectoryError:
        raise ConfigError(f"{path} is no folder", "share the folder that it is in") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise HostError(f"cannot open the folder {path}: {why}", "make it readable") from None


def _descriptors() -> int:
    """How many descriptors this process may have: as many as it can be allowed without asking, up to a bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _node_of(entry: bytes) -> int:
    nodeid: int = wire.ENTRY_OUT.unpack_from(entry)[0]
    return nodeid


def _open_new(name: bytes, folder: int, kind: int) -> int:
    """What was just made, O_PATH; it is deleted again where it cannot be opened."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        with suppress(OSError):
            (os.rmdir if kind == stat.S_IFDIR else os.unlink)(name, dir_fd=folder)
        raise
    if stat.S_IFMT(os.fstat(fd).st_mode) != kind:
        os.close(fd)
        raise OSError(errno.EIO, "somebody has put something else in its place")
    return fd


def _new_file(name: bytes, folder: int, flags: int) -> int:
    """A new file that only its owner can use, until it gets its mode."""
    flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=folder)


def _check_range(offset: int, length: int) -> None:
    if offset > MAX_OFFSET - length:
        raise OSError(errno.EINVAL, "no such offset")
