"""Network captures in the classic pcap format, readable while they grow (draft-ietf-opsawg-pcap)."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..core.errors import HostError
from .frames import MAX_FRAME, Frame

MAGIC = 0xA1B2C3D4  # times in microseconds
VERSION = (2, 4)
SNAPLEN = 1 << 18  # the most bytes of a packet, as tcpdump has it; a frame is shorter
LINKTYPE_ETHERNET = 1
FILE = struct.Struct("<IHHiIII")  # magic, version, time zone, accuracy, snaplen, link type
PACKET = struct.Struct("<IIII")  # seconds, microseconds, bytes that are here, bytes that there were

assert MAX_FRAME <= SNAPLEN


class Pcap:
    """A capture in a file that is made or emptied; `clock` gives nanoseconds since 1970."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """Raises HostError when the file cannot be written."""
        self._path = path
        self._clock = clock
        self._fd = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # it may be a pipe
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise self._failed(error) from None
        self._size = 0
        self._write([FILE.pack(MAGIC, *VERSION, 0, 0, SNAPLEN, LINKTYPE_ETHERNET)])

    def record(self, frame: Sequence[Frame]) -> None:
        """Append the frame that these pieces make up; raises HostError, and then the capture has ended."""
        size = sum(map(len, frame))
        seconds, rest = divmod(self._clock(), 1_000_000_000)
        self._write([PACKET.pack(seconds, rest // 1000, size, size), *frame])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, parts: Sequence[Frame]) -> None:
        """All of it, in one call: what reads the file meanwhile sees whole packets."""
        try:
            count = os.writev(self._fd, parts)
        except OSError as error:
            self.close()
            raise self._failed(error) from None
        if count < sum(map(len, parts)):
            with suppress(OSError):  # a pipe has no length
                os.ftruncate(self._fd, self._size)
            self.close()
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._size += count

    def _failed(self, error: OSError) -> HostError:
        return HostError(f'cannot write the capture "{self._path}": {error.strerror}', "name another file")
