"""Disk images on the host: what a disk device wants of one, and raw files and block devices.

The format of an image is what the user says it is, never what its content looks like: a guest writes that.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import ConfigError, HostError, ImageError, NotFoundError
from .filelock import lock

SECTOR = 512
IOV_MAX = 1024  # buffers that one preadv or pwritev takes (<linux/uio.h> UIO_MAXIOV)
FORMATS = ("raw", "qcow2")
CACHES = ("writeback", "unsafe", "direct")

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # FALLOC_FL_* of <linux/falloc.h>
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}  # by a file system or device
ZEROES = memoryview(bytes(1 << 16))


class Image(Protocol):
    """The content of a disk. Offsets and lengths are bytes, multiples of SECTOR and inside `size`.

    Whatever the host cannot do is an OSError. Buffers are transferred whole, without a copy where that can be.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None: ...

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None: ...

    def flush(self) -> None:
        """On return, all that was written is on the disk of the host. After one failure it always fails."""

    def discard(self, offset: int, length: int) -> None:
        """The content of this range is not needed any more."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Fill with zeros; `unmap` allows to give the space back to the host."""

    def close(self) -> None:
        """Safe to call twice."""


def open_image(path: Path, *, read_only: bool, cache: str, snapshot: bool, format: str) -> Image:
    """The image at `path`, locked for this use of it.

    With `snapshot` the file is only read, and writes are forgotten at the end. Raises ConfigError, NotFoundError,
    ImageError or HostError, each of which names the file and a remedy.
    """
    if cache not in CACHES:
        raise ConfigError(f'invalid cache "{cache}"', f"use {', '.join(CACHES)}")
    if format not in FORMATS:
        raise ConfigError(f'invalid disk format "{format}"', f"use {' or '.join(FORMATS)}")
    opener: Callable[..., Image] = open_raw
    if format == "qcow2":
        from importlib import import_module  # only for those who use it

        opener = import_module(".qcow2", __package__).Qcow2
    image = opener(path, read_only=read_only or snapshot, cache=cache)
    if not snapshot or read_only:
        return image
    from .overlay import Overlay

    try:
        return Overlay(image)
    except BaseException:
        image.close()
        raise


def open_raw(path: Path, *, read_only: bool = False, cache: str = "writeback") -> Raw:
    """A raw file or block device, locked: shared for reading, else exclusively. Raises as open_image does."""
    name = f"disk image {path}"
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    fd = _open(path, name, flags)
    image = Raw(fd, read_only=read_only, cache=cache)
    try:
        lock(fd, name, exclusive=not read_only)
        image.measure()
        size = os.lseek(fd, 0, os.SEEK_END)
        if not size:
            raise ImageError(f"{name} is empty", f"give it a size, e.g. truncate -s 1G {path}")
        if size % SECTOR:
            remedy = f"round it up with truncate -s %{SECTOR} {path}, or give its format"
            raise ImageError(f"{name} has {size} bytes, which is no multiple of {SECTOR}", remedy)
        if cache == "direct":
            image.direct = _open_direct(fd, name, flags)
    except BaseException:
        image.close()
        raise
    return image


class Raw:
    """An image whose bytes are those of the file; takes over the descriptor `fd`.

    `direct` is a second descriptor of the file with O_DIRECT, or -1. Whatever the host refuses to do with that one, for
    its alignment, goes through the page cache, which the kernel keeps consistent with direct accesses.
    """

    def __init__(self, fd: int, *, read_only: bool = False, cache: str = "writeback") -> None:
        self.read_only = read_only
        self.direct = -1
        self.size = 0
        self._fd = fd
        self._sync = cache != "unsafe"
        self._sync_failed = 0  # the errno of the first fdatasync that failed
        self.measure()

    def measure(self) -> None:
        """Set `size` to that of the file or device as it is now, in whole sectors."""
        self.size = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR * SECTOR

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._transfer(os.preadv, offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._transfer(os.pwritev, offset, buffers)

    def flush(self) -> None:
        """After a failed fdatasync the kernel may have dropped what it could not write: no later one can succeed."""
        if not self._sync:
            return
        if self._sync_failed:
            raise OSError(self._sync_failed, os.strerror(self._sync_failed))
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._sync_failed = error.errno or errno.EIO
            raise

    def discard(self, offset: int, length: int) -> None:
        """A hint: where the file system cannot make holes, nothing happens."""
        self._allocate(PUNCH_HOLE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if not self._allocate(PUNCH_HOLE if unmap else ZERO_RANGE, offset, length):
            self.writev(offset, [ZEROES] * (length // len(ZEROES)) + [ZEROES[: length % len(ZEROES)]])

    def close(self) -> None:
        for fd in (self._fd, self.direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self.direct = -1

    def _transfer(self, call: Callable[[int, Any, int], int], offset: int, buffers: Sequence[memoryview]) -> None:
        fd = self._fd if self.direct < 0 else self.direct
        rest = [buffer for buffer in buffers if len(buffer)]
        while rest:
            try:
                done = call(fd, rest[:IOV_MAX], offset)
            except OSError as error:
                if error.errno != errno.EINVAL or fd == self._fd:
                    raise
                fd = self._fd
                continue
            if not done:
                raise OSError(errno.EIO, "the file has become shorter")
            offset += done
            rest = _behind(rest, done)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(), False where it is not supported."""
        result = _fallocate()(self._fd, mode | KEEP_SIZE, offset, length)
        if result in UNSUPPORTED:
            return False
        if result:
            raise OSError(result, os.strerror(result))
        return True


def _behind(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `buffers` behind the first `done` bytes."""
    for number, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[number + 1 :]]
        done -= len(buffer)
    return []


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    """fallocate(2) with its errno as result, 0 if it worked: os has only posix_fallocate, which makes no holes."""
    import ctypes  # slow to import, and needed only by guests that discard

    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        while call(fd, mode, offset, length):
            if ctypes.get_errno() != errno.EINTR:
                return ctypes.get_errno()
        return 0

    return fallocate


def _open(path: Path, name: str, flags: int) -> int:
    writing = flags & os.O_RDWR
    try:
        mode = path.stat().st_mode
        if stat.S_ISBLK(mode):
            flags |= os.O_EXCL if writing else 0  # refused while it is mounted
        elif stat.S_ISDIR(mode):
            raise HostError(f"{name} is a directory", "give a file or a block device")
        elif not stat.S_ISREG(mode):
            raise HostError(f"{name} is neither a file nor a block device", "give one of these")
        return os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        remedy = f"check the path, or make an image with truncate -s 1G {path}"
        raise NotFoundError(f"{name}: no such file", remedy) from None
    except ValueError:  # a NUL in the path
        raise ConfigError(f"disk image {str(path)!r} is no path", "check the path") from None
    except OSError as error:
        raise HostError(f"{name}: {error.strerror}", _remedy(error, bool(writing))) from None


def _remedy(error: OSError, writing: bool) -> str:
    if error.errno == errno.EBUSY:
        return "unmount it first: two users of one disk destroy it"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
        return "get the right to write to it, or add ro or snapshot" if writing else "get the right to read it"
    return "give a file that can be opened"


def _open_direct(fd: int, name: str, flags: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_DIRECT)
    except OSError as error:
        remedy = "use cache=writeback, or put it on another file system"
        raise HostError(f"{name}: its file system refuses cache=direct ({error.strerror})", remedy) from None
