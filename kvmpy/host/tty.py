"""The user's terminal: raw mode that is always undone, and the keys that speak to kvmpy instead of the guest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from ..core.later import later
from ..core.typed import TYPE_CHECKING, Any, Enum

if TYPE_CHECKING:
    import termios
    from subprocess import Popen
else:
    (termios,) = later("", "termios")  # for those who have a terminal

ESCAPE = 0x01  # Ctrl-a

HELP = """
Ctrl-a x       stop the machine and quit
Ctrl-a b       send a break (Magic SysRq in Linux)
Ctrl-a h       show this help
Ctrl-a Ctrl-a  send Ctrl-a
"""


class Key(Enum):
    """What a key after Ctrl-a asks for."""

    QUIT = ord("x")
    BREAK = ord("b")
    HELP = ord("h")


class EscapeKeys:
    """Splits typed bytes, in order, into those for the guest, which go to `send`, and commands for kvmpy."""

    def __init__(self, send: Callable[[bytes], None], command: Callable[[Key], None]) -> None:
        self._send = send
        self._command = command
        self._escaped = False

    def feed(self, data: bytes) -> None:
        """Pass on what was typed."""
        out = bytearray()
        for byte in data:
            if not self._escaped and byte == ESCAPE:
                self._escaped = True
            elif not self._escaped or byte == ESCAPE:
                out.append(byte)
                self._escaped = False
            else:
                self._escaped = False
                if out:
                    self._send(bytes(out))
                    out.clear()
                self._command(Key(byte) if byte in (key.value for key in Key) else Key.HELP)
        if out:
            self._send(bytes(out))


def is_ours(fd: int) -> bool:
    """Whether a terminal is this job's to read and change, and not that of the job in the foreground."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # ENOTTY: not our controlling terminal, so there is no job control on it
        return True


# Saves the settings of the terminal at its descriptor {tty} and says so. Then it waits for a line, which means that all
# is well, or for the end of its input, which is the end of kvmpy, whatever that died of: it puts the settings back.
GUARD = """
saved=$(stty -F /dev/fd/{tty} -g) || exit
trap '' HUP INT TERM TTOU
echo saved
read -r line || stty -F /dev/fd/{tty} "$saved"
"""


_standing_by: dict[int, Popen[bytes]] = {}  # guards of terminals that are not in raw mode yet


def stand_by(fd: int) -> None:
    """Get ready for raw mode of a terminal: a process that locks itself in can start no guard any more."""
    if os.isatty(fd) and is_ours(fd) and (guard := post_guard(fd)):
        termios.tcgetattr(fd)  # it is loaded
        _standing_by[fd] = guard


def post_guard(fd: int) -> Popen[bytes] | None:
    """The shell that undoes what will be changed; None where there is no shell."""
    import subprocess  # only people at a terminal wait for it

    tty = os.dup(fd)
    try:
        guard = subprocess.Popen(
            ["sh", "-c", GUARD.format(tty=tty)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(tty,),
            process_group=0,  # not in the foreground, so that no key signals it
        )
    except OSError:
        return None
    finally:
        os.close(tty)
    assert guard.stdout is not None
    guard.stdout.readline()
    return guard


class RawTerminal:
    """Raw mode on `fd` between `enter` and `leave`; does nothing where `fd` is not our terminal to change.

    Output processing stays on, so that lines of our own and of other programs still begin at the left, unless `output`
    is raw too: what comes has been through another terminal. A small shell stands by meanwhile that undoes it when this
    process is killed or crashes.
    """

    def __init__(self, fd: int, *, output: bool = False) -> None:
        self.fd = fd
        self._output = output
        self._saved: list[Any] | None = None
        self._guard: Popen[bytes] | None = None  # that shell

    def enter(self) -> bool:
        """Whether the terminal is in raw mode now; False for no terminal, or one that another job is using."""
        if not os.isatty(self.fd) or not is_ours(self.fd):
            return False
        self._guard = _standing_by.pop(self.fd, None) or post_guard(self.fd)
        self.make_raw()
        return True

    def make_raw(self) -> None:
        """Bytes pass unchanged, one at a time, without echo or signal keys."""
        self._saved = termios.tcgetattr(self.fd)
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = self._saved
        iflag &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        oflag &= ~termios.OPOST if self._output else ~0
        cflag = (cflag & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        cc = [*cc]
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        termios.tcsetattr(self.fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])

    def leave(self) -> None:
        """Put the terminal back as it was; safe to call twice, and when it has gone."""
        if self._saved is not None:
            saved, self._saved = self._saved, None
            with suppress(termios.error):  # it has gone
                termios.tcsetattr(self.fd, termios.TCSANOW, saved)
        if self._guard is not None:
            guard, self._guard = self._guard, None
            guard.communicate(b"all is well\n")
