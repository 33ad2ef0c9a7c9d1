"""Run a command in a fresh machine.

Its input, output and exit status are this command's own. The machine is gone when the command ends: it has the file
system of this host, but keeps what it writes to itself, and has no network unless --net user gives it one.
"""

from __future__ import annotations

import argparse
import os
import sys
from subprocess import PIPE

from ..core.errors import ConfigError, GuestLost
from ..core.text import printable
from ..host.tty import stand_by
from ..kvm.handle import explain_bus_errors
from ..sandbox import HOST, NONE, Sandbox
from . import boot, relay, tell

TAIL = 20  # lines of a lost guest's console
# Folders that the guest has of its own, so that the current folder may not be there.
HIDDEN = ("/dev", "/proc", "/run", "/sys", "/tmp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    add = parser.add_argument
    add("-t", "--tty", action="store_true", help="give the command a terminal")
    add("command", metavar="CMD", nargs=argparse.REMAINDER, help="the command with its words; after -- if in doubt")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `kvmpy shell` too."""
    add = parser.add_argument
    add("-c", "--cpus", metavar="N", default="1", help="number of virtual CPUs (default 1)")
    add("-m", "--mem", metavar="SIZE", default="512M", help="memory, e.g. 512M or 2G (default 512M)")
    add("-k", "--kernel", metavar="FILE", help="kernel image (default: the host's newest)")
    add("--modules-dir", metavar="DIR", help="the kernel's modules (default: beside it)")
    root = "host (default), a folder, or none: busybox alone. What the guest writes to it is forgotten"
    add("--root", metavar="WHAT", default=HOST, help=root)
    volume = "a folder of the host, which the guest changes unless it is ro (repeatable)"
    add("-v", "--volume", metavar="HOST:GUEST[:ro]", action="append", default=[], help=volume)
    add("-n", "--net", metavar="KIND", default=NONE, help="none (default) or user: out through this host")
    publish = "a port of the host for one of the guest, with --net user (repeatable)"
    add("-p", "--publish", metavar="[IP:]HOST:GUEST[/udp]", action="append", default=[], help=publish)
    env = "a variable; without a value, as it is here (repeatable)"
    add("-e", "--env", metavar="NAME[=VALUE]", action="append", default=[], help=env)
    add("-w", "--workdir", metavar="DIR", help="working directory (default with --root host: the current one)")
    add("-u", "--user", metavar="USER[:GROUP]", default="", help="who runs the command (default root)")
    add("--timeout", metavar="S", help="kill the command after S seconds, with status 124")
    level = "how kvmpy locks itself in: default (default) or off"
    add("--sandbox", metavar="LEVEL", default=boot.DEFAULT, help=level)


def run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ConfigError("there is no command", "write it behind the options: kvmpy run -- CMD WORDS")
    return execute(args, command, tty=args.tty)


def execute(args: argparse.Namespace, command: list[str], *, tty: bool) -> int:
    """Run `command` as the options say; the exit status for this process."""
    timeout = boot.parse_seconds(args.timeout)
    environment = variables(args.env)
    if tty:
        environment.setdefault("TERM", os.environ.get("TERM", "linux"))
    sandbox = Sandbox(
        cpus=args.cpus,
        mem=args.mem,
        kernel=args.kernel,
        modules_dir=args.modules_dir,
        root=args.root,
        volumes=args.volume,
        network=args.net,
        publish=args.publish,
        env=environment,
        cwd=working_directory(args.root) if args.workdir is None else args.workdir,
        user=args.user,
    )
    relay.starting()
    explain_bus_errors()
    lock = boot.make_lock(args.sandbox, json=False)
    if tty and lock is not None:
        stand_by(0)
    try:
        with sandbox.start(lock):
            pipes = {"tty": relay.terminal_size()} if tty else {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
            with sandbox.popen(*command, **pipes) as process:
                return relay.Relay(process, tty=tty).run(timeout)
    except GuestLost as error:
        lines = sandbox.logs().splitlines()[-TAIL:]
        tell("\n".join([f"kvmpy: {printable(str(error))}", *(f"| {printable(line)}" for line in lines)]))
        return error.status
    finally:
        if lock is not None:
            lock.close()


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


def working_directory(root: str) -> str:
    """Where a command begins that was not told: here, if the guest has that, else in /."""
    if root != HOST:
        return ""
    try:
        here = os.getcwd()  # noqa: PTH109 (it may be gone)
    except FileNotFoundError:
        return ""
    return "" if any(f"{here}/".startswith(f"{folder}/") for folder in HIDDEN) else here


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
