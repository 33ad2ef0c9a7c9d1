"""What `kvmpy run` and `kvmpy exec` have in common: how their command is written, and how it is to run."""

from __future__ import annotations

import argparse
import os
from subprocess import PIPE
from typing import Any

from ..core.errors import ConfigError
from . import relay


def add_options(parser: argparse.ArgumentParser, *, workdir: str, user: str) -> None:
    """How the command is to run; where, and by whom, when that is not said."""
    add = parser.add_argument
    env = "a variable; without a value, as it is here (repeatable)"
    add("-e", "--env", metavar="NAME[=VALUE]", action="append", default=[], help=env)
    add("-w", "--workdir", metavar="DIR", help=f"working directory (default: {workdir})")
    add("-u", "--user", metavar="USER[:GROUP]", help=f"who runs the command (default: {user})")
    add("--timeout", metavar="S", help="kill the command after S seconds, with status 124")


def add_terminal(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-t", "--tty", action="store_true", help="give the command a terminal")
    add("-i", "--interactive", action="store_true", help="nothing, for those used to it: input always comes through")


def words(command: list[str]) -> list[str]:
    """The command, as argparse.REMAINDER has left it."""
    return command[1:] if command[:1] == ["--"] else command


def variables(texts: list[str]) -> dict[str, str]:
    """What --env says; raises ConfigError."""
    found = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not name:
            raise ConfigError(f'--env "{text}" names no variable', "use NAME=VALUE, or NAME")
        if given:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def with_terminal(environment: dict[str, str], *, tty: bool) -> dict[str, str]:
    """With what a program at a terminal needs."""
    return {"TERM": os.environ.get("TERM", "linux"), **environment} if tty else environment


def streams(*, tty: bool, stdin: bool = True) -> dict[str, Any]:
    """What the command's streams are, as for Agent.popen."""
    if tty:
        return {"tty": relay.terminal_size()}
    return {"stdin": PIPE if stdin else None, "stdout": PIPE, "stderr": PIPE}
