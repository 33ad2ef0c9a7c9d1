"""Run a command in a machine that has a name.

Its input, output and exit status are this command's own, and so are Ctrl-C and Ctrl-\\. What is not said is as it was
for the machine: variables, working directory, user. The command ends with kvmpy, at the latest with the machine.
"""

from __future__ import annotations

import argparse
from pathlib import PurePosixPath

from .. import named
from ..core.errors import ConfigError
from ..core.units import parse_seconds
from ..guest.client import Agent
from . import command, relay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser, workdir="the machine's", user="the machine's")
    command.add_terminal(parser)
    add = parser.add_argument
    add("name", metavar="NAME", help="the machine, as `kvmpy ps` has it")
    add("command", metavar="CMD", nargs=argparse.REMAINDER, help="the command with its words; after -- if in doubt")


def run(args: argparse.Namespace) -> int:
    words = command.words(args.command)
    if not words:
        raise ConfigError("there is no command", "write it behind the name: kvmpy exec NAME -- CMD WORDS")
    timeout = parse_seconds(args.timeout)
    machine = named.find(args.name)
    machine.must_run()
    told = machine.facts
    environment = told.get("env", {}) | command.with_terminal(command.variables(args.env), tty=args.tty)
    relay.starting()
    with Agent(machine).popen(
        words,
        env=environment,
        cwd=told.get("cwd", "") if args.workdir is None else str(PurePosixPath("/", told.get("cwd", ""), args.workdir)),
        user=told.get("user", "") if args.user is None else args.user,
        **command.streams(tty=args.tty),
    ) as process:
        return relay.Relay(process, tty=args.tty).run(timeout)
