"""What people at a terminal see of long work, and that nobody else sees anything."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmpy.core import progress

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
    """What SCRIPT with these arguments writes to the terminal behind its standard error."""
    status, text = on_terminal([sys.executable, "-c", SCRIPT, *words], columns, environment)
    assert status == 0
    return text


def on_terminal(command: Sequence[str | Path], columns: int, environment: dict[str, str]) -> tuple[int, str]:
    """Status and error output of a command whose standard error is a terminal."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "TERM")}
    with subprocess.Popen(command, stderr=terminal, env=plain | environment) as process:
        os.close(terminal)
        output = b""
        while select.select([screen], [], [], SECONDS)[0]:
            try:
                output += os.read(screen, 4096)
            except OSError:  # the last one has closed the terminal
                break
    os.close(screen)
    return process.returncode, output.decode()


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


# scripts/lib/progress, the same for shell scripts.

WRAPPER = Path(__file__).parents[2] / "scripts" / "lib" / "progress"


def test_a_command_of_a_script() -> None:
    status, text = on_terminal([WRAPPER, "fetching", "sh", "-c", "sleep 0.9; exit 3"], 80, {})

    assert status == 3
    assert text in ("\r\x1b[Kfetching (0 s)\r\x1b[K", "\r\x1b[Kfetching (1 s)\r\x1b[K")


def test_a_short_command_of_a_script() -> None:
    assert on_terminal([WRAPPER, "fetching", "true"], 80, {}) == (0, "\r\x1b[K")


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"NO_COLOR": ""}])
def test_a_command_of_a_script_that_nobody_watches(environment: dict[str, str]) -> None:
    assert on_terminal([WRAPPER, "fetching", "sleep", "0.7"], 80, environment) == (0, "")


def test_a_command_of_a_script_without_a_terminal() -> None:
    done = subprocess.run([WRAPPER, "fetching", "echo", "out"], capture_output=True, text=True, timeout=SECONDS)

    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [
        (0, 10 << 20, "pulling"),
        (3 << 20, 0, "pulling, 3 MiB"),
        (5 << 20, 10 << 20, "pulling [############            ] 5 of 10 MiB"),
        (11 << 20, 10 << 20, "pulling [########################] 11 of 10 MiB"),
    ],
)
def test_how_much_is_done(done: int, total: int, shown: str) -> None:
    work = progress.Work("pulling")
    work.total = total

    work.add(done)

    assert str(work) == shown
