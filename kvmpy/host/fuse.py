"""A FUSE server for a folder of the host: requests of a guest's kernel in, answers out (<linux/fuse.h>).

The other side is Linux's virtiofs, which checks permissions itself, by owner and mode, and keeps locks of files to
itself. A hostile guest may send anything: a request is copied before it is looked at, and has a bound on its length.
A read-only share answers no request that could change it, and has no descriptor that could be written to.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.buffers import pieces, total
from ..core.errors import ConfigError
from . import fuse_wire as wire
from .fuse_folder import MAX_TRANSFER, Answer, Request, SharedFolder
from .fuse_wire import INIT_F, Op

MAX_PAGES = MAX_TRANSFER >> 12
MAX_ARGUMENTS = 1 << 17  # bytes, besides the data of WRITE: the value of an extended attribute is the longest
MAX_BACKGROUND, CONGESTED = 64, 48  # read-ahead and the like under way at once
CACHES = {"auto": 1, "always": 86400}  # seconds for which the guest believes what it was told
ALWAYS_FLAGS = (
    INIT_F.ASYNC_READ
    | INIT_F.ATOMIC_O_TRUNC
    | INIT_F.BIG_WRITES
    | INIT_F.AUTO_INVAL_DATA
    | INIT_F.DO_READDIRPLUS
    | INIT_F.READDIRPLUS_AUTO
    | INIT_F.ASYNC_DIO
    | INIT_F.PARALLEL_DIROPS
    | INIT_F.MAX_PAGES
    | INIT_F.HANDLE_KILLPRIV_V2
)
SILENT = {Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT}  # requests without an answer
CHANGING = {
    *(Op.SETATTR, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK, Op.WRITE),
    *(Op.SETXATTR, Op.REMOVEXATTR, Op.CREATE, Op.FALLOCATE, Op.COPY_FILE_RANGE),
}


class FuseServer:
    """Serves the folder `path` to one guest. `cache`: "auto", or "always" for a folder that nobody else changes;
    `xattrs`: whether it has extended attributes.

    Raises NotFoundError, ConfigError or HostError when the folder cannot be had.
    """

    def __init__(self, path: Path, *, read_only: bool = False, cache: str = "auto", xattrs: bool = True) -> None:
        if cache not in CACHES:
            raise ConfigError(f'invalid cache "{cache}" of the share {path}', f"use {' or '.join(CACHES)}")
        self.started = False  # by INIT
        self._trusting = cache == "always"
        self.folder = SharedFolder(
            path, read_only=read_only, valid=CACHES[cache], trusting=self._trusting, xattrs=xattrs
        )
        # Without a handler: ENOSYS, after which Linux goes without (FLUSH, ACCESS) or does it itself (locks).
        self._handlers: dict[int, Callable[[Request], Answer]] = {Op.INIT: self._init, Op.DESTROY: self._destroy}
        for op in Op:
            if hasattr(self.folder, op.name.lower()):
                self._handlers[op] = getattr(self.folder, op.name.lower())

    def serve(self, readable: Sequence[memoryview], writable: Sequence[memoryview]) -> int:
        """Do one request and write its answer; how many bytes that has. 0: it wants none, has no room for one, or is
        too short to be a request."""
        size = total(readable)
        header = b"".join(pieces(readable, 0, wire.IN_HEADER.size))
        if len(header) < wire.IN_HEADER.size:
            return 0
        length, op, unique, nodeid, uid, gid, *_ = wire.IN_HEADER.unpack(header)
        limit = total(writable) - wire.OUT_HEADER.size
        if limit < 0 and op not in SILENT:
            return 0
        answer: Answer = b""
        error = 0
        try:
            if not wire.IN_HEADER.size <= length <= size:
                raise OSError(errno.EINVAL, "a wrong length")
            length -= wire.IN_HEADER.size
            copied = min(length, wire.WRITE_IN.size) if op == Op.WRITE else length
            if copied > MAX_ARGUMENTS:
                raise OSError(errno.E2BIG, "too long")
            request = Request(nodeid, uid, gid, b"".join(pieces(readable, wire.IN_HEADER.size, copied)))
            request.data = pieces(readable, wire.IN_HEADER.size + copied, length - copied)
            request.room = writable
            request.limit = limit
            answer = self._answer(op, request)
        except OSError as failure:
            error = failure.errno or errno.EIO
        self.folder.nodes.trim()
        if op in SILENT:
            return 0
        if error:
            answer = b""
        done = answer if isinstance(answer, int) else len(answer)
        if done > limit:
            done, error, answer = 0, errno.EIO, b""
        done += wire.OUT_HEADER.size
        head = wire.OUT_HEADER.pack(done, -error, unique)
        wire.scatter(writable, head if isinstance(answer, int) else head + answer)
        return done

    def reset(self) -> None:
        """The guest is gone: close all that it had open, and forget what it knew."""
        self.folder.reset()
        self.started = False

    def close(self) -> None:
        self.reset()
        self.folder.close()

    def _answer(self, op: int, request: Request) -> Answer:
        handler = self._handlers.get(op)
        if handler is None:
            raise OSError(errno.ENOSYS, "not served")
        if not self.started and op != Op.INIT:
            raise OSError(errno.EIO, "before INIT")
        if self.folder.read_only and op in CHANGING:
            raise OSError(errno.EROFS, "a read-only share")
        return handler(request)

    def _init(self, request: Request) -> Answer:
        major, minor, readahead, flags = wire.unpack(wire.INIT_IN, request.args)
        if major > wire.MAJOR:
            return wire.INIT_OUT.pack(wire.MAJOR, wire.MINOR, *[0] * 9)  # it will ask again with ours
        if major < wire.MAJOR or minor < wire.MINOR:
            raise OSError(errno.EPROTO, "older than any virtiofs")
        self.reset()
        self.started = True
        flags &= ALWAYS_FLAGS | (INIT_F.CACHE_SYMLINKS if self._trusting or self.folder.read_only else 0)
        return wire.INIT_OUT.pack(
            *(wire.MAJOR, wire.MINOR, readahead, flags, MAX_BACKGROUND, CONGESTED, MAX_TRANSFER, 1, MAX_PAGES, 0, 0)
        )

    def _destroy(self, request: Request) -> Answer:
        self.reset()
        return b""
