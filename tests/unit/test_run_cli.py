"""The options of `kvmpy run` and of a Sandbox: what they mean, and one line for each mistake."""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest
from agents import NativeAgent

import kvmpy
from kvmpy import cli, machine
from kvmpy.cli import command, relay, run
from kvmpy.core.errors import GuestLost, HostError
from kvmpy.virtio import user_net


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [["--", "ls", "-l", "--", "x"], ["ls", "-l", "--", "x"]])
def test_words_behind_the_command_are_its_own(words: list[str]) -> None:
    args = parse("--cpus", "2", *words)

    assert args.cpus == "2"
    assert [word for word in args.command if word != "--"] == ["ls", "-l", "x"]


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "x=y")
    monkeypatch.delenv("NOWHERE", raising=False)

    assert command.variables(["A=1", "B=", "HERE", "NOWHERE", "A=2"]) == {"A": "2", "B": "", "HERE": "x=y"}


def test_a_command_begins_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir("/usr/lib")
    assert run.working_directory("host") == "/usr/lib"
    assert run.working_directory("none") == ""
    monkeypatch.chdir("/proc")
    assert run.working_directory("host") == ""


@pytest.mark.parametrize("option", [["--diff"], ["--keep", "x"]])
def test_changes_of_a_root_without_a_record(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--root", "none", *option, "--", "true"]) == 125

    assert capsys.readouterr().err.startswith(
        "kvmpy: with --root none there is no record of what was changed; leave out"
    )


def test_a_folder_to_keep_changes_in_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").touch()

    assert cli.main(["run", "--keep", str(tmp_path), "--", "true"]) == 125

    assert "is not an empty folder; give one that is new or empty" in capsys.readouterr().err


def test_root() -> None:
    assert kvmpy.Sandbox().machine.config.root == "/"
    assert kvmpy.Sandbox(root="tree").machine.config.root == "tree"
    assert kvmpy.Sandbox(root="none").machine.config.root is None


def test_root_that_is_not_there(tmp_path: Path) -> None:
    """Told before anything of the host is."""
    with pytest.raises(kvmpy.NotFoundError, match=r"there is no .*missing; give --root a folder or an image"):
        kvmpy.Sandbox(root=tmp_path / "missing").prepare()


def test_volumes() -> None:
    by_host = kvmpy.Sandbox(volumes={"a:b": "/c", Path("d"): "/e:ro"})
    by_line = kvmpy.Sandbox(volumes=["x:/y:ro", "x:/z"])

    assert list(map(str, by_host.machine.config.volumes)) == ["a:b:/c", "d:/e:ro"]
    assert list(map(str, by_line.machine.config.volumes)) == ["x:/y:ro", "x:/z"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no command"),
        (["--"], "there is no command"),
        (["--volume", "src", "true"], 'invalid volume "src"; use HOST:GUEST[:ro]'),
        (["--volume", "src:/", "true"], 'invalid volume "src:/"'),
        (["--net", "tap", "true"], 'invalid network "tap"; use none or user'),
        (["--env", "=1", "true"], '--env "=1" names no variable'),
        (["--timeout", "soon", "true"], 'invalid time limit "soon"'),
        (["--cpus", "0", "true"], 'invalid number of CPUs "0"'),
        (["--mem", "lots", "true"], 'invalid size "lots"'),
        (["--publish", "80:80/udp", "true"], "udp port 80 cannot be published without a network card; give network="),
        (["--publish", "80", "true"], 'cannot publish "80"; use [IP:]HOST:GUEST[/udp]'),
        (["--publish", "what", "--net", "user", "true"], 'cannot publish "what"'),
    ],
)
def test_mistakes(capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["run", *words]) == 125

    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"kvmpy: {message}")
    assert err.count("\n") == 1


def test_a_sandbox_that_does_not_run() -> None:
    sandbox = kvmpy.Sandbox()

    with pytest.raises(GuestLost, match="the sandbox does not run"):
        sandbox.run("true")
    sandbox.close()
    sandbox.close()


def test_who_closes_a_sandbox_that_starts_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two must not open and close the same things at once."""
    sandbox = kvmpy.Sandbox()
    begun, events = threading.Event(), list[str]()

    def start(*_: object) -> None:
        begun.set()
        deadline = time.monotonic() + 10
        while not sandbox.machine._stops and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1)
        events.append("start has failed")
        raise HostError("the machine was stopped")

    close = sandbox.machine.close
    monkeypatch.setattr(sandbox.machine, "start", start)
    monkeypatch.setattr(sandbox.machine, "close", lambda: (events.append("close"), close()))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(sandbox.start)
        begun.wait(10)
        sandbox.close()
        with pytest.raises(HostError):
            starting.result(10)

    assert events[:2] == ["start has failed", "close"]


def test_published_ports() -> None:
    sandbox = kvmpy.Sandbox(publish=["0:80", "127.0.0.1:0:81"])

    assert sandbox.publish(8000) == 8000
    assert sandbox.publish("9000:80") == 9000
    with pytest.raises(kvmpy.ConfigError, match="cannot publish"):
        sandbox.publish("nonsense")


def test_errors_say_where_and_what_to_do() -> None:
    error = kvmpy.CommandError("exec", 2, "command x", "install it", status=127)

    assert (error.stage, error.errno, error.hint, error.status) == ("exec", 2, "install it", 127)


@pytest.fixture
def native(agent: NativeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sandboxes without a machine: the agent is a process of this one."""

    class NativeSandbox(kvmpy.Sandbox):
        def start(self, lock: object = None) -> Self:
            self._agent = agent
            return self

    monkeypatch.setattr(run, "Sandbox", NativeSandbox)
    monkeypatch.setattr(relay, "starting", lambda: None)


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["--env", "A=1", "--workdir", "/usr", "sh", "-c", "pwd; echo $A >&2; exit 3"], 3, "/usr\n", "1\n"),
        (
            ["--timeout", "0.2", "sleep", "99"],
            124,
            "",
            'kvmpy: "sleep" was killed after 0.2 s; give it more with --timeout\n',
        ),
        (["--workdir", "/none", "true"], 125, "", 'kvmpy: working directory "/none" in the guest:'),
        (["no-such-command"], 127, "", "kvmpy: "),
        (["/etc/passwd"], 126, "", 'kvmpy: cannot execute "/etc/passwd" in the guest:'),
    ],
)
@pytest.mark.usefixtures("native")
def test_command(capfd: pytest.CaptureFixture[str], words: list[str], status: int, out: str, err: str) -> None:
    assert cli.main(["run", *words]) == status

    seen = capfd.readouterr()
    assert seen.out == out
    assert seen.err.startswith(err)
    assert seen.err.count("\n") == 1


def test_init_knows_the_words_it_is_told() -> None:
    text = (Path(__file__).parents[2] / "guests/init.c").read_text()

    for word in (machine.AGENT, machine.ROOT, user_net.IP_WORD):
        assert f'option("{word.partition("=")[0]}="' in text
