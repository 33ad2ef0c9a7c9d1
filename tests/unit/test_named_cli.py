"""`kvmpy run --name`, exec, ps, cp, logs, wait, stop, rm; the agent is a process of this machine, in no guest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from agents import LIMIT, build, has_ended

from kvmpy import cli, named
from kvmpy.cli import relay

PROGRAM = Path(__file__).with_name("native_kvmpy.py")
LOOP = "while :; do sleep 0.01; done"


Kvmpy = Callable[..., "Done"]


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("agent"))


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("AGENT", str(agent))
    monkeypatch.chdir("/usr")
    yield tmp_path / "kvmpy"
    for machine in named.all_of():
        machine.send_signal(signal.SIGKILL)
        with suppress(OSError, ValueError):
            os.killpg(int((machine.folder / "agent.pid").read_text()), signal.SIGKILL)


def start(*words: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, PROGRAM, *words], text=True, **(pipes | options))  # type: ignore[call-overload]


@pytest.fixture
def kvmpy(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kvmpy:
    """Runs it to its end, in a process of its own where that matters."""
    monkeypatch.setattr(relay, "starting", lambda: None)

    def kvmpy(*words: str, input: str | None = None) -> Done:
        if input is None and words[0] != "run":
            return Done(cli.main(list(words)), *capfd.readouterr())
        process = start(*words, **({} if input is None else {"stdin": subprocess.PIPE}))
        out, err = process.communicate(input, LIMIT)
        return Done(process.returncode, out, err)

    return kvmpy


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_in_the_background(kvmpy: Kvmpy, base: Path) -> None:
    begun = kvmpy("run", "-d", "--name", "job", "--", "sh", "-c", "echo out; echo err >&2; read -r x; exit 7")

    assert begun == (0, "job\n", "")
    assert kvmpy("wait", "job") == (7, "", "")
    assert kvmpy("logs", "-f", "job") == (0, "out\n", "err\n")
    assert kvmpy("logs", "--console", "job") == (0, "hello from the console\n", "")
    assert "job" not in kvmpy("ps").stdout
    assert "exited 7" in kvmpy("ps", "--all").stdout
    (facts,) = json.loads(kvmpy("ps", "--all", "--json").stdout)
    assert (facts["state"], facts["status"], facts["command"][0], facts["mem"]) == ("exited", 7, "sh", 512 << 20)
    assert "env" not in facts
    assert kvmpy("exec", "job", "true").stderr == (
        'kvmpy: machine "job" has ended with status 7; `kvmpy run --name job` starts another one\n'
    )
    assert kvmpy("rm", "job") == (0, "", "")
    assert os.listdir(base) == [".lock"]


def test_a_machine_without_a_command(kvmpy: Kvmpy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host")
    kvmpy("run", "--detach", "--name", "box", "--env", "A=1", "--env", "B=2", "--workdir", "/usr/lib")

    said = kvmpy("exec", "-e", "B=3", "box", "--", "sh", "-c", "pwd; echo $A$B; cat; echo no >&2; exit 5", input="in\n")
    elsewhere = kvmpy("exec", "--workdir", "python3", "-u", "65534", "box", "sh", "-c", "pwd; id -u")
    there = kvmpy("cp", str(tmp_path / "file"), f"box:{tmp_path}/copy")
    back = kvmpy("cp", f"box:{tmp_path}/copy", str(tmp_path / "back"))

    assert said == (5, "/usr/lib\n13\nin\n", "no\n")
    assert elsewhere == (0, "/usr/lib/python3\n65534\n", "")
    assert (there, back) == ((0, "", ""), (0, "", ""))
    assert (tmp_path / "back").read_text() == "from the host"
    assert kvmpy("run", "-d", "--name", "box") == (
        125,
        "",
        'kvmpy: the name "box" is in use; `kvmpy stop box` ends that machine\n',
    )
    assert kvmpy("stop", "box") == (0, "", "")
    assert kvmpy("wait", "box").status == 0
    assert kvmpy("run", "-d", "--name", "box") == (0, "box\n", "")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["exec", "box"], 125, "there is no command; write it behind the name: kvmpy exec NAME -- CMD WORDS"),
        (["exec", "none", "true"], 125, 'there is no machine "none"; `kvmpy ps --all` lists them'),
        (["exec", "a/b", "true"], 125, 'invalid name "a/b"; use '),
        (["exec", "--workdir", "/none", "box", "true"], 125, 'working directory "/none" in the guest: No such file'),
        (["exec", "--user", "nemo", "box", "true"], 125, 'no user "nemo" in the guest; it has to be in'),
        (["exec", "--timeout", "0.1", "box", "sleep", "9"], 124, '"sleep" was killed after 0.1 s; give it more'),
        (["exec", "box", "no-such-command"], 127, 'command "no-such-command" not found in the guest'),
        (["exec", "box", "/etc/passwd"], 126, 'cannot execute "/etc/passwd" in the guest: Permission denied'),
        (["cp", "a", "b"], 125, "one of the two paths has to be in a machine; write that one as NAME:PATH"),
        (["cp", "box:a", "box:b"], 125, "one of the two paths has to be in a machine"),
        (["cp", "box:", "b"], 125, '"box:" names no file; use e.g. box:/tmp'),
        (["cp", "/no/such/file", "box:/tmp"], 127, 'there is no "/no/such/file" on the host'),
        (["cp", "box:/no/such/file", "/tmp/x"], 125, "in the guest: /no/such/file: No such file or directory"),
        (["cp", "/etc/passwd", "box:/no/such/"], 125, "in the guest: /no/such/: No such file or directory"),
        (["cp", "/etc/passwd", "box:/no/such"], 125, "in the guest: /no/such: No such file or directory"),
        (["cp", "box:/etc/passwd", "/no/such/"], 127, 'there is no folder "/no/such/" on the host; make it first'),
        (["cp", "box:/etc/passwd", "/no/such"], 125, 'cannot write "/no/such": No such file or directory; give'),
        (["logs", "none"], 125, 'there is no machine "none"'),
        (["rm", "box"], 125, 'machine "box" runs; `kvmpy stop box` first, or `kvmpy rm -f`'),
        (["stop", "--timeout", "x", "box"], 125, 'invalid time limit "x"; use seconds, e.g. 10 or 0.5'),
        (["run", "-d", "--json", "x", "true"], 125, "--json tells of the end, which --detach does not wait for; ask"),
        (["run", "-d", "no-such-command"], 127, 'command "no-such-command" not found in the guest'),
        (["run", "-d", "--mem", "lots"], 125, 'invalid size "lots"; use e.g. 512M or 2G'),
        (["run", "-d", "--timeout", "0"], 125, 'invalid time limit "0"; use seconds'),
        (["run", "--name", "box", "true"], 125, 'the name "box" is in use; `kvmpy stop box` ends that machine'),
        (["run", "--json", "/no/such", "true"], 125, 'cannot write "/no/such": No such file or directory; name'),
    ],
)  # fmt: skip
def test_mistakes(box: None, kvmpy: Kvmpy, words: list[str], status: int, message: str) -> None:
    before = [machine.name for machine in named.all_of()]

    done = kvmpy(*words)

    assert done.stderr.startswith(f"kvmpy: {message}")
    assert done.stderr.count("\n") == 1
    assert (done.status, done.stdout) == (status, "")
    assert [machine.name for machine in named.all_of()] == before


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, agent: Path) -> Iterator[Path]:
    """The folder for machines of one for all tests."""
    folder = tmp_path_factory.mktemp("kept")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "AGENT": str(agent)}
    done = subprocess.run([sys.executable, PROGRAM, "run", "-d", "--name", "box"], env=environment, timeout=LIMIT)
    assert done.returncode == 0
    yield folder
    subprocess.run([sys.executable, PROGRAM, "rm", "-f", "box"], env=environment, timeout=LIMIT, check=True)


@pytest.fixture
def box(kept: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that runs."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(kept))
        yield


def test_folders_are_copied(kvmpy: Kvmpy, box: None, tmp_path: Path) -> None:
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/file").write_bytes(bytes(range(256)))
    (tmp_path / "guest").mkdir()

    into = kvmpy("cp", str(tmp_path / "tree"), f"box:{tmp_path}/guest")
    anew = kvmpy("cp", str(tmp_path / "tree"), f"box:{tmp_path}/guest/other")
    (tmp_path / "back").mkdir()
    back = kvmpy("cp", f"box:{tmp_path}/guest/tree", str(tmp_path / "back"))
    named_back = kvmpy("cp", f"box:{tmp_path}/guest/other/inner/file", f"{tmp_path}/back/name")

    assert {into, anew, back, named_back} == {(0, "", "")}
    assert (tmp_path / "guest/other/inner/file").is_file()
    assert (tmp_path / "back/tree/inner/file").read_bytes() == bytes(range(256))
    assert (tmp_path / "back/name").read_bytes() == bytes(range(256))


def test_an_interrupt_is_for_the_command(box: None, tmp_path: Path) -> None:
    process = start("exec", "box", "sh", "-c", f"trap 'echo caught; exit 3' INT; touch {tmp_path}/up; {LOOP}")
    wait_for((tmp_path / "up").exists)

    process.send_signal(signal.SIGINT)

    assert process.communicate(timeout=LIMIT) == ("caught\n", "")
    assert process.returncode == 3


def test_what_exec_has_started_ends_with_it(box: None, tmp_path: Path) -> None:
    process = start(
        "exec", "box", "sh", "-c", f"echo $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; {LOOP}"
    )
    wait_for((tmp_path / "pid").exists)

    process.kill()
    process.communicate()

    assert has_ended(int((tmp_path / "pid").read_text()))


def test_stop_asks_first(kvmpy: Kvmpy, tmp_path: Path) -> None:
    kvmpy("run", "-d", "--name", "job", "sh", "-c", f"trap 'echo asked; exit 4' TERM; touch {tmp_path}/up; {LOOP}")
    wait_for((tmp_path / "up").exists)

    assert kvmpy("stop", "job") == (0, "", "")
    assert kvmpy("wait", "job").status == 4
    assert kvmpy("logs", "job").stdout == "asked\n"
    assert kvmpy("stop", "job") == (0, "", "")


def test_an_owner_that_is_locked_in(kvmpy: Kvmpy, tmp_path: Path) -> None:
    words = ["sh", "-c", f"trap 'echo asked; exit 4' TERM; touch {tmp_path}/up; {LOOP}"]
    begun = kvmpy("run", "-d", "--name", "job", "--sandbox", "default", *words)
    wait_for((tmp_path / "up").exists)
    found = Path(f"/proc/{named.find('job').facts['pid']}/status").read_text()

    assert begun == (0, "job\n", "")
    assert "Seccomp:\t2" in found
    assert kvmpy("exec", "job", "echo", "there") == (0, "there\n", "")
    assert kvmpy("stop", "job") == (0, "", "")
    assert kvmpy("wait", "job") == (4, "", "")
    assert kvmpy("logs", "job").stdout == "asked\n"  # its shell may tell that the sleep was terminated
    assert (named.find("job").folder / "owner").read_text() == ""


def test_a_foreground_that_is_locked_in(kvmpy: Kvmpy, tmp_path: Path) -> None:
    told = tmp_path / "how"

    done = kvmpy("run", "--name", "job", "--sandbox", "default", "--json", str(told), "sh", "-c", "echo out; exit 3")

    assert done == (3, "out\n", "")
    assert kvmpy("wait", "job") == (3, "", "")
    assert json.loads(told.read_text())["reason"] == "exited"


def test_stop_does_not_ask_for_ever(kvmpy: Kvmpy, tmp_path: Path) -> None:
    kvmpy("run", "-d", "--name", "job", "sh", "-c", f"trap '' TERM; touch {tmp_path}/up; {LOOP}")
    wait_for((tmp_path / "up").exists)

    assert kvmpy("stop", "--timeout", "0.2", "job") == (0, "", "")
    assert kvmpy("wait", "job") == (137, "", "")


def test_a_command_that_takes_too_long(kvmpy: Kvmpy) -> None:
    kvmpy("run", "-d", "--name", "job", "--timeout", "0.2", "sh", "-c", "echo begun; sleep 100")

    assert kvmpy("wait", "job") == (124, "", "")
    assert kvmpy("logs", "job").stdout == "begun\n"


def test_an_owner_that_was_killed_blocks_nobody(kvmpy: Kvmpy) -> None:
    kvmpy("run", "-d", "--name", "job", "sh", "-c", LOOP)
    follower = start("logs", "-f", "job")
    machine = named.find("job")

    machine.send_signal(signal.SIGKILL)

    _, err = follower.communicate(timeout=LIMIT)
    why = f'machine "job" is lost: process {machine.facts["pid"]}, which owned it, has died'
    assert (follower.returncode, err) == (0, f"kvmpy: {why}\n")
    assert "lost" in kvmpy("ps").stdout
    assert json.loads(kvmpy("ps", "--json").stdout)[0]["why"] == why.partition(": ")[2]
    assert kvmpy("wait", "job") == (255, "", f"kvmpy: {why}\n")
    os.killpg(int((machine.folder / "agent.pid").read_text()), signal.SIGKILL)
    assert kvmpy("run", "-d", "--name", "job", "true") == (0, "job\n", "")
    assert kvmpy("wait", "job").status == 0


def test_two_who_want_one_name() -> None:
    both = [start("run", "-d", "--name", "job") for _ in range(2)]

    outputs = [process.communicate(timeout=LIMIT) for process in both]

    assert sorted(outputs) == [
        ("", 'kvmpy: the name "job" is in use; `kvmpy stop job` ends that machine\n'),
        ("job\n", ""),
    ]


def test_a_machine_in_the_foreground(kvmpy: Kvmpy, tmp_path: Path) -> None:
    process = start(
        "run", "--name", "job", "sh", "-c", f"touch {tmp_path}/up; read -r x; exit 6", stdin=subprocess.PIPE
    )
    wait_for((tmp_path / "up").exists)

    assert kvmpy("exec", "job", "echo", "there") == (0, "there\n", "")
    refused = kvmpy("logs", "job")
    assert refused.stderr.startswith(f'kvmpy: machine "job" is in the foreground of process {process.pid}; its output')
    process.communicate("\n", LIMIT)

    assert process.returncode == 6
    assert kvmpy("wait", "job").status == 6
    assert "exited 6" in kvmpy("ps", "--all").stdout


def test_a_machine_runs_before_its_command_does(kvmpy: Kvmpy) -> None:
    """Else whoever waits for what the command does is told that the machine is starting."""
    assert kvmpy("run", "--name", "job", "no-such-command").status == 127

    assert named.find("job").facts["running"]


def test_a_machine_in_the_foreground_is_stopped(kvmpy: Kvmpy, tmp_path: Path) -> None:
    process = start("run", "--name", "job", "sh", "-c", f"touch {tmp_path}/up; {LOOP}")
    wait_for((tmp_path / "up").exists)

    assert kvmpy("stop", "job").status == 0
    assert process.communicate(timeout=LIMIT) == ("", "")
    assert process.returncode == 143
    assert kvmpy("wait", "job").status == 143


def test_whoever_waits_for_the_start_can_end_it(kvmpy: Kvmpy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_TEST_START", str(tmp_path / "never"))
    process = start("run", "-d", "--name", "job")
    wait_for(lambda: any(machine.facts.get("created") for machine in named.all_of()))
    refused = kvmpy("exec", "job", "true")

    process.send_signal(signal.SIGINT)

    assert process.communicate(timeout=LIMIT) == ("", "")
    assert process.returncode == 130
    assert refused.stderr == 'kvmpy: machine "job" is starting; try again\n'
    assert named.all_of() == []


def test_a_machine_that_starts_is_stopped(kvmpy: Kvmpy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_TEST_START", str(tmp_path / "never"))
    process = start("run", "-d", "--name", "job")
    wait_for(lambda: any(machine.facts.get("created") for machine in named.all_of()))

    assert kvmpy("stop", "job") == (0, "", "")
    assert process.communicate(timeout=LIMIT) == ("", 'kvmpy: machine "job" was stopped at its start\n')
    assert process.returncode == 143
    assert named.all_of() == []


def test_a_machine_that_nobody_can_find_ends(kvmpy: Kvmpy, tmp_path: Path, base: Path) -> None:
    kvmpy("run", "-d", "--name", "job", "--volume", f"{tmp_path}:/x")
    pid = named.find("job").facts["pid"]

    shutil.rmtree(base)

    assert has_ended(pid)


def test_a_reader_of_the_name_gets_the_end_of_it() -> None:
    """Nothing of who has started it stays open: `name=$(kvmpy run --detach)` ends, whatever else it was given."""
    read, write = os.pipe()
    process = start("run", "-d", pass_fds=(write,))
    os.close(write)

    assert process.communicate(timeout=LIMIT) == ("m1\n", "")
    assert os.read(read, 1) == b""
    os.close(read)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sh", "-c", "exit 3"], {"reason": "exited", "status": 3, "signal": None, "error": None}),
        (["sh", "-c", "kill -9 $$"], {"reason": "killed", "status": 137, "signal": 9, "error": None}),
        (["none-such"], {"reason": "error", "status": 127, "error": 'command "none-such" not found in the guest'}),
        (["--timeout", "0.1", "sleep", "9"], {"reason": "timeout", "status": 124}),
    ],
)
def test_the_outcome_for_programs(kvmpy: Kvmpy, tmp_path: Path, words: list[str], expected: dict[str, object]) -> None:
    done = kvmpy("run", "--name", "job", "--json", str(tmp_path / "how"), *words)

    told = json.loads((tmp_path / "how").read_text())
    assert done.status == expected["status"]
    assert told | expected == told
    assert told["seconds"] >= told["ready_seconds"] >= 0
    if expected["reason"] in ("exited", "killed"):
        assert 0 < told["command"]["seconds"] < told["seconds"]


def test_all_are_tried(kvmpy: Kvmpy) -> None:
    kvmpy("run", "-d", "--name", "a", "true")
    kvmpy("run", "-d", "--name", "b")
    kvmpy("wait", "a")

    done = kvmpy("rm", "nobody", "a", "b")

    assert done.status == 125
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        'kvmpy: there is no machine "nobody"',
        'kvmpy: machine "b" runs',
    ]
    assert kvmpy("rm", "--force", "b") == (0, "", "")
    assert named.all_of() == []


@pytest.mark.parametrize("verb", ["exec", "ps", "cp", "logs", "wait", "stop", "rm"])
def test_what_has_no_machine_of_its_own_loads_none(verb: str) -> None:
    program = f"import sys, kvmpy.cli.{verb}; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, check=True)

    assert {"kvmpy.machine", "kvmpy.sandbox", "kvmpy.cli.run"} & set(done.stdout.split()) == set()
