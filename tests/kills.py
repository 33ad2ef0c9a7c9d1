"""Processes that are killed (SIGKILL) at a random moment, and what they leave.

A Victim is a program and what must be true afterwards, whenever it was killed. To add one, append it to VICTIMS of
unit/test_kill.py: `command` prints `ready` and works in the folder until it is killed, or ends; `check` looks at the
folder, with what the program has printed, and raises AssertionError for what must not be.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SECONDS = 60.0  # after which a victim that is not ready is a failure


class Victim(NamedTuple):
    """A program to kill: `prepare` makes what it needs, once for each time; it is killed up to `longest` seconds after
    it is ready, alone or with all that it has started."""

    name: str
    command: Callable[[Path], Sequence[str | Path]]
    check: Callable[[Path, str], None]
    longest: float = 0.3
    prepare: Callable[[Path], None] = lambda folder: None
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}


def script(text: str) -> Callable[[Path], Sequence[str | Path]]:
    """The command that runs Python source with the folder as its argument."""
    return lambda folder: [sys.executable, "-c", text, folder]


def kill(victim: Victim, folder: Path, numbers: random.Random) -> str:
    """Run `victim` in `folder` and kill it at a random moment; what it has printed until then."""
    victim.prepare(folder)
    with open(folder / "said", "wb") as said, open(folder / "errors", "wb") as errors:
        process = subprocess.Popen(
            victim.command(folder),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=errors,
            env=os.environ | victim.environment(folder),
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, folder)
            time.sleep(numbers.random() * victim.longest)
        finally:
            process.kill()
            process.wait()
            if numbers.random() < 0.5:  # else what it has started goes on for a while, as it would
                _kill_group(process.pid)
    return (folder / "said").read_text()


def _wait_until_ready(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while "ready" not in (folder / "said").read_text():
        assert process.poll() is None, (folder / "errors").read_text()
        assert time.monotonic() < deadline, "it never became ready"
        time.sleep(0.002)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
