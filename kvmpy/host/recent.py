"""A file that keeps what was written to it last, and a reader that can follow it: logs which cannot fill a disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ..core.errors import HostError

KEEP = 8 << 20  # bytes that are kept at least, once they were written
CHUNK = 1 << 16
FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


class Recent:
    """The file at `path`, which is made or emptied; any thread may write.

    Beyond `keep` bytes a new one is begun, and the last one is at `path`.old instead of the one before it: no more than
    twice `keep` is there at any time. What is written in one call stays together. Raises HostError.
    """

    def __init__(self, path: Path, keep: int = KEEP) -> None:
        self._path, self._keep = path, keep
        self._lock = threading.Lock()
        self._size = 0
        try:
            self._fd = os.open(path, FLAGS, 0o600)
        except OSError as error:
            raise HostError(f'cannot write "{path}": {error.strerror}', "make room for it") from None

    def write(self, data: bytes) -> bool:
        """Append `data`; False when the host has no room for all of it: then nothing of it is there."""
        with self._lock:
            if self._fd < 0:
                return False
            if self._size and self._size + len(data) > self._keep:
                self._begin()
            try:
                whole = os.write(self._fd, data) == len(data)
            except OSError:
                whole = False
            if whole:
                self._size += len(data)
            else:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._size)
            return whole

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _begin(self) -> None:
        """A new file. Without room for one, the last is emptied."""
        try:
            self._path.replace(old(self._path))
            fd = os.open(self._path, FLAGS, 0o600)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
        else:
            os.close(self._fd)
            self._fd = fd
        self._size = 0


def old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def read(path: Path, wait: Callable[[], bool] | None = None) -> Iterator[bytes]:
    """What is there, in order, then what comes; nothing for a file that is not there.

    `wait` is called where there is no more: it takes its time, and says whether to look again. A reader that is slower
    than the writer misses what the writer has thrown away meanwhile, whole writes of it.
    """
    now = _open(path)
    before = _open(old(path))
    try:
        if now < 0:
            return
        if before >= 0 and not os.path.sameopenfile(now, before):  # else it was begun anew just now
            yield from _rest(before)
        goes_on = wait is not None
        while True:
            yield from _rest(now)
            replaced = _replaced(path, now)
            if replaced >= 0:
                yield from _rest(now)  # up to its very end
                os.close(now)
                now = replaced
            elif not goes_on:
                return
            else:
                goes_on = wait is not None and wait()
    finally:
        for fd in (now, before):
            if fd >= 0:
                os.close(fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1


def _rest(fd: int) -> Iterator[bytes]:
    while data := os.read(fd, CHUNK):
        yield data


def _replaced(path: Path, fd: int) -> int:
    """The file that is at `path` now, if that is another one; else -1."""
    fresh = _open(path)
    if fresh >= 0 and os.path.sameopenfile(fresh, fd):
        os.close(fresh)
        return -1
    return fresh
