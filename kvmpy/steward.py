"""A process beside one that is locked in, for what that one cannot do any more: it writes the crash report, and at the
end takes away the names of sockets.

A shell waits for the first order: it is made in a tenth of the time of a fork, costs the machine none of its memory,
and most machines never order anything. Then it becomes a Python. What a guest has left behind is read by a child of
that one which has locked itself in.
"""

from __future__ import annotations

import marshal
import os
import select
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

from .core.board import Stop
from .core.errors import HostError
from .core.typed import TYPE_CHECKING, Any, NoReturn
from .remains import causes, gather

if TYPE_CHECKING:
    from pathlib import Path

    from .machine import Machine

LENGTH = struct.Struct("<Q")
LIMIT = 256 << 20  # bytes of a message
PATIENCE = 30.0  # seconds for a report
SEPARATOR = "\0"
SHELL = "/bin/sh"
# Orders come as lines first: whether there are names, which is said before the guest runs, then that there is something
# to do. Signals of the terminal are for the master; who sends a line without an end gets no memory for it.
WAIT = """
trap '' INT TERM HUP QUIT TSTP USR1
[ -w /dev/null ] && exec 2>/dev/null
ulimit -Sv 65536
read -r names || exit 0
[ "$names" = names ] || read -r report || exit 0
ulimit -Sv "$(ulimit -Hv)"
exec "$@" "$names"
"""
BEGIN = "import sys; *sys.path[:], names = sys.argv[1:]; from kvmpy.steward import serve; serve(names)"


class Steward:
    """The master's end; `close` it at the end."""

    def __init__(self) -> None:
        """Raises HostError."""
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        python = [sys.executable, "-P", "-c", BEGIN, *sys.path]
        actions = [(os.POSIX_SPAWN_DUP2, orders, 0), (os.POSIX_SPAWN_DUP2, answers, 1)]
        try:
            self._pid = os.posix_spawn(SHELL, [SHELL, "-c", WAIT, SHELL, *python], os.environ, file_actions=actions)
        except OSError as error:
            raise HostError(f"no process can be started: {error.strerror}", "raise the limit (ulimit -u)") from None
        finally:
            os.close(orders)
            os.close(answers)
        self._called = False  # whether it is a Python by now

    def seal(self, names: Iterable[Path]) -> None:
        """Leave these sockets' names to it; afterwards it takes no more orders but for one report."""
        told = [(str(path), status.st_dev, status.st_ino) for path in names if (status := path.lstat())]
        _write(self._orders, b"names\n" if told else b"none\n")
        if told:
            _send(self._orders, marshal.dumps(told))
        self._called = bool(told)

    def report(self, machine: Any, stop: Stop) -> tuple[str, str]:
        """The crash report, and its facts as JSON; empty when the steward has died over them."""
        if not self._called:
            _write(self._orders, b"report\n")
        _send(self._orders, _pack(causes(stop.cause)).encode(errors="replace"))
        _send(self._orders, marshal.dumps(gather(machine, stop)))
        answer = _receive(self._answers, time.monotonic() + PATIENCE).decode(errors="replace")
        facts, _, text = answer.partition("\n")
        return text, facts

    def close(self) -> None:
        """Until it has ended; safe to call twice."""
        if self._pid:
            os.close(self._orders)
            os.close(self._answers)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _send(pipe: int, data: bytes) -> None:
    _write(pipe, LENGTH.pack(len(data)) + data)


def _write(pipe: int, data: bytes) -> None:
    rest = memoryview(data)
    with suppress(BrokenPipeError):
        while rest:
            rest = rest[os.write(pipe, rest) :]


def _receive(pipe: int, deadline: float | None = None) -> bytes:
    """A message; empty at the end of the pipe, and when it has not come by then."""
    head = _exactly(pipe, LENGTH.size, deadline)
    return _exactly(pipe, min(LENGTH.unpack(head)[0], LIMIT), deadline) if head else b""


def _exactly(pipe: int, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(data) < size:
        if deadline is not None and not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return b""
        part = os.read(pipe, min(size - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return bytes(data)


# The steward's end.


def serve(said: str) -> NoReturn:
    """The shell's Python: standard input has the orders, standard output takes the answer; `said` is the first line,
    which was written before the guest ran."""
    from pathlib import Path

    orders, answers = 0, 1
    try:
        names = marshal.loads(_receive(orders)) if said == "names" else []
        head = _exactly(orders, LENGTH.size, None)
        if head:
            raised = _exactly(orders, min(LENGTH.unpack(head)[0], LIMIT), None)
            writer = os.fork()
            if writer == 0:
                _report(orders, answers, raised)
            if os.waitpid(writer, 0)[1] != 0:
                _send(answers, b"")
        while os.read(orders, 1 << 16):
            pass
        for name, device, inode in names:
            with suppress(OSError):
                status = os.lstat(name)
                if (status.st_dev, status.st_ino) == (device, inode):
                    Path(name).unlink()
    finally:
        os._exit(0)


def _report(orders: int, answers: int, raised: bytes) -> NoReturn:
    status = 1
    try:
        _send(answers, _written(orders, _trace(raised.decode())).encode(errors="replace"))
        status = 0
    finally:
        os._exit(status)


def _written(orders: int, raised: str) -> str:
    """The facts in a line, then the report."""
    import json
    from typing import cast

    import capstone  # noqa: F401 - what evidence loads when it needs it

    from . import evidence, report
    from .core.errors import KvmpyError
    from .jail.lock import Jail
    from .kvm.handle import Kvm
    from .remains import Body, stop_of

    try:
        kvm = Kvm()
    except KvmpyError:
        kvm = None
    jail = Jail("default")
    jail.lock(role="reporter")
    told = marshal.loads(_receive(orders))
    found = evidence.collect(cast("Machine", Body(told, kvm)), stop_of(told), raised)
    return f"{json.dumps(report.facts(found))}\n{report.render(found)}"


def _pack(found: list[tuple[str, list[tuple[str, int, str]]]]) -> str:
    """Causes as text, which whoever reads it can take apart without danger."""
    lines = []
    for title, frames in found:
        lines += [f"{file}{SEPARATOR}{number}{SEPARATOR}{function}" for file, number, function in frames]
        lines.append(title.replace("\n", " "))
    return "\n".join(lines)


def _trace(packed: str) -> str:
    """As Python prints exceptions, with lines only of our own source: no other file is read for the master."""
    import linecache

    ours = f"{os.path.dirname(__file__)}{os.sep}"  # noqa: PTH120
    lines = []
    for line in packed.split("\n") if packed else []:
        file, number, function = (*line.split(SEPARATOR), "", "")[:3]
        if not number:
            lines.append(line)
            continue
        lines.append(f'  File "{file}", line {number}, in {function}')
        known = file.startswith(ours) and ".." not in file and number.isdigit()
        if known and (source := linecache.getline(file, int(number)).strip()):
            lines.append(f"    {source}")
    return "\n".join(lines)
