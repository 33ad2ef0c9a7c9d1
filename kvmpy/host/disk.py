"""Disk images on the host: what a disk device wants of one, and raw files and block devices.

The format of an image is what the user says it is, never what its content looks like: a guest writes that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..core.buffers import ZEROES, behind
from ..core.errors import ConfigError, HostError, ImageError, NotFoundError, exhausted
from ..core.log import log
from . import syscalls
from .filelock import lock

SECTOR = 512
IOV_MAX = 1024  # buffers that one preadv or pwritev takes (<linux/uio.h> UIO_MAXIOV)
FORMATS = ("raw", "qcow2")
QCOW2_MAGIC = b"QFI\xfb"
CACHES = ("writeback", "unsafe", "direct")

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # FALLOC_FL_* of <linux/falloc.h>
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}  # by a file system or device


class Image(Protocol):
    """The content of a disk. Offsets and lengths are bytes, multiples of SECTOR and inside `size`.

    Whatever the host cannot do is an OSError. Buffers are transferred whole, without a copy where that can be.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def fd(self) -> int:
        """A file whose bytes are those of the disk, for those who need no `readv` and `writev` then; -1: none is."""

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


def open_image(path: Path, *, read_only: bool, cache: str, snapshot: bool, format: str, backing: bool) -> Image:
    """The image at `path`, for this use of it only.

    With `snapshot` the file is only read, and writes are forgotten at the end; `backing` allows a qcow2 image to name
    another file. Raises ConfigError, NotFoundError, ImageError or HostError, each with the file and a remedy.
    """
    if cache not in CACHES:
        raise ConfigError(f'invalid cache "{cache}"', f"use {', '.join(CACHES)}")
    if format not in FORMATS:
        raise ConfigError(f'invalid disk format "{format}"', f"use {' or '.join(FORMATS)}")
    if cache == "unsafe" and not (read_only or snapshot):
        log.info(f"disk image {path} has cache=unsafe: the guest's flushes are ignored")
    if format == "qcow2":
        image = _open_qcow2(path, read_only or snapshot, cache, backing)
    elif backing:
        raise ConfigError(f"disk image {path} is raw: it has no backing file", "add format=qcow2, or leave out backing")
    else:
        image = open_raw(path, read_only=read_only or snapshot, cache=cache)
        _warn_of_qcow2(image, path)
    if not snapshot or read_only:
        return image
    from .overlay import Overlay

    try:
        return Overlay(image)
    except BaseException:
        image.close()
        raise


def _open_qcow2(path: Path, read_only: bool, cache: str, backing: bool) -> Image:
    from .qcow2 import Qcow2  # only for those who use it

    if cache == "direct":
        raise ConfigError(f"disk image {path}: cache=direct is for raw images", "use cache=writeback")
    return Qcow2(path, read_only=read_only, backing=backing, unsafe=cache == "unsafe")


def _warn_of_qcow2(image: Raw, path: Path) -> None:
    """No more than that: the guest can write these bytes to any raw image."""
    head = bytearray(len(QCOW2_MAGIC))
    with suppress(OSError):
        image.readv(0, [memoryview(head)])
    if head == QCOW2_MAGIC:
        log.warning(f"disk image {path} begins like a qcow2 image, and is used as raw; add format=qcow2 if it is one")


def open_raw(path: Path, *, read_only: bool = False, cache: str = "writeback") -> Raw:
    """A raw file or block device. Raises as open_image does."""
    image = Raw(open_file(path, read_only), read_only=read_only, cache=cache)
    try:
        size = image.measure()
        if not size:
            remedy = (
                "attach something to it" if path.is_block_device() else f"give it a size, e.g. truncate -s 1G {path}"
            )
            raise ImageError(f"disk image {path} is empty", remedy)
        if size % SECTOR:
            remedy = f"round it up with truncate -s %{SECTOR} {path}, or give its format"
            raise ImageError(f"disk image {path} has {size} bytes, which is no multiple of {SECTOR}", remedy)
        if cache == "direct":
            image.use_direct(path)
    except BaseException:
        image.close()
        raise
    return image


def open_file(path: Path, read_only: bool) -> int:
    """A descriptor of the file or block device at `path`, locked: shared for reading, else exclusively."""
    name = f"disk image {path}"
    fd = _open(path, name, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        lock(fd, name, exclusive=not read_only)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Raw:
    """An image whose bytes are those of the file; takes over the descriptor `fd`."""

    def __init__(self, fd: int, *, read_only: bool = False, cache: str = "writeback") -> None:
        self.read_only = read_only
        self._fd = fd
        self._direct = -1  # the same file with O_DIRECT
        self._sync = cache != "unsafe"
        self._sync_failed = 0  # the errno of the first fdatasync that failed
        self.measure()

    def measure(self) -> int:
        """Set `size` to that of the file or device as it is now, in whole sectors; returns its bytes."""
        length = os.lseek(self._fd, 0, os.SEEK_END)
        self.size = length // SECTOR * SECTOR
        return length

    def use_direct(self, path: Path) -> None:
        """Go round the page cache from now on; raises HostError where the file system cannot.

        What the host then refuses for its alignment, as O_DIRECT allows it to do, takes the way through the page cache
        all the same: the kernel keeps both ways consistent.
        """
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_DIRECT
        try:
            self._direct = os.open(f"/proc/self/fd/{self._fd}", flags)
        except OSError as error:
            what = f"disk image {path}: its file system refuses cache=direct ({error.strerror})"
            raise HostError(what, "use cache=writeback, or another file system") from None

    @property
    def fd(self) -> int:
        return self._fd if self._direct < 0 else self._direct

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
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    def at_end(self, buffers: Sequence[memoryview]) -> None:
        """What becomes of `buffers` that the file has nothing for."""
        raise OSError(errno.EIO, "the file has become shorter")

    def _transfer(self, call: Callable[[int, Any, int], int], offset: int, buffers: Sequence[memoryview]) -> None:
        fd = self.fd
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
                self.at_end(rest)
                return
            offset += done
            rest = behind(rest, done)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(), False where it is not supported."""
        try:
            syscalls.fallocate(self._fd, mode | KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        return True


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
        remedy = "check the path" + (f", or make an image with truncate -s 1G {path}" if path.parent.is_dir() else "")
        raise NotFoundError(f"{name}: no such file", remedy) from None
    except ValueError:  # a NUL in the path
        raise ConfigError(f"disk image {str(path)!r} is no path", "check the path") from None
    except OSError as error:
        writing = bool(writing) and os.access(path, os.R_OK)
        raise exhausted(error) or HostError(f"{name}: {error.strerror}", _remedy(error, writing)) from None


def _remedy(error: OSError, writing: bool) -> str:
    if error.errno == errno.EBUSY:
        return "unmount it first: two users of one disk destroy it"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
        return "get the right to write to it, or add ro or snapshot" if writing else "get the right to read it"
    return "give a file that can be opened"
