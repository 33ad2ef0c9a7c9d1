"""Files and folders of the host as trees; what a guest sends never leaves the folder it is meant for."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import ConfigError, GuestError, HostError, NotFoundError, TooLarge
from . import protocol
from .protocol import FILE_COST, MAX_DATA, TREE_LIMIT, Entry, Kind

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
TO_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
KEPT = 0o755  # mode bits that a guest may set on the host's files


def pack(host: Path) -> Iterator[bytes]:
    """The frames of the file or folder, END included; raises NotFoundError, ConfigError and HostError."""
    try:
        yield from _pack(host, b"", host.stat())
    except FileNotFoundError as error:
        raise NotFoundError(f'there is no "{os.fsdecode(error.filename)}" on the host') from None
    except OSError as error:
        raise HostError(f'cannot read "{os.fsdecode(error.filename or host)}": {error.strerror}') from None
    yield protocol.frame(Kind.END)


def _pack(host: Path, name: bytes, status: os.stat_result) -> Iterator[bytes]:
    mode = status.st_mode
    is_link = stat.S_ISLNK(mode)
    if not (is_link or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f'"{host}" is neither file, folder nor link', "leave it out")
    target = os.fsencode(host.readlink()) if is_link else b""
    entry = Entry(mode, 0, 0, 1, status.st_size, status.st_mtime_ns & protocol.EVERYTHING)
    yield protocol.frame(Kind.ENTRY, bytes(entry) + protocol.strings(name, target))
    if stat.S_ISREG(mode):
        with host.open("rb", buffering=0) as file:
            while data := file.read(MAX_DATA):
                yield protocol.frame(Kind.DATA, data)
    elif stat.S_ISDIR(mode):
        for child in sorted(os.listdir(host)):
            path = host / child
            yield from _pack(path, (name + b"/" if name else b"") + os.fsencode(child), path.lstat())


class Unpacker:
    """Makes on the host what a guest sends. Rules: no name leads out, no link does, nothing but files, folders, links.

    What is there already is replaced, but a folder by a folder. Modes lose all but rwxr-xr-x; files belong to the
    caller. No more than `limit` bytes are written. Raises GuestError for what breaks the rules, TooLarge and HostError.
    """

    def __init__(self, host: Path, limit: int = TREE_LIMIT) -> None:
        self._host = host
        self._limit = self._left = limit
        self._root = -1
        self._file = -1
        self._mtime = 0

    def close(self) -> None:
        self.finish_file()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def entry(self, entry: Entry, name: bytes, target: bytes) -> None:
        """Make what the entry is about."""
        self.finish_file()
        self._count(FILE_COST)
        try:
            if name:
                self._make(entry, name, target)
            else:
                self._make_root(entry)
        except OSError as error:
            raise self._failed(name, error) from None
        self._mtime = entry.mtime if entry.mtime < 1 << 63 else entry.mtime - (1 << 64)

    def data(self, data: bytes) -> None:
        """More of the content of the file whose entry came last."""
        if self._file < 0:
            raise GuestError("the guest's agent sent the content of what is no file")
        self._count(len(data))
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise self._failed(b"", error) from None

    def finish_file(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError, OverflowError):  # a time that this file system has not
                os.utime(self._file, ns=(self._mtime, self._mtime))
            os.close(self._file)
            self._file = -1

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise TooLarge(f"what comes from the guest has more than {self._limit} bytes", "give a larger limit")

    def _make_root(self, entry: Entry) -> None:
        if self._root >= 0 or not (stat.S_ISDIR(entry.mode) or stat.S_ISREG(entry.mode)):
            raise GuestError("the guest's agent sent a tree without a root")
        if stat.S_ISDIR(entry.mode):
            self._host.mkdir(exist_ok=True)
            self._root = os.open(self._host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            self._file = os.open(self._host, TO_FILE, 0o600)
            if stat.S_ISREG(os.fstat(self._file).st_mode):
                os.fchmod(self._file, entry.mode & KEPT | 0o600)

    def _make(self, entry: Entry, name: bytes, target: bytes) -> None:
        parts = name.split(b"/")
        if self._root < 0 or any(part in (b"", b".", b"..") for part in parts):
            raise GuestError(f"the guest's agent sent the name {name!r}, which is refused")
        parent = os.dup(self._root)
        try:
            for part in parts[:-1]:
                inner = os.open(part, FOLDER, dir_fd=parent)
                os.close(parent)
                parent = inner
            self._make_in(parent, parts[-1], entry, name, target)
        finally:
            os.close(parent)

    def _make_in(self, parent: int, last: bytes, entry: Entry, name: bytes, target: bytes) -> None:
        if stat.S_ISDIR(entry.mode):
            with contextlib.suppress(FileExistsError):
                os.mkdir(last, 0o700, dir_fd=parent)
            made = os.open(last, FOLDER, dir_fd=parent)
            os.fchmod(made, entry.mode & KEPT | 0o700)
            os.close(made)
            return
        if stat.S_ISLNK(entry.mode):
            check_link(name, target)
        elif not stat.S_ISREG(entry.mode):
            raise GuestError(f"in the guest, {name!r} is neither file, folder nor link; it is not copied")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(last, dir_fd=parent)
        if stat.S_ISLNK(entry.mode):
            os.symlink(target, last, dir_fd=parent)
        else:
            self._file = os.open(last, NEW_FILE, 0o600, dir_fd=parent)
            os.fchmod(self._file, entry.mode & KEPT | 0o600)

    def _failed(self, name: bytes, error: OSError) -> HostError:
        path = self._host / os.fsdecode(name) if name else self._host
        return HostError(f'cannot write "{path}": {error.strerror}', "give a folder that can be written")


def check_link(name: bytes, target: bytes) -> None:
    """Raises GuestError for a link that leads out of the tree, or that has no target.

    `..` may stand at the front only: behind the name of another link, it would be from where that leads.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    up = next((at for at, part in enumerate(parts) if part != b".."), len(parts))
    if not target or target.startswith(b"/") or up > name.count(b"/") or b".." in parts[up:]:
        raise GuestError(f"in the guest, the link {name!r} leads out of what is copied, to {target!r}; it is refused")
