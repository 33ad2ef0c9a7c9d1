"""What people at a terminal see of long work, and that nobody else sees anything."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios

import pytest

SCRIPT = """
import sys, time
from kvmpy.core import progress
if "show" in sys.argv:
    progress.show()
with progress.working("making a thing"):
    with progress.working("and its parts"):
        time.sleep(float(sys.argv[1]))
"""
SECONDS = 20.0


def seen(*words: str, columns: int = 80, **environment: str) -> str:
    """What comes out at the terminal behind standard error."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "TERM")}
    command = [sys.executable, "-c", SCRIPT, *words]
    with subprocess.Popen(command, stderr=terminal, env=plain | environment) as process:
        os.close(terminal)
        output = b""
        while select.select([screen], [], [], SECONDS)[0]:
            try:
                output += os.read(screen, 4096)
            except OSError:  # the last one has closed the terminal
                break
    os.close(screen)
    assert process.returncode == 0
    return output.decode()


def test_long_work_is_told_and_then_gone() -> None:
    lines = seen("1.8", "show").split("\r\x1b[K")

    assert lines[0] == lines[-1] == ""
    assert [line.partition("(")[0] for line in lines[1:-1]] == ["kvmpy: making a thing "] * 2


def test_short_work_is_not_told() -> None:
    assert seen("0.1", "show") == ""


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_terminals_that_are_none(environment: dict[str, str]) -> None:
    assert seen("0.8", "show", **environment) == ""


def test_a_program_of_ones_own_is_not_disturbed() -> None:
    assert seen("0.8") == ""


def test_a_line_never_wraps() -> None:
    assert seen("0.8", "show", columns=16) == "\r\x1b[Kkvmpy: making a\r\x1b[K"


def test_no_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "0.8", "show"], capture_output=True, timeout=SECONDS)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
