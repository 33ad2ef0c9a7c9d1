"""What `kvmpy run` does with streams, signals and statuses; the agent is a process of this machine, in no guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from agents import LIMIT, NativeAgent

# `kvmpy run` without the machine: SOCKET TTY TIMEOUT CMD...
PROGRAM = """
import os, socket, sys
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from kvmpy.cli import relay
from kvmpy.cli.locked import Lock, leave
from kvmpy.host.tty import stand_by
from kvmpy.core.errors import KvmpyError
from kvmpy.guest.client import Agent
from kvmpy.guest.process import Process

def connect():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    return connection

for mistake in os.environ.get("MISTAKE_IN", "").split():
    def fail(*words):
        raise ZeroDivisionError("on purpose")
    setattr(Process, mistake, fail)
relay.starting()
tty, timeout = sys.argv[2] == "tty", float(sys.argv[3])
if "LOCKED" in os.environ:  # as with a machine that has the host's files
    lock = Lock("default", with_json=False)
    if tty:
        stand_by(0)
    device = SimpleNamespace(reaches=True, folders=((Path("/"), False),), longest_file=0)
    board, config = SimpleNamespace(virtio_devices=lambda: [device]), SimpleNamespace(exec=None)
    lock.lock_down(SimpleNamespace(board=board, config=config))
pipes = {"tty": relay.terminal_size()} if tty else {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
try:
    with Agent(connect).popen(sys.argv[4:], **pipes) as process:
        status = relay.Relay(process, tty=tty).run(timeout)
except KvmpyError as error:
    print(error, file=sys.stderr)
    status = error.status
leave(status)
sys.exit(status)
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(agent: NativeAgent) -> Iterator[Start]:
    """Starts the program with a command; it does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, tty: bool = False, timeout: float = LIMIT, **options: object) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", PROGRAM, str(agent.path), "tty" if tty else "pipes", str(timeout), *command]
        process = subprocess.Popen(words, **{"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, **options})  # type: ignore[call-overload]
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_streams_and_status(start: Start) -> None:
    data = bytes(range(256)) * 8000  # 2 MB: many times what is sent ahead

    process = start("sh", "-c", "cat; echo no >&2; exit 7")

    assert process.communicate(data, LIMIT) == (data, b"no\n")
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["/nonexistent"], 127),
        (["/etc/passwd"], 126),
        (["true"], 0),
    ],
)
def test_status_as_a_shell_has_it(start: Start, command: list[str], status: int) -> None:
    assert start(*command).wait(LIMIT) == status


def test_a_command_out_of_time_is_killed(start: Start) -> None:
    process = start("sh", "-c", "echo begun; sleep 1000", timeout=0.5)

    out, err = process.communicate(timeout=LIMIT)

    assert (process.returncode, out) == (124, b"begun\n")
    assert err == b'"sh" was killed after 0.5 s; give it more with --timeout\n'


def test_an_interrupt_is_for_the_command(start: Start, tmp_path: Path) -> None:
    """From when its input arrives: then there is a relay."""
    words = f"trap 'echo caught; exit 3' INT; read -r line; touch {tmp_path}/up; while :; do sleep 0.01; done"
    process = start("sh", "-c", words)
    assert process.stdin is not None
    process.stdin.write(b"begin\n")
    process.stdin.flush()
    wait_for(tmp_path / "up")

    process.send_signal(signal.SIGINT)

    assert process.communicate(timeout=LIMIT) == (b"caught\n", b"")
    assert process.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_ends_it(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("sh", "-c", f"trap '' TERM HUP; touch {tmp_path}/up; while :; do sleep 0.01; done")
    wait_for(tmp_path / "up")

    process.send_signal(number)

    assert process.wait(LIMIT) == 128 + number


def test_a_reader_that_has_enough(start: Start) -> None:
    process = start("sh", "-c", "while :; do echo more; done")
    assert process.stdout is not None

    first = process.stdout.readline()
    process.stdout.close()

    assert first == b"more\n"
    assert process.wait(LIMIT) == 128 + signal.SIGPIPE


def test_output_that_has_no_room(start: Start) -> None:
    with open("/dev/full", "wb") as full:
        process = start("sh", "-c", "while :; do echo more; done", stdout=full)

        assert process.wait(LIMIT) == 125
    assert process.stderr is not None
    assert (
        process.stderr.read() == b"cannot write the output of the command: No space left on device; make room for it\n"
    )


def test_input_that_nobody_reads(start: Start) -> None:
    with open("/dev/zero") as zeros:
        process = start("true", stdin=zeros)

        assert process.wait(LIMIT) == 0


def test_what_is_left_running_does_not_hold_it(start: Start) -> None:
    process = start("sh", "-c", "sleep 1000 & echo done")
    begin = time.monotonic()

    assert process.communicate(timeout=LIMIT) == (b"done\n", b"")
    assert time.monotonic() - begin < 20


def test_last_words_after_a_silence(start: Start) -> None:
    process = start("sh", "-c", "sleep 1.2; echo late; echo error >&2")

    assert process.communicate(timeout=LIMIT) == (b"late\n", b"error\n")


def test_a_slow_reader_gets_all(start: Start) -> None:
    process = start("sh", "-c", "head -c 200000 /dev/zero")
    assert process.stdout is not None
    time.sleep(2)

    assert len(process.stdout.read()) == 200000
    assert process.wait(LIMIT) == 0


def test_terminal(start: Start) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (33, 99))
    before = termios.tcgetattr(theirs)

    process = start("sh", "-c", "stty size; read -r x; echo got-$x; exit 4", tty=True, stdin=theirs, stdout=theirs)
    seen = os.read(ours, 100)
    raw = termios.tcgetattr(theirs)
    os.write(ours, b"typed\r")
    status = process.wait(LIMIT)
    while b"got-" not in seen:
        seen += os.read(ours, 100)

    assert seen.startswith(b"33 99\r\n")
    assert b"got-typed" in seen
    assert status == 4
    assert not raw[3] & termios.ICANON
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("mistake", ["wait", "write_input"])
def test_a_mistake_in_a_thread_ends_it(start: Start, mistake: str) -> None:
    process = start("sh", "-c", "cat; sleep 100", env={**os.environ, "MISTAKE_IN": mistake})

    _, told = process.communicate(b"something", LIMIT)

    assert process.returncode == 1
    assert b"ZeroDivisionError: on purpose" in told
