"""Commands that are carried to their end, with their output kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from subprocess import DEVNULL, PIPE
from typing import Any, Self

from ..core.errors import CommandFailed, TimedOut, TooLarge
from ..core.record import Record
from .link import Connect, deadline_after
from .process import Process
from .protocol import LIMIT
from .request import shown

COLLECT = 5.0  # seconds for the output of a command that was killed


class Completed(Record, frozen=True):
    """How a command ended: `returncode` is negative for a signal, `duration` in seconds of the guest."""

    args: tuple[str | bytes, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    duration: float

    def check(self) -> Self:
        """Itself when the status is 0; raises CommandFailed."""
        if self.returncode:
            raise CommandFailed(shown(self.args), self.returncode, self.stdout, self.stderr)
        return self


def run(
    connect: Connect,
    args: Sequence[str | bytes],
    input: bytes | None,
    timeout: float | None,
    limit: int = LIMIT,
    **how: Any,
) -> Completed:
    """Run a command to its end; raises as `Agent.run`."""
    deadline = deadline_after(timeout)
    stdin = DEVNULL if input is None else PIPE
    with Process(
        connect, args, **{"stdin": stdin, "stdout": PIPE, "stderr": PIPE, "timeout": timeout, **how}
    ) as process:
        return complete(process, input, timeout, deadline, limit)


def complete(
    process: Process, input: bytes | None, timeout: float | None, deadline: float | None, limit: int = LIMIT
) -> Completed:
    """Carry a process to its end, which comes at `deadline` at the latest; raises as `Agent.run`."""
    try:
        left = None if deadline is None else max(0, deadline - time.monotonic())
        stdout, stderr = process.communicate(input or b"", left, limit)
    except TooLarge:
        process.kill_all()
        raise
    except TimedOut:
        process.kill_all()
        try:
            out, err = process.communicate(timeout=COLLECT, limit=limit)
        except (TimedOut, TooLarge) as late:  # it waits for a device, or had much more to say
            out, err = late.stdout, late.stderr
        raise TimedOut(f"{shown(process.args)} was killed after {timeout:g} s", "give it more time", out, err) from None
    assert process.usage is not None and process.returncode is not None
    return Completed(process.args, process.returncode, stdout, stderr, process.usage.elapsed / 1e9)
