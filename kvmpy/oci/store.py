"""Images made into disks, kept in the user's cache folder by the digest of their configuration.

An entry is a folder with the disk and what says how to run it. It is made under another name, with a lock that ends
with the process, and gets its own when all is there: what a process that was killed has left is never taken for whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..boot import cache
from ..core import progress
from ..core.errors import HostError, ImageError
from ..core.record import Record
from .ext4 import Ext4
from .layer import Budget, Layer, apply
from .manifest import Config
from .tree import Tree

KEEP = 16  # disks; the ones used longest ago go first
MAX_FILES = 1_000_000  # of one image
VERSION = 1  # of what is in an entry
DISK, CONFIG, FILES, PART, TRASH = "root.ext4", "config.json", "files", ".part", "trash-"


class Entry(Record, frozen=True):
    """A disk in the cache, and how its image wants to be run."""

    disk: Path
    config: Config


def folder() -> Path:
    """Where the disks are."""
    try:
        return cache.folder().with_name("roots")
    except RuntimeError:
        raise HostError("there is no home directory to keep images in", "set XDG_CACHE_HOME to a folder") from None


def find(config_id: str) -> Entry | None:
    """The whole entry for an image, which counts as used now."""
    place = _place(config_id)
    try:
        data = json.loads((place / CONFIG).read_text())
        os.utime(place)
        env = tuple((key, value) for key, value in data.pop("env"))
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        return Entry(place / DISK, Config(**data | lists | {"env": env})) if (place / DISK).is_file() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def make(config: Config, layers: Callable[[Path], Sequence[Layer]], limit: int) -> Entry:
    """The entry for an image, made now if it is not there; `limit` bounds what its layers may hold, in bytes.

    `layers` is given a folder that it may put files into. Raises ImageError for what the layers are, HostError for what
    the host cannot do. Nothing is left behind then.
    """
    with preparing(config.id) as part:
        if (found := find(config.id)) is not None:
            return found
        with _told(part):
            where = part / FILES
            where.mkdir()
            given = layers(where)
        with progress.working("unpacking the image") as work:
            work.total = sum(layer.size for layer in given)
            _build(part, config, given, limit, work)
        shutil.rmtree(where, ignore_errors=True)
        place = _place(config.id)
        with _told(place):
            if place.exists():  # of another version, or damaged
                _discard(place)
            part.rename(place)
        _prune()
    entry = find(config.id)
    if entry is None:
        raise HostError(f"{place} has gone while it was made", "try again")
    return entry


@contextmanager
def preparing(config_id: str) -> Iterator[Path]:
    """An empty folder for what is to become the entry, which nobody else has; removed if it is left at the end."""
    place = _place(config_id)
    part = place.with_name(place.name + PART)
    with _told(part):
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(place.with_name(place.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _told(part), progress.working("waiting for another kvmpy that makes this image"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        with _told(part):
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir(mode=0o700)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)


def _build(part: Path, config: Config, layers: Sequence[Layer], limit: int, work: progress.Work) -> None:
    tree, budget = Tree(MAX_FILES), Budget(limit)
    with _told(part), (part / DISK).open("xb", buffering=0) as file:
        disk = Ext4(file.fileno(), limit)
        for layer in layers:
            apply(layer, tree, disk, budget, work.add)
        try:
            if config.cwd:
                tree.make_folder(os.fsencode(config.cwd))
            disk.finish(tree, config.id.encode())
        except ImageError as error:
            raise ImageError(f"the image {config.id}: {error.what}", error.remedy) from None
        os.fsync(file.fileno())
        values = {**vars(config)}
        (part / CONFIG).write_text(json.dumps(values))


def _discard(entry: Path) -> None:
    """Remove an entry at once; what takes time has another name, which says that it may go."""
    trash = entry.with_name(f"{TRASH}{os.getpid()}-{entry.stem}")
    entry.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _place(config_id: str) -> Path:
    return folder() / f"{config_id.partition(':')[2]}.{VERSION}"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise HostError(f"cannot write {where}: {error.strerror}", "make room there, or set XDG_CACHE_HOME") from None


def _prune() -> None:
    """Remove the entries used longest ago, and what killed processes have left. A machine keeps its open disk."""
    used = {}
    for entry in folder().glob(f"*.{VERSION}"):
        with suppress(OSError):  # somebody else has removed it
            used[entry] = entry.stat().st_mtime
    for entry in sorted(used, key=used.__getitem__, reverse=True)[KEEP:]:
        with suppress(OSError):
            _discard(entry)
    for trash in folder().glob(f"{TRASH}*"):
        shutil.rmtree(trash, ignore_errors=True)
    for part in folder().glob(f"*{PART}"):
        with suppress(OSError), open(part.with_name(part.name.removesuffix(PART) + ".lock"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while somebody makes it
            shutil.rmtree(part)
