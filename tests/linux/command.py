"""The `kvmpy` command as people use it: a process with pipes or a terminal, to type at and to wait for."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sysconfig
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

KVMPY = str(Path(sysconfig.get_path("scripts")) / "kvmpy")
PATIENCE = 160.0  # seconds for anything that a guest or kvmpy does; reached only when one of them hangs
CHUNK = 1 << 16
NARROW = 4096  # bytes: the least that a pipe can be made to hold


class Finished(NamedTuple):
    """How a command ended; a `status` below 0 is the signal that killed it."""

    status: int
    stdout: str
    stderr: str


class Command:
    """A process that leads a session, with a pipe or a file as its stdin, or on a terminal of its own.

    `stdin` is as for subprocess.Popen. With `terminal`, stdin and stdout are that; stderr never is.
    """

    def __init__(
        self, words: Sequence[str], environment: dict[str, str], *, stdin: int | None = None, terminal: bool = False
    ) -> None:
        self._output = bytearray()
        self._searched = 0  # up to where `expect` has consumed the output
        self._stderr = os.memfd_create("stderr")
        if terminal:
            self._screen, slave = os.openpty()
            self._keys = os.dup(self._screen)
            ends = slave, slave
            words = ["setsid", "--ctty", *words]
        else:
            self._screen, stdout = os.pipe()
            read, self._keys = os.pipe() if stdin is None else (os.dup(stdin), -1)
            ends = read, stdout
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=ends[0],
            stdout=ends[1],
            stderr=self._stderr,
            start_new_session=not terminal,
        )
        for end in set(ends):
            os.close(end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What has been read of it so far."""
        return self._output.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return os.pread(self._stderr, 1 << 24, 0).decode(errors="replace")

    def narrow(self) -> None:
        """Let the pipe of stdout hold next to nothing."""
        fcntl.fcntl(self._screen, fcntl.F_SETPIPE_SZ, NARROW)

    def unread(self) -> int:
        """How many bytes wait in that pipe."""
        return struct.unpack("i", fcntl.ioctl(self._screen, termios.FIONREAD, bytes(4)))[0]

    def resize(self, cols: int, rows: int) -> None:
        """Change the size of the terminal."""
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._keys, text.encode())

    def hang_up(self) -> None:
        """End of input."""
        if self._keys >= 0:
            os.close(self._keys)
            self._keys = -1

    def expect(self, pattern: str) -> str:
        """Read until the output matches `pattern` behind the last match; what it matched."""
        expression = re.compile(pattern.encode())
        deadline = time.monotonic() + PATIENCE
        while (match := expression.search(self._output, self._searched)) is None:
            assert self._read(deadline), f"no {pattern!r} in {self.stdout!r}, stderr {self.stderr!r}"
        self._searched = match.end()
        return match.group().decode(errors="replace")

    def expect_error(self, text: str) -> None:
        """Wait until `text` is in the error output."""
        wait_until(lambda: text in self.stderr, f"{text!r} on stderr")

    def end(self, limit: float = PATIENCE) -> Finished:
        """Read all that it still says, and wait until it has ended; it has `limit` seconds for that."""
        deadline = time.monotonic() + limit
        while self._read(deadline):
            pass
        status = self.wait(deadline - time.monotonic())
        return Finished(status, self.stdout, self.stderr)

    def wait(self, limit: float = PATIENCE) -> int:
        """Its status, without reading what it says."""
        try:
            return self._process.wait(max(limit, 0.01))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; stdout {self.stdout!r}, stderr {self.stderr!r}") from None

    def has_left_processes(self) -> bool:
        """Whether anything of its process group lives."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, 0)
            return True
        return False

    def close(self) -> None:
        """Kill what still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, 9)
        self._process.wait()
        self.hang_up()
        os.close(self._screen)
        os.close(self._stderr)

    def _read(self, deadline: float) -> bool:
        """Wait for more output; whether there was any before its end and the deadline."""
        left = deadline - time.monotonic()
        ready = left > 0 and select.select([self._screen], [], [], left)[0]
        data = b""
        with suppress(OSError):  # EIO: nobody has the terminal open any more
            data = os.read(self._screen, CHUNK) if ready else b""
        self._output += data
        return bool(data)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again until `condition` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


Start = Callable[..., Command]  # the fixture `start`
Boot = Callable[..., Finished]  # the fixture `boot`
