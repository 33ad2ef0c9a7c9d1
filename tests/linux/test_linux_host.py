"""scripts/linux-host gives a command a host with KVM, and is otherwise as if the command had been called itself."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.linux_host

LINUX_HOST = str(Path(__file__).resolve().parents[2] / "scripts/linux-host")
LIMIT = 240  # seconds for one emulated host on a busy machine
INPUT = bytes(range(256)) * 64
BULK = 10_000_000

# One host for many questions: each line's answer is one test's business.
QUESTIONS = f"""
cat
head -c {BULK} /dev/zero
printf '\\r\\n\\377'
echo to stderr >&2
echo by name >/dev/stderr
(echo here) >here.txt
echo there >"$THERE/there.txt"
echo lost >"$HOME/lost.txt" && cat "$HOME/lost.txt" >home.txt
grep -o -w -m 1 svm /proc/cpuinfo >svm.txt
(command -v kvmpy; command -v python) >commands.txt
python -c 'import fcntl; print(fcntl.ioctl(open("/dev/kvm"), 0xAE00))' >version.txt  # KVM_GET_API_VERSION
python -c 'import socket; socket.socket(socket.AF_UNIX).bind("/tmp/socket")' && ls /tmp >tmp.txt
{LINUX_HOST} --timeout 60 -- sh -c 'kill -KILL $$'; echo $? >direct.txt
{LINUX_HOST} --timeout 1 -- sleep 1000 2>>direct.txt; echo $? >>direct.txt
printf '%s|' "$KVMPY_MARK" "$TMPDIR" >environment.txt
sleep 1000 & # keeps our stdout and stderr open
exit 7
"""


@dataclass(frozen=True)
class Run:
    folder: Path
    status: int
    stdout: bytes
    stderr: bytes

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()


def linux_host(*arguments: object, folder: Path, **variables: str) -> Run:
    done = subprocess.run(
        [LINUX_HOST, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **variables},
        input=INPUT,
        capture_output=True,
        timeout=LIMIT + 30,
    )
    return Run(folder, done.returncode, done.stdout, done.stderr)


def mentioning(folder: Path) -> list[str]:
    """The command lines of running processes that name `folder`, as QEMU's does that shares it."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(os.fsdecode(file.read_bytes()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [line for line in lines if str(folder) in line]


def read_until(terminal: int, words: bytes) -> None:
    seen = b""
    while words not in seen:
        readable, _, _ = select.select([terminal], [], [], LIMIT)
        assert readable, seen
        seen += os.read(terminal, 4096)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no command"),
        (["--timeout", "0", "true"], "--timeout 0"),
        (["--timeout", "nan", "true"], "--timeout nan"),
        (["--cpus", "0", "true"], "--cpus 0"),
        (["--mem", "3X", "true"], "--mem 3X"),
        (["--rw", "/no/such", "true"], "/no/such"),
        (["--no-such-option", "true"], "--no-such-option"),
    ],
)
def test_usage_errors(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    run = linux_host(*arguments, folder=tmp_path)

    assert run.status == 125
    assert complaint in run.stderr.decode()
    assert run.stderr.count(b"\n") == 1


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("linux_host") / "it's, here"
    there = folder.parent / "there"
    folder.mkdir()
    there.mkdir()
    variables = {"KVMPY_MARK": "a 'b'\n", "TMPDIR": "/nowhere", "THERE": str(there)}
    command = ["--emulate", "--timeout", LIMIT, "--rw", there, "--", "sh", "-c", QUESTIONS]
    return linux_host(*command, folder=folder, **variables)


def test_status_is_the_commands(answers: Run) -> None:
    assert answers.status == 7, answers.stderr


def test_stdin_and_a_large_stdout_arrive_whole(answers: Run) -> None:
    assert len(answers.stdout) == len(INPUT) + BULK + 3
    assert answers.stdout == INPUT + bytes(BULK) + b"\r\n\xff"


def test_stderr_is_apart(answers: Run) -> None:
    assert answers.stderr == b"to stderr\nby name\n"


def test_what_is_written_here_and_below_rw_stays(answers: Run) -> None:
    assert answers.text("here.txt") == "here\n"
    assert answers.text("../there/there.txt") == "there\n"


def test_home_can_be_written_but_is_not_changed(answers: Run) -> None:
    assert answers.text("home.txt") == "lost\n"
    assert not (Path.home() / "lost.txt").exists()


def test_kvm_stands_on_svm(answers: Run) -> None:
    assert answers.text("svm.txt") == "svm\n"
    assert answers.text("version.txt") == "12\n"


def test_checkout_comes_first_on_path(answers: Run) -> None:
    venv = Path(LINUX_HOST).parents[1] / ".venv/bin"
    assert answers.text("commands.txt") == f"{venv}/kvmpy\n{venv}/python\n"


def test_tmp_begins_empty_and_takes_sockets(answers: Run) -> None:
    assert "socket" in answers.text("tmp.txt").split()


def test_environment_is_the_callers_but_for_its_temporary_folder(answers: Run) -> None:
    assert answers.text("environment.txt") == "a 'b'\n||"


def test_with_kvm_on_svm_the_command_runs_there(answers: Run) -> None:
    killed, message, late = answers.text("direct.txt").splitlines()
    assert (killed, late) == ("137", "124")
    assert "time" in message


def test_time_limit_and_sigterm_end_everything_of_two_hosts_at_once(tmp_path: Path) -> None:
    terminal, inner = pty.openpty()
    settings = termios.tcgetattr(terminal)
    script = "test -t 0 && test -t 2 && echo ready; read line; echo got $line; sleep 1000"
    command = [LINUX_HOST, "--emulate", "--timeout", str(LIMIT), "--", "sh", "-c", script]
    late = [LINUX_HOST, "--emulate", "--timeout", "5", "--", "sleep", "1000"]

    with subprocess.Popen(command, cwd=tmp_path, stdin=inner, stdout=inner, stderr=inner) as interactive:
        os.close(inner)
        limited = subprocess.run(late, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)
        read_until(terminal, b"ready")
        os.write(terminal, b"words\r")
        read_until(terminal, b"got words")
        interactive.send_signal(signal.SIGTERM)
        status = interactive.wait(30)

    assert (limited.returncode, limited.stdout) == (124, b"")
    assert status == 128 + signal.SIGTERM
    assert mentioning(tmp_path) == []
    assert termios.tcgetattr(terminal) == settings
    os.close(terminal)
