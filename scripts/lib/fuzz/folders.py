"""Shared folders: FUSE requests of a hostile kernel, which change nothing outside the folder."""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.host import fuse_wire as wire
from kvmpy.host.fuse_wire import Op
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.spec import F

from .kind import Kind, Violation
from .oracle import Done, Image, prefix

if TYPE_CHECKING:
    from .generate import Generator
    from .rig import Rig

HIPRIO, REQUESTS = 0, 1
CANARY = b"not yours"
LARGEST = 16 << 20  # bytes of a file: the host's memory is not ours to fill
NAMES = [b"a", b"b", b"d", b"c", b"out", b"up", b"new", b"n2", b"..", b".", b"", b"a/b", b"../canary", b"x" * 256]
FLAGS = [0, 1, 2, os.O_TRUNC | 1, os.O_APPEND | 2, os.O_EXCL | 2, os.O_DIRECTORY, os.O_PATH, 0xFFFFFFFF]
INIT = wire.INIT_IN.pack(wire.MAJOR, 38, 1 << 17, 0xFFFFFFFF) + bytes(48)


class Folder(Kind):
    """A folder with files, folders and links that lead out of it."""

    NAME = "fs"
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX)
    SIZES = (8, 32)
    DEFECT = 0.03
    READ_ONLY = False
    _plain = False  # nothing is wrong with what is asked now

    def open(self, folder: Path) -> Fs:
        self.outside = folder
        self.share = share = folder / "share"
        (share / "d").mkdir(parents=True)
        (folder / "canary").write_bytes(CANARY)
        (folder / "canary").chmod(0o640)
        (share / "a").write_bytes(b"content of a")
        (share / "b").write_bytes(b"b" * 5000)
        (share / "d/c").write_bytes(b"c")
        (share / "out").symlink_to(folder / "canary")
        (share / "up").symlink_to("..")
        self._tree = self._look()
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, self._limit[1]))
        return Fs(path=share, tag="share", ro=self.READ_ONLY)

    def begin(self, make: Generator) -> None:
        if make.random.random() < 0.95:
            self._plain = True
            self._ask(make, Op.INIT, INIT, 0)
            for name in (b"a", b"d", b"out"):
                self._ask(make, Op.LOOKUP, name + b"\0", 1)
            self._ask(make, Op.OPEN, wire.OPEN_IN.pack(0 if self.READ_ONLY else 2, 0), 2)
            self._ask(make, Op.OPENDIR, wire.OPEN_IN.pack(0, 0), 1)
            self._plain = False

    def request(self, make: Generator) -> None:
        pick = make.random
        op = pick.choice(
            [*Op, *Op, Op.LOOKUP, *[Op.READ, Op.WRITE] * 4, Op.CREATE, Op.READDIR, Op.READDIRPLUS, make.word(32)]
        )
        if op == Op.DESTROY and pick.random() < 0.9:  # after which all is refused
            op = Op.READ
        args, data = self._arguments(make, op)
        if pick.random() < 0.04:
            args = args[: pick.randrange(len(args) + 1)]
        self._ask(
            make, op, args, pick.choice([1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, pick.randrange(20), make.word()]), data
        )

    def _ask(self, make: Generator, op: int, args: bytes, node: int, data: bytes = b"") -> None:
        pick = make.random
        length = wire.IN_HEADER.size + len(args) + len(data)
        if pick.random() < 0.02 and not self._plain:
            length = pick.choice([0, 39, 40, length - 1, length + 1, 0xFFFFFFFF]) & 0xFFFFFFFF
        users = [pick.choice([0, 0, 1000, 0xFFFFFFFF]) for _ in range(2)]
        header = wire.IN_HEADER.pack(length, op, make.word(), node, *users, 1, 0, 0)
        silent = op in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT)
        room = (
            []
            if silent
            else [wire.OUT_HEADER.size, pick.choice([*[4096] * (99 if self._plain else 9), 144, 8, 0, 20000])]
        )
        queue = HIPRIO if silent and pick.random() < 0.9 else REQUESTS
        make.chain(queue, [header, args, data], room)

    def _arguments(self, make: Generator, op: int) -> tuple[bytes, bytes]:
        pick = make.random
        name, other = pick.choice(NAMES) + b"\0", pick.choice(NAMES) + b"\0"
        fh = pick.choice([1, 1, 1, 2, 2, 2, 3, 4, pick.randrange(10), make.word()])
        offset = pick.choice([0, 0, 1, 4096, 5000, 1 << 20, make.word()])
        size = pick.choice([0, 1, 100, 4096, 5000, 1 << 16, make.word(32)])
        mode = pick.choice([0o644, 0o755, 0o100644, 0o4755, 0o040755, 0o060644, 0o020644, 0o177777, make.word(32)])
        if op in (Op.LOOKUP, Op.UNLINK, Op.RMDIR, Op.REMOVEXATTR):
            return name if op != Op.REMOVEXATTR else b"user.x\0", b""
        if op == Op.WRITE:
            data = pick.randbytes(16) * pick.choice([0, 1, 30, 300])
            told = len(data) if pick.random() < 0.9 else size
            return wire.WRITE_IN.pack(fh, offset, told, pick.choice([0, 4, 0xFFFFFFFF]), 0, 0, 0), data
        if op == Op.SETATTR:
            valid = pick.choice([1, 2, 4, 8, 16, 32, 8 | 64, 0x7FF, make.word(32)])
            times = [pick.choice([0, 1, -1, (1 << 63) - 1, 10**9]) for _ in range(3)]
            parts = [pick.choice([0, 999_999_999, 10**9, 0xFFFFFFFF]) for _ in range(3)]
            small = pick.choice([0, 1, 5000, 1 << 30, make.word()])
            return wire.SETATTR_IN.pack(valid, 0, fh, small, 0, *times, *parts, mode, 0, make.word(32), 0, 0), b""
        return {
            Op.FORGET: wire.FORGET_IN.pack(make.word()),
            Op.BATCH_FORGET: wire.BATCH_FORGET_IN.pack(pick.choice([0, 1, 2, 0xFFFFFFFF]), 0)
            + struct.pack("<4Q", 2, 1, 3, 9),
            Op.GETATTR: wire.GETATTR_IN.pack(pick.randrange(2), 0, fh),
            Op.SYMLINK: name + other,
            Op.MKNOD: wire.MKNOD_IN.pack(mode, make.word(32), 0, 0) + name,
            Op.MKDIR: wire.MKDIR_IN.pack(mode, 0) + name,
            Op.RENAME: wire.RENAME_IN.pack(pick.randrange(6)) + name + other,
            Op.RENAME2: wire.RENAME2_IN.pack(pick.randrange(6), pick.choice([0, 1, 2, 4, 3]), 0) + name + other,
            Op.LINK: wire.LINK_IN.pack(pick.randrange(7)) + name,
            Op.OPEN: wire.OPEN_IN.pack(pick.choice(FLAGS), pick.randrange(2)),
            Op.OPENDIR: wire.OPEN_IN.pack(pick.choice(FLAGS), 0),
            Op.CREATE: wire.CREATE_IN.pack(pick.choice(FLAGS), mode, 0, pick.randrange(2)) + name,
            Op.READ: wire.READ_IN.pack(fh, offset, size, 0, 0, 0, 0),
            Op.READDIR: wire.READ_IN.pack(fh, offset, size, 0, 0, 0, 0),
            Op.READDIRPLUS: wire.READ_IN.pack(fh, offset, size, 0, 0, 0, 0),
            Op.RELEASE: wire.RELEASE_IN.pack(fh, 0, 0, 0),
            Op.RELEASEDIR: wire.RELEASE_IN.pack(fh, 0, 0, 0),
            Op.FSYNC: wire.FSYNC_IN.pack(fh, pick.randrange(2), 0),
            Op.FSYNCDIR: wire.FSYNC_IN.pack(fh, pick.randrange(2), 0),
            Op.SETXATTR: wire.SETXATTR_IN.pack(3, pick.randrange(4))
            + pick.choice([b"user.x", b"trusted.y", b""])
            + b"\0abc",
            Op.GETXATTR: wire.GETXATTR_IN.pack(size, 0) + b"user.x\0",
            Op.LISTXATTR: wire.GETXATTR_IN.pack(size, 0),
            Op.INIT: INIT,
            Op.FALLOCATE: wire.FALLOCATE_IN.pack(fh, offset, size, pick.randrange(64), 0),
            Op.LSEEK: wire.LSEEK_IN.pack(fh, offset, pick.randrange(6), 0),
            Op.COPY_FILE_RANGE: wire.COPY_FILE_RANGE_IN.pack(
                fh, offset, 2, fh, make.word(), size, pick.choice([0, 0, 1])
            ),
            Op.FLUSH: wire.RELEASE_IN.pack(fh, 0, 0, 0),
        }.get(op, b""), b""  # type: ignore[call-overload]

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        """Answers are as long as they say, and belong to their requests; who lies about a length hears of it."""
        for one in chains:
            request = before.gather(one.readable)
            if not one.written or len(request) < wire.IN_HEADER.size:
                if one.written:
                    raise Violation("answer", f"{one.written} bytes for {len(request)} bytes of request")
                continue
            told, op, asked, *_ = wire.IN_HEADER.unpack_from(request)
            answer = after.gather(prefix(one.writable, one.written))
            length, error, unique = wire.OUT_HEADER.unpack_from(answer.ljust(wire.OUT_HEADER.size, b"\0"))
            what = f"request {op} of {len(request)} bytes, {told} by its own account"
            if (length, unique) != (len(answer), asked) or not -4096 < error <= 0:
                raise Violation("answer", f"{what}: {len(answer)} bytes, {length} by their own account, error {error}")
            if not wire.IN_HEADER.size <= told <= len(request) and error != -errno.EINVAL:
                raise Violation("answer", f"{what}: error {error}")

    def works(self, rig: Rig) -> None:
        for op, node, args in ((Op.INIT, 0, INIT), (Op.GETATTR, 1, wire.GETATTR_IN.pack(0, 0, 0))):
            header = wire.IN_HEADER.pack(wire.IN_HEADER.size + len(args), op, 7, node, 0, 0, 1, 0, 0)
            answer = rig.request(REQUESTS, [header + args], [4096])
            length, error, unique = wire.OUT_HEADER.unpack_from(answer.ljust(wire.OUT_HEADER.size, b"\0"))
            if error or unique != 7 or length != len(answer):
                raise Violation(
                    "recovery", f"{op.name} is answered with error {error}, {length} of {len(answer)} bytes"
                )

    def close(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        canary = self.outside / "canary"
        if (
            canary.read_bytes() != CANARY
            or stat.S_IMODE(canary.stat().st_mode) != 0o640
            or canary.stat().st_uid != os.getuid()
        ):
            raise Violation("file", "a file outside the folder has changed")
        if sorted(os.listdir(self.outside)) != ["canary", "share"] or canary.stat().st_nlink != 1:
            raise Violation("file", "there are other files outside the folder now")
        if self.READ_ONLY and self._look() != self._tree:
            raise Violation("file", "a read-only folder has changed")

    def _look(self) -> Any:
        if not self.READ_ONLY:
            return None
        found = []
        for path in sorted(self.share.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found.append((path, content, status.st_mode, status.st_mtime_ns, status.st_uid))
        return found


class ReadOnlyFolder(Folder):
    """A folder that the guest can only read."""

    NAME = "fs-ro"
    READ_ONLY = True
