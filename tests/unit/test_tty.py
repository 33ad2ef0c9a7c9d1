"""The keys that speak to kvmpy, and raw mode that is undone."""

from __future__ import annotations

import os
import subprocess
import sys
import termios

import pytest

from kvmpy.host.tty import EscapeKeys, Key, RawTerminal


@pytest.mark.parametrize(
    ("typed", "heard"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"\x01x", [Key.QUIT]),
        (b"a\x01bc", [b"a", Key.BREAK, b"c"]),
        (b"\x01h", [Key.HELP]),
        (b"\x01?z", [Key.HELP, b"z"]),
        (b"\x01\x01", [b"\x01"]),
        (b"\x01\x01x", [b"\x01x"]),
        (b"\x03\x1a\xff", [b"\x03\x1a\xff"]),
    ],
)
def test_escape_keys(typed: bytes, heard: list[bytes | Key]) -> None:
    whole: list[bytes | Key] = []
    bytewise: list[bytes | Key] = []

    EscapeKeys(whole.append, whole.append).feed(typed)
    keys = EscapeKeys(bytewise.append, bytewise.append)
    for byte in typed:
        keys.feed(bytes([byte]))

    assert whole == heard
    assert b"".join(item for item in bytewise if isinstance(item, bytes)) == b"".join(
        item for item in heard if isinstance(item, bytes)
    )
    assert [item for item in bytewise if isinstance(item, Key)] == [item for item in heard if isinstance(item, Key)]


def test_raw_mode_and_back() -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    terminal = RawTerminal(slave)

    terminal.make_raw()
    raw = termios.tcgetattr(slave)
    terminal.leave()
    terminal.leave()

    assert not raw[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    assert raw[1] & termios.OPOST  # lines of our own still begin at the left
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_not_a_terminal_is_left_alone() -> None:
    reader, writer = os.pipe()

    assert not RawTerminal(reader).enter()

    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("job", "entered"), [("foreground", True), ("background", False)])
def test_a_terminal_of_another_job_is_left_alone(job: str, entered: bool) -> None:
    master, slave = os.openpty()
    code = f"""
import fcntl, os, termios
from kvmpy.host.tty import RawTerminal
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if os.fork() == 0:
    if {job!r} == "background":
        os.setpgid(0, 0)
    print(RawTerminal(0).enter(), flush=True)
    os._exit(0)
os.wait()
"""

    done = subprocess.run(
        [sys.executable, "-c", code], stdin=slave, capture_output=True, text=True, start_new_session=True
    )

    assert done.stdout == f"{entered}\n", done.stderr
    os.close(master)
    os.close(slave)


def test_a_terminal_without_job_control_is_ours() -> None:
    master, slave = os.openpty()
    terminal = RawTerminal(slave)

    entered = terminal.enter()
    terminal.leave()

    assert entered
    os.close(master)
    os.close(slave)
