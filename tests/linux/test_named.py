"""Machines with a name: as README.md has them, at a terminal, and after their owner was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from command import KVMPY, Finished, Start, wait_until
from networks import LIMIT

from kvmpy import named

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def runtime(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, with a folder for machines that does not outlive the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(KVMPY).parent}:{os.environ['PATH']}")
    return environment | {name: os.environ[name] for name in ("XDG_RUNTIME_DIR", "PATH")}


def without_times(text: str) -> str:
    return re.sub(r"[0-9]+ (s|min) *", "N ", text)


def test_readme(cloud: Path, runtime: dict[str, str], tmp_path: Path) -> None:
    (section,) = re.findall(r"^## Named machines\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    session = re.findall(r"^```\n(\$ .*?)^```", section, re.DOTALL | re.MULTILINE)[0]
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.MULTILINE)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes").write_text("from the host\n")

    outputs = [
        subprocess.run(["sh", "-c", command], cwd=folder, env=runtime, capture_output=True, text=True, timeout=LIMIT)
        for command, _ in commands
    ]

    assert len(commands) == 7
    assert [without_times(done.stdout) for done in outputs] == [without_times(expected) for _, expected in commands]
    assert [done.stderr for done in outputs] == [""] * 7
    assert named.all_of() == []


def test_a_session(cloud: Path, runtime: dict[str, str], start: Start, tmp_path: Path) -> None:
    def kvmpy(*words: str, input: bytes | None = None) -> Finished:
        done = subprocess.run([KVMPY, *words], env=runtime, input=input, capture_output=True, timeout=LIMIT)
        return Finished(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode())

    data = os.urandom(1 << 20)
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/data").write_bytes(data)
    (tmp_path / "tree/link").symlink_to("inner/data")
    talk = "while :; do echo tick; echo tock >&2; echo note >/dev/console; sleep 0.2; done"
    options = ["--kernel", str(cloud), "--root", "none", "--env", "A=1"]

    begun = kvmpy("run", "-d", "--name", "one", *options, "--", "sh", "-c", talk)
    again = kvmpy("run", "-d", "--name", "one", *options)
    echoed = kvmpy("exec", "one", "--", "sh", "-c", "cat; echo $A >&2; exit 7", input=data)
    copied = kvmpy("cp", str(tmp_path / "tree"), "one:/copied")
    back = kvmpy("cp", "one:/copied", str(tmp_path / "back"))
    missing = kvmpy("exec", "one", "no-such-command")
    assert (begun.status, begun.stderr) == (0, "")
    here = ["env", f"XDG_RUNTIME_DIR={runtime['XDG_RUNTIME_DIR']}", KVMPY]
    follower = start(*here, "logs", "-f", "one")
    follower.expect("tick\ntick\n")
    terminal = "trap 'echo caught' INT; trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done"
    at_terminal = start(*here, "exec", "-it", "one", "sh", "-c", terminal, terminal=True)
    at_terminal.expect("ready\r\n")
    at_terminal.type("\x03")
    at_terminal.expect("caught\r\n")
    at_terminal.resize(101, 37)
    at_terminal.expect("37 101\r\n")
    (facts,) = json.loads(kvmpy("ps", "--json").stdout)
    wait_until(lambda: "note" in kvmpy("logs", "--console", "one").stdout, "the guest's console")
    os.kill(facts["pid"], signal.SIGKILL)

    assert (begun, again.status) == ((0, "one\n", ""), 125)
    assert echoed == (7, data.decode("latin-1"), "1\n")
    assert (copied.status, back.status, missing.status) == (0, 0, 127)
    assert (tmp_path / "back/link").readlink() == Path("inner/data")
    assert (tmp_path / "back/inner/data").read_bytes() == data
    lost = f'kvmpy: machine "one" is lost: process {facts["pid"]}, which owned it, has died\n'
    assert follower.end() == (0, follower.stdout, follower.stderr)
    assert follower.stderr.endswith(lost)
    assert at_terminal.wait(LIMIT) == 255
    assert at_terminal.stderr == lost
    assert kvmpy("wait", "one") == (255, "", lost)
    assert "lost" in kvmpy("ps").stdout
    assert kvmpy("rm", "one").status == 0
    assert kvmpy("ps", "--all", "--json").stdout == "[]\n"
