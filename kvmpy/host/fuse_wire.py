"""The FUSE protocol as bytes: numbers and structures of version 7.31 and later (<linux/fuse.h>)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum

from ..core.buffers import pieces
from ..core.regs import Bits, bit

MAJOR, MINOR = 7, 31
ROOT_ID = 1  # the node that is there without a LOOKUP


class Op(IntEnum):
    """Requests, as in fuse_in_header.opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50


class INIT_F(Bits):
    """fuse_init_in.flags and fuse_init_out.flags."""

    ASYNC_READ = bit(0)
    ATOMIC_O_TRUNC = bit(3)
    BIG_WRITES = bit(5)
    AUTO_INVAL_DATA = bit(12)
    DO_READDIRPLUS = bit(13)
    READDIRPLUS_AUTO = bit(14)
    ASYNC_DIO = bit(15)
    PARALLEL_DIROPS = bit(18)
    MAX_PAGES = bit(22)
    CACHE_SYMLINKS = bit(23)
    HANDLE_KILLPRIV_V2 = bit(28)


class FATTR(Bits):
    """fuse_setattr_in.valid."""

    MODE = bit(0)
    UID = bit(1)
    GID = bit(2)
    SIZE = bit(3)
    ATIME = bit(4)
    MTIME = bit(5)
    FH = bit(6)
    ATIME_NOW = bit(7)
    MTIME_NOW = bit(8)
    KILL_SUIDGID = bit(11)


class FOPEN(Bits):
    """fuse_open_out.open_flags."""

    KEEP_CACHE = bit(1)
    CACHE_DIR = bit(3)


GETATTR_FH = 1 << 0  # fuse_getattr_in.getattr_flags
OPEN_KILL_SUIDGID = 1 << 0  # fuse_open_in.open_flags
WRITE_KILL_SUIDGID = 1 << 2  # fuse_write_in.write_flags
FSYNC_FDATASYNC = 1 << 0  # fuse_fsync_in.fsync_flags

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique

ATTR = struct.Struct("<QQQqqqIIIIIIIIII")  # ino, size, blocks, a/m/ctime, a/m/ctimensec, mode, nlink, uid, gid, rdev,
# blksize, flags
ENTRY_OUT = struct.Struct("<QQQQII")  # nodeid, generation, entry_valid, attr_valid, their nanoseconds; then ATTR
ATTR_OUT = struct.Struct("<QII")  # attr_valid, attr_valid_nsec, dummy; then ATTR
DIRENT = struct.Struct("<QQII")  # ino, off, namelen, type; then the name, padded to 8 bytes

INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags; later kernels send more
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")  # major, minor, max_readahead, flags, max_background,
# congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2, unused
FORGET_IN = struct.Struct("<Q")  # nlookup
BATCH_FORGET_IN = struct.Struct("<II")  # count, dummy; then as many FORGET_ONE
FORGET_ONE = struct.Struct("<QQ")  # nodeid, nlookup
GETATTR_IN = struct.Struct("<IIQ")  # getattr_flags, dummy, fh
SETATTR_IN = struct.Struct("<IIQQQqqqIIIIIIII")  # valid, padding, fh, size, lock_owner, a/m/ctime, a/m/ctimensec, mode,
# unused4, uid, gid, unused5
MKNOD_IN = struct.Struct("<IIII")  # mode, rdev, umask, padding; then the name
MKDIR_IN = struct.Struct("<II")  # mode, umask; then the name
RENAME_IN = struct.Struct("<Q")  # newdir; then both names
RENAME2_IN = struct.Struct("<QII")  # newdir, flags, padding; then both names
LINK_IN = struct.Struct("<Q")  # oldnodeid; then the name
OPEN_IN = struct.Struct("<II")  # flags, open_flags
CREATE_IN = struct.Struct("<IIII")  # flags, mode, umask, open_flags; then the name
OPEN_OUT = struct.Struct("<QII")  # fh, open_flags, padding
RELEASE_IN = struct.Struct("<QIIQ")  # fh, flags, release_flags, lock_owner
READ_IN = struct.Struct("<QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
WRITE_IN = struct.Struct("<QQIIQII")  # fh, offset, size, write_flags, lock_owner, flags, padding; then the data
WRITE_OUT = struct.Struct("<II")  # size, padding
STATFS_OUT = struct.Struct("<QQQQQIII28x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
FSYNC_IN = struct.Struct("<QII")  # fh, fsync_flags, padding
SETXATTR_IN = struct.Struct("<II")  # size, flags; then name and value
GETXATTR_IN = struct.Struct("<II")  # size, padding; then the name
GETXATTR_OUT = struct.Struct("<II")  # size, padding
FALLOCATE_IN = struct.Struct("<QQQII")  # fh, offset, length, mode, padding
LSEEK_IN = struct.Struct("<QQII")  # fh, offset, whence, padding
LSEEK_OUT = struct.Struct("<Q")  # offset
COPY_FILE_RANGE_IN = struct.Struct("<QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags


def unpack(layout: struct.Struct, args: bytes) -> tuple[int, ...]:
    """The numbers that `args` begins with; raises OSError when there are fewer."""
    if len(args) < layout.size:
        raise OSError(errno.EINVAL, "fewer arguments than the request has")
    return layout.unpack_from(args)


def names(args: bytes, count: int, targets: int = 0) -> list[bytes]:
    """The `count` NUL-terminated names in `args`, of which all but the last `targets` must be single steps."""
    found = args.split(b"\0", count)[:-1]
    if len(found) < count:
        raise OSError(errno.EINVAL, "a name without end")
    for name in found[: count - targets]:
        if name in (b"", b".", b"..") or b"/" in name:
            raise OSError(errno.EINVAL, "no name of a file")
    return found


def nanoseconds(seconds: int, rest: int) -> int:
    """A time as the host has it; raises OSError when it is none."""
    if rest >= 1_000_000_000:
        raise OSError(errno.EINVAL, "no such time")
    return seconds * 1_000_000_000 + rest


def device(number: int) -> int:
    """A device number in the kernel's own encoding of 32 bits (new_encode_dev)."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12) & 0xFFFFFFFF


def sized(data: bytes, size: int) -> bytes:
    """The answer to a request for `size` bytes of extended attributes; 0 asks how many there are."""
    if not size:
        return GETXATTR_OUT.pack(len(data), 0)
    if len(data) > size:
        raise OSError(errno.ERANGE, "longer than that")
    return data


def scatter(buffers: Sequence[memoryview], data: bytes) -> None:
    """Write `data` over the beginning of `buffers`."""
    rest = memoryview(data)
    for piece in pieces(buffers, 0, len(rest)):
        piece[:] = rest[: len(piece)]
        rest = rest[len(piece) :]
