"""Locks that keep two programs from using one file at the same time.

They are open file description locks (fcntl(2), F_OFD_SETLK): two descriptors in one process exclude each other too,
and the kernel drops a lock when the last copy of its descriptor is closed, however the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..core.errors import HostError
from ..core.log import log
from ..core.text import escaped

FLOCK = struct.Struct("@hhqqi0q")  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def lock(fd: int, name: str, *, exclusive: bool) -> None:
    """Lock the whole file behind `fd`, which is open for writing if `exclusive`.

    Raises HostError, with `name` and the process in the way, when somebody holds a lock that conflicts. A file system
    without locks is used without.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning("file is used without a lock", name=name, why=error.strerror)
            return
        raise _in_use(fd, name) from None


def is_locked(fd: int) -> bool:
    """Whether somebody else holds an exclusive lock on the file behind `fd`, in this process or in another one."""
    asked = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind: int = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    except OSError:  # a file system without locks
        return False
    return kind != fcntl.F_UNLCK


def _in_use(fd: int, name: str) -> HostError:
    holders = sorted(_holders(fd))
    if os.getpid() in holders:
        return HostError(f"{name} is in use by this process already", "give it once, or only for reading")
    who = f"process {holders[0]}{_name(holders[0])}" if holders else "another process"
    return HostError(f"{name} is in use by {who}", "end that first, or use a copy")


def _name(process: int) -> str:
    with suppress(OSError):  # gone meanwhile
        return f" ({escaped(Path(f'/proc/{process}/comm').read_text(errors='replace').strip())})"
    return ""


def _holders(fd: int) -> Iterator[int]:
    """Processes with a descriptor that has a lock on the file: /proc/locks knows no owner of this kind of lock.

    Those of other users stay hidden from all but root.
    """
    wanted = os.fstat(fd)
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with suppress(OSError):  # gone meanwhile, or somebody else's
            for number in os.listdir(process / "fd"):
                with suppress(OSError):
                    same = os.path.samestat((process / "fd" / number).stat(), wanted)
                    if same and "\nlock:" in (process / "fdinfo" / number).read_text():
                        yield int(process.name)
