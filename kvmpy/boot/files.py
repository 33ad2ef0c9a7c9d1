"""Opens a file the user named, or says why that cannot be."""

from __future__ import annotations

import io
import mmap
import os
import stat
from contextlib import suppress

from ..core.errors import ConfigError, HostError, ImageError, NotFoundError, exhausted
from ..x86.layout import MIB

CHUNK = MIB


def read(path: str | os.PathLike[str], what: str, limit: int, remedy: str = "give a smaller one") -> memoryview:
    """The content of the regular file or pipe at `path`, at most `limit` bytes.

    `what` is the file's role in messages, `remedy` what to do when it is too large. A regular file is mapped, not
    read: of a vmlinux with debug information, a tenth is ever looked at. Where somebody truncates it meanwhile, SIGBUS
    ends the process; the command line has that explained (kvm.handle.explain_bus_errors).
    Raises NotFoundError, HostError, ConfigError for what is no path, and ImageError when too large.
    """
    name = f"{what} {os.fspath(path)}"
    try:
        with _open(path, what) as file:
            return _content(file, name, limit, remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{name}: no such file", f"check the path given for the {what}") from None
    except IsADirectoryError:
        raise HostError(f"{name} is a directory", "give a file") from None
    except PermissionError:
        raise HostError(f"{name}: permission denied", "make it readable (sudo chmod +r), or give a copy") from None
    except OSError as error:
        raise exhausted(error) or HostError(f"{name}: {error.strerror}", "give a readable file") from None


def _open(path: str | os.PathLike[str], what: str) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except ValueError:  # a NUL in the path
        raise ConfigError(f"{what} {os.fspath(path)!r} is no path", f"check the path given for the {what}") from None


def _content(file: io.FileIO, name: str, limit: int, remedy: str) -> memoryview:
    info = os.fstat(file.fileno())
    regular = stat.S_ISREG(info.st_mode)
    if not regular and not stat.S_ISFIFO(info.st_mode):
        raise HostError(f"{name} is a device", "give a file")
    too_large = ImageError(f"{name} has more than the {limit / MIB:.0f} MiB that can be used", remedy)
    if info.st_size > limit:
        raise too_large
    if regular and info.st_size:
        with suppress(OSError):  # some file systems cannot map
            return memoryview(mmap.mmap(file.fileno(), info.st_size, mmap.MAP_PRIVATE, mmap.PROT_READ))
    content = bytearray()
    while chunk := file.read(CHUNK):
        content += chunk
        if len(content) > limit:
            raise too_large
    return memoryview(bytes(content))
