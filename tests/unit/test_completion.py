"""What shells propose for the words of kvmpy; each shell is run itself, where it is installed."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from kvmpy import cli, named
from kvmpy.cli import completion, parser

pytest.importorskip("argcomplete")
LIMIT = 60.0  # seconds

# As bash itself does when somebody types the words and a tab.
BASH = """
eval "$(kvmpy completion bash)"
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
    $(complete -p kvmpy | sed 's/.* -F \\([^ ]*\\) .*/\\1/') kvmpy
    echo "${COMPREPLY[@]}"
done
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """With a command `kvmpy`, a machine `up` that runs, and one `over` that does not."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/kvmpy"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmpy "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    named.claim("up").note(running=True)
    over = named.claim("over")
    over.note(status=0)
    over.close()
    (tmp_path / "folder/data").mkdir(parents=True)
    (tmp_path / "folder/file").touch()
    return os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("lines", "proposed"),
    [
        (
            ["kvmpy r", "kvmpy exec ", "kvmpy rm ", "kvmpy cp u"],
            [{"run", "rm"}, {"up"}, {"up", "over"}, {"up:"}],
        ),
        (
            ["kvmpy run --n", "kvmpy run --net ", "kvmpy run --volume fo", "kvmpy run -- tru", "kvmpy run --cpus "],
            [{"--name", "--net"}, {"none", "user"}, {"folder/"}, {"true", "truncate"}, set()],
        ),
        (
            ["kvmpy boot --tr", "kvmpy boot --sandbox ", "kvmpy exec up cat folder/", "kvmpy completion f"],
            [{"--transport"}, {"strict", "default", "off"}, {"folder/data/", "folder/file"}, {"fish"}],
        ),
    ],
)
def test_bash(environment: dict[str, str], tmp_path: Path, lines: list[str], proposed: list[set[str]]) -> None:
    words = ["bash", "--norc", "-c", BASH]
    typed = "".join(f"{line}\n" for line in lines)

    done = subprocess.run(
        words, env=environment, cwd=tmp_path, input=typed, capture_output=True, text=True, timeout=LIMIT
    )

    assert [set(line.split()) for line in done.stdout.splitlines()] == proposed
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish(environment: dict[str, str], tmp_path: Path) -> None:
    program = "kvmpy completion fish | source; complete -C 'kvmpy wa'; complete -C 'kvmpy exec '"

    done = subprocess.run(
        ["fish", "--no-config", "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )

    assert done.stdout == f"wait\t{cli.VERBS['wait']}\nup\trunning\n"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh(environment: dict[str, str], tmp_path: Path) -> None:
    program = 'autoload -Uz compinit; compinit -u -D; eval "$(kvmpy completion zsh)"; print $_comps[kvmpy]'

    done = subprocess.run(
        ["zsh", "-f", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )

    assert done.stdout == "_python_argcomplete\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_an_answer(verb: str, environment: dict[str, str]) -> None:
    of_verb = argparse.ArgumentParser()
    parser.fill(of_verb, import_module(f"kvmpy.cli.{verb}"))

    for action in of_verb._actions:
        proposed = completion.completer(verb, action)(prefix="/no", parsed_args=argparse.Namespace(command=[]))

        assert all(isinstance(word, str) for word in proposed)


def test_mistakes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["completion", "tcsh"]) == 125
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert cli.main(["completion", "bash"]) == 125

    assert capfd.readouterr() == (
        "",
        (
            'kvmpy: no completion for "tcsh"; use bash, zsh, fish\n'
            "kvmpy: completion needs argcomplete; pip install argcomplete\n"
        ),
    )
