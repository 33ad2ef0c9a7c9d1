"""Files of the guest, read and changed through its agent; with the agent's rights, which are root's."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, GuestError, GuestFileError, GuestLost, TooLarge
from ..core.record import Record
from . import protocol, tree
from .link import Connect, Inbox, Link, fs_bytes, unexpected
from .protocol import ENTRY_COST, EVERYTHING, FILE_COST, LIMIT, MAX_DATA, TREE_LIMIT, UNCHANGED, FileRequest, How, Kind

if TYPE_CHECKING:
    from .changes import Change, Keeper

GuestPath = str | bytes | os.PathLike[str]  # a relative one starts at /
Owner = tuple[int, int]  # uid, gid


class Info(Record, frozen=True):
    """Attributes of a file: `mode` with its type, as in stat; `mtime` in seconds since 1970; `target` of a link."""

    name: str
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    mtime: float
    target: str

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


class Files:
    """Each method is one request; `timeout` is how many seconds the guest may be silent, None for ever.

    All raise GuestFileError for what fails in the guest (its `errno` says what), TimedOut and GuestLost.
    """

    def __init__(self, connect: Connect, timeout: float | None = None) -> None:
        self._connect = connect
        self.timeout = timeout

    def read(self, path: GuestPath, offset: int = 0, size: int | None = None, limit: int = LIMIT) -> bytes:
        """The content of a file from `offset` on, at most `size` bytes.

        Raises TooLarge when nothing was said about the size and there are more than `limit` bytes (64 MiB).
        """
        most = limit + 1 if size is None else size
        data = bytearray()
        with _Request(self, Kind.READ, path, offset=offset, size=most) as inbox:
            while (frame := inbox.next())[0] == Kind.DATA:
                data += frame[2]
                if len(data) > most:
                    raise GuestLost("the guest's agent sent more than was asked for")
            _check_end(frame[0])
        if size is None and len(data) > limit:
            raise _too_large(path, f"more than {limit} bytes")
        return bytes(data)

    def write(
        self,
        path: GuestPath,
        data: bytes,
        *,
        mode: int | None = None,
        owner: Owner | None = None,
        atomic: bool = False,
        append: bool = False,
        exclusive: bool = False,
        parents: bool = False,
    ) -> None:
        """Make `data` the content of a file, or with `append` the end of it.

        With `atomic`, others in the guest see the old content or the new one, also after a crash.
        """
        if atomic and append:
            raise ConfigError("a file is written either atomic or append")
        how = _how(ATOMIC=atomic, APPEND=append, EXCLUSIVE=exclusive, PARENTS=parents)
        view = memoryview(data).cast("B")
        with _Request(self, Kind.WRITE, path, how=how, mode=mode, owner=owner) as inbox:
            for at in range(0, len(view), MAX_DATA):
                inbox.send(protocol.frame(Kind.DATA, view[at : at + MAX_DATA]))
            inbox.send(protocol.frame(Kind.END), last=True)
            inbox.end()

    def list(self, path: GuestPath, limit: int = LIMIT) -> tuple[Info, ...]:
        """What is in a folder, by name; raises TooLarge when that takes more than `limit` bytes (64 MiB: some 100,000
        names)."""
        found: list[Info] = []
        cost = 0
        with _Request(self, Kind.LIST, path) as inbox:
            while (frame := inbox.next())[0] == Kind.ENTRY:
                cost += ENTRY_COST + len(frame[2])
                if cost > limit:
                    raise _too_large(path, f"more than {len(found)} entries")
                found.append(_info(frame[2]))
            _check_end(frame[0])
        return tuple(sorted(found, key=lambda info: info.name))

    def stat(self, path: GuestPath, follow: bool = True) -> Info:
        """Attributes of a file, without `follow` those of a link itself; the name is empty."""
        with _Request(self, Kind.STAT, path, how=_how(NOFOLLOW=not follow)) as inbox:
            kind, _, payload = inbox.next()
            if kind != Kind.ENTRY:
                raise unexpected(kind)
            inbox.end()
        return _info(payload)

    def exists(self, path: GuestPath) -> bool:
        """Whether there is such a file, link or folder."""
        try:
            self.stat(path, follow=False)
        except GuestFileError as error:
            if isinstance(OSError(error.errno, ""), FileNotFoundError | NotADirectoryError):
                return False
            raise
        return True

    def mkdir(
        self, path: GuestPath, *, mode: int | None = None, owner: Owner | None = None, parents: bool = False
    ) -> None:
        """Make a folder; with `parents` those above it too, and it may be there already."""
        self._do(Kind.MKDIR, path, how=_how(PARENTS=parents), mode=mode, owner=owner)

    def remove(self, path: GuestPath, recursive: bool = False) -> None:
        """Remove a file, a link or an empty folder; with `recursive` any folder."""
        self._do(Kind.REMOVE, path, how=_how(RECURSIVE=recursive))

    def rename(self, old: GuestPath, new: GuestPath, replace: bool = True) -> None:
        """Give a file another name, on the same file system."""
        self._do(Kind.RENAME, old, new, how=_how(EXCLUSIVE=not replace))

    def put(self, host: str | Path, guest: GuestPath, owner: Owner | None = None, parents: bool = False) -> None:
        """Copy a file or folder of the host to `guest`, with modes, times and links; folders are merged.

        Raises also NotFoundError, ConfigError and HostError, for the files of the host.
        """
        how = _how(PARENTS=parents)
        frames = tree.pack(Path(host))
        first = next(frames)  # complains about the host's file before anything is asked of the guest
        with _Request(self, Kind.UNPACK, guest, how=how, owner=owner) as inbox:
            inbox.send(first)
            for frame in frames:
                inbox.send(frame, last=frame[4] == Kind.END)
            inbox.end()

    def get(self, guest: GuestPath, host: str | Path, limit: int = TREE_LIMIT) -> None:
        """Copy a file or folder of the guest to `host`, with times and links, and modes as far as they do no harm.

        Raises also GuestError, for links that lead out and for devices, HostError, and TooLarge when more than `limit`
        bytes (16 GiB) would be written, with 4 KiB for each file; then what was there before that stays.
        """
        unpacker = tree.Unpacker(Path(host), limit)
        try:
            with _Request(self, Kind.PACK, guest) as inbox:
                while (frame := inbox.next())[0] != Kind.END:
                    if frame[0] == Kind.ENTRY:
                        unpacker.entry(*protocol.parse_entry(frame[2]))
                    elif frame[0] == Kind.DATA:
                        unpacker.data(frame[2])
                    else:
                        raise unexpected(frame[0])
        finally:
            unpacker.close()

    def changes(
        self,
        ours: Collection[str] = (),
        mounts: Collection[str] = (),
        keep: Keeper | None = None,
        limit: int = LIMIT,
        keep_limit: int = TREE_LIMIT,
    ) -> tuple[Change, ...]:
        """What differs in the root from what it was when the guest started; with `keep`, it gets all that.

        `ours` and `mounts` are those of guest/changes.py. Raises also ConfigError where the root is no overlay, and
        TooLarge when what is returned takes more than `limit` bytes (64 MiB: some 100,000 changes), or what is kept
        more than `keep_limit` (16 GiB, with 4 KiB for each file).
        """
        from . import changes

        found: list[Change] = []
        cost = kept = 0
        filtered = changes.Changes(ours, mounts)
        how = _how(CONTENT=keep is not None)
        try:
            with _Request(self, Kind.CHANGES, changes.UPPER, changes.LOWER, how=how) as inbox:
                while (frame := inbox.next())[0] != Kind.END:
                    kept += FILE_COST if frame[0] == Kind.ENTRY else len(frame[2])
                    if cost > limit or (keep is not None and kept > keep_limit):
                        raise _too_large("/", f"more than {len(found)} changes, or too much in them")
                    if frame[0] == Kind.ENTRY:
                        cost += ENTRY_COST + len(frame[2])
                        entry, name, target = protocol.parse_entry(frame[2])
                        if keep is not None:
                            keep.skip()
                        for code, path, attributes in filtered.take(entry, name):
                            found.append(changes.told(code, path))
                            if keep is not None:
                                keep.change(code, path, attributes, target if path == name else b"")
                    elif frame[0] == Kind.DATA and keep is not None:
                        keep.data(frame[2])
                    else:
                        raise unexpected(frame[0])
        except GuestFileError as error:
            if error.errno != errno.ENOENT:
                raise
            raise ConfigError("this root has no record of what was changed", 'use another than "none"') from None
        return tuple(sorted(found, key=lambda change: change.path))

    def _do(
        self,
        kind: Kind,
        *paths: GuestPath,
        how: How,
        mode: int | None = None,
        owner: Owner | None = None,
    ) -> None:
        with _Request(self, kind, *paths, how=how, mode=mode, owner=owner) as inbox:
            inbox.end()


class _Request:
    """One file request: a connection for as long as it takes."""

    def __init__(
        self,
        files: Files,
        kind: Kind,
        *paths: GuestPath,
        how: How = How(0),  # noqa: B008 (a flag)
        mode: int | None = None,
        owner: Owner | None = None,
        offset: int = 0,
        size: int = EVERYTHING,
    ) -> None:
        uid, gid = owner or (UNCHANGED, UNCHANGED)
        head = FileRequest(how, UNCHANGED if mode is None else mode & 0o7777, uid, gid, offset, size)
        words = [fs_bytes(path) for path in paths]
        request = protocol.frame(kind, bytes(head) + protocol.strings(*words))
        self._link = Link(files._connect, request, files.timeout)
        self._inbox = Inbox(self._link, f"{kind.name.lower()} {os.fsdecode(words[0])}", files.timeout)

    def __enter__(self) -> Inbox:
        return self._inbox

    def __exit__(self, *exception: object) -> None:
        self._link.close()


def _how(**flags: bool) -> How:
    how = How(0)
    for name, wanted in flags.items():
        if wanted:
            how |= How[name]
    return how


def _info(payload: bytes) -> Info:
    try:
        entry, name, target = protocol.parse_entry(payload)
    except GuestError as error:
        raise GuestLost(str(error)) from None
    mtime = entry.mtime if entry.mtime < 1 << 63 else entry.mtime - (1 << 64)
    return Info(
        os.fsdecode(name), entry.mode, entry.uid, entry.gid, entry.links, entry.size, mtime / 10**9, os.fsdecode(target)
    )


def _too_large(path: GuestPath, what: str) -> TooLarge:
    return TooLarge(f'"{os.fsdecode(path)}" in the guest has {what}', "give a larger limit, or ask for parts")


def _check_end(kind: Kind) -> None:
    if kind != Kind.END:
        raise unexpected(kind)
