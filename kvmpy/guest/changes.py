"""What a guest has changed of its root: to be told, and to be kept on the host as a layer of it.

A kept layer is a folder with what is new or has changed; an empty file `.wh.NAME` says that NAME is there no more, as
in the layers of container images (OCI image-spec 1.1, layer.md).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ..core.errors import ConfigError, GuestError, HostError
from ..core.record import Record
from . import tree
from .protocol import Change as Code
from .protocol import Entry

UPPER, LOWER = "/proc/1/fd/100", "/proc/1/fd/101"  # guests/init.c
OWN = ("dev", "proc", "sys")  # folders that init makes for what it mounts
WHITEOUT = b".wh."
LETTERS = {Code.ADDED: "A", Code.CHANGED: "C", Code.ENTERED: "C", Code.DELETED: "D"}


class Change(Record, frozen=True):
    """`kind` is A (added), C (changed) or D (deleted); `path` begins with a slash."""

    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


class Changes:
    """Takes entries in the order in which they come; leaves out what is not the guest's commands' doing.

    ours      paths of files that the machine itself writes: no changes
    mounts    paths of volumes, for which init has made folders
    """

    def __init__(self, ours: Collection[str], mounts: Collection[str]) -> None:
        self._ours = {os.fsencode(path.strip("/")) for path in ours}
        self._mounts = {os.fsencode(path.strip("/")) for path in mounts}
        self._mounts |= {path[:at] for path in self._mounts for at, char in enumerate(path) if char == ord("/")}
        self._mounts |= {name.encode() for name in OWN}
        self._pending: list[tuple[Code, bytes, Entry]] = []  # folders that are told only with something in them

    def take(self, entry: Entry, name: bytes) -> Iterator[tuple[Code, bytes, Entry]]:
        """The changes that this entry brings to light, folders first; raises GuestError."""
        try:
            code = Code(entry.links)
        except ValueError:
            raise GuestError(f"the guest's agent sent a change of the kind {entry.links}") from None
        while self._pending and not name.startswith(self._pending[-1][1] + b"/"):
            self._pending.pop()
        if name in self._ours:
            return
        if stat.S_ISDIR(entry.mode) and (code is Code.ENTERED or (code is Code.ADDED and name in self._mounts)):
            self._pending.append((code, name, entry))
            return
        yield from self._pending
        self._pending.clear()
        yield code, name, entry


def told(code: Code, name: bytes) -> Change:
    return Change(LETTERS[code], "/" + os.fsdecode(name))


class Keeper:
    """Makes changes below a folder of the host, which is new or empty, with at most `limit` bytes of content.

    Raises ConfigError, GuestError and HostError.
    """

    def __init__(self, host: Path, limit: int) -> None:
        check_empty(host)
        self._left = limit
        self._unpacker = tree.Unpacker(host)
        self._unpacker.entry(Entry(stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0), b"", b"")
        self._takes_data = False
        self.left_out: list[str] = []  # what a folder of the host cannot have, or must not

    def close(self) -> None:
        self._unpacker.close()

    def change(self, code: Code, name: bytes, entry: Entry, target: bytes) -> None:
        self._takes_data = False
        if code is Code.DELETED:
            parent, slash, last = name.rpartition(b"/")
            self._unpacker.entry(Entry(stat.S_IFREG | 0o644, 0, 0, 1, 0, 0), parent + slash + WHITEOUT + last, b"")
            return
        if stat.S_ISLNK(entry.mode):
            if target.startswith(b"/"):  # the guest's root is this folder
                target = b"../" * name.count(b"/") + (target.strip(b"/") or b".")
            try:
                tree.check_link(name, target)
            except GuestError:
                self.left_out.append(f"the link /{os.fsdecode(name)} leads out of it, to {os.fsdecode(target)}")
                return
        elif not (stat.S_ISREG(entry.mode) or stat.S_ISDIR(entry.mode)):
            self.left_out.append(f"/{os.fsdecode(name)} is neither file, folder nor link")
            return
        self._unpacker.entry(entry, name, target)
        self._takes_data = stat.S_ISREG(entry.mode)

    def skip(self) -> None:
        """The content that comes next is of nothing that is kept."""
        self._takes_data = False

    def data(self, data: bytes) -> None:
        if not self._takes_data:
            return
        self._left -= len(data)
        if self._left < 0:  # holes: what was written is in the guest's memory
            remedy = "let the command make no large sparse files, or give it a volume"
            raise ConfigError("the command has written more than can be kept", remedy)
        self._unpacker.data(data)


def check_empty(host: Path) -> None:
    """Raises ConfigError unless `host` is an empty folder, or can be made."""
    try:
        if not host.exists():
            if not host.parent.is_dir():
                raise ConfigError(f"there is no folder {host.parent} to make {host.name} in", "make it first")
        elif not host.is_dir() or any(host.iterdir()):
            raise ConfigError(f"{host} is not an empty folder", "give one that is new or empty")
    except OSError as error:
        raise HostError(f"cannot look into {host}: {error.strerror}", "give another folder") from None
