"""A process beside one that is locked in, for what that one cannot do any more: it writes the crash report, and at the
end takes away the names of sockets.

It is made before anything is opened, sleeps until it is asked or its master ends, and is asked for one report. What a
guest has left behind is read by a child of it that has locked itself in.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .core.board import Stop
from .core.errors import HostError
from .remains import causes, gather

if TYPE_CHECKING:
    from .machine import Machine

LENGTH = struct.Struct("<Q")
LIMIT = 256 << 20  # bytes of a message
PATIENCE = 30.0  # seconds for a report
SEPARATOR = "\0"


class Steward:
    """The master's end. Make it while the process has one thread, and `close` it at the end."""

    def __init__(self) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        try:
            self._pid = os.fork()
        except OSError as error:
            raise HostError(f"no process can be started: {error.strerror}", "raise the limit (ulimit -u)") from None
        if self._pid == 0:
            os.close(self._orders)
            os.close(self._answers)
            _serve(orders, answers)
        os.close(orders)
        os.close(answers)

    def seal(self, names: Iterable[Path]) -> None:
        """Leave these sockets' names to it; afterwards it takes no more orders but for one report."""
        told = [(str(path), status.st_dev, status.st_ino) for path in names if (status := path.lstat())]
        _send(self._orders, marshal.dumps(told))

    def report(self, machine: Any, stop: Stop) -> tuple[str, str]:
        """The crash report, and its facts as JSON; empty when the steward has died over them."""
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
    rest = memoryview(LENGTH.pack(len(data)) + data)
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


def _serve(orders: int, answers: int) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # keys at the terminal are for the master
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        names = marshal.loads(told) if (told := _receive(orders)) else []  # from before the guest ran
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

    ours = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    lines = []
    for line in packed.split("\n") if packed else []:
        file, number, function = (*line.split(SEPARATOR), "", "")[:3]
        if not number:
            lines.append(line)
            continue
        lines.append(f'  File "{file}", line {number}, in {function}')
        if file in ours and number.isdigit() and (source := linecache.getline(file, int(number)).strip()):
            lines.append(f"    {source}")
    return "\n".join(lines)
