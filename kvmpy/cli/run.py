"""Run a command in a fresh machine.

Its input, output and exit status are this command's own. The machine is gone when the command ends: it has the file
system of this host, but keeps what it writes to itself, and has no network unless --net user gives it one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, GuestLost
from ..core.text import printable
from ..core.units import parse_seconds
from ..host.tty import stand_by
from ..kvm.handle import explain_bus_errors
from ..sandbox import HOST, NONE, Sandbox
from . import boot, command, relay, tell
from .outcome import Outcome

if TYPE_CHECKING:
    from ..named import Claim

TAIL = 20  # lines of a lost guest's console
# Folders that the guest has of its own, so that the current folder may not be there.
HIDDEN = ("/dev", "/proc", "/run", "/sys", "/tmp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    add = parser.add_argument
    command.add_terminal(parser)
    detach = "leave it to itself, and print its name; without CMD it stays until `kvmpy stop`"
    add("-d", "--detach", action="store_true", help=detach)
    add("--json", metavar="FILE", help="write into FILE how it ended, as JSON")
    add("command", metavar="CMD", nargs=argparse.REMAINDER, help="the command with its words; after -- if in doubt")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `kvmpy shell` too."""
    add = parser.add_argument
    add("-c", "--cpus", metavar="N", default="1", help="number of virtual CPUs (default 1)")
    add("-m", "--mem", metavar="SIZE", default="512M", help="memory, e.g. 512M or 2G (default 512M)")
    add("-k", "--kernel", metavar="FILE", help="kernel image (default: the host's newest)")
    add("--modules-dir", metavar="DIR", help="the kernel's modules (default: beside it)")
    root = "host (default), a folder, a disk or container image, oci:NAME from a registry, or none: busybox alone"
    add("--root", metavar="WHAT", default=HOST, help=root)
    limit = "how large a container image may be when unpacked (default 16G)"
    add("--root-limit", metavar="SIZE", default="16G", help=limit)
    pull = "when the registry of oci:NAME is asked: missing (default: if it is not here), always, never"
    add("--pull", metavar="WHEN", default="missing", help=pull)
    add("--keep", metavar="DIR", help="a new folder for what the command has written to the root; else it is forgotten")
    add("--diff", action="store_true", help="tell what the command has changed of the root, on standard error")
    volume = "a folder of the host, which the guest changes unless it is ro (repeatable)"
    add("-v", "--volume", metavar="HOST:GUEST[:ro]", action="append", default=[], help=volume)
    add("-n", "--net", metavar="KIND", default=NONE, help="none (default) or user: out through this host")
    publish = "a port of the host for one of the guest (repeatable)"
    add("-p", "--publish", metavar="[IP:]HOST:GUEST[/udp]", action="append", default=[], help=publish)
    add("--name", metavar="NAME", help="by which `kvmpy exec`, `cp`, `logs`, `stop`, `wait` and `rm` find the machine")
    command.add_options(parser, workdir="with --root host the current one", user="root")
    level = "how kvmpy locks itself in before the guest runs: default or off (default)"
    add("--sandbox", metavar="LEVEL", default=boot.OFF, help=level)
    parser.set_defaults(detach=False, json=None)


def run(args: argparse.Namespace) -> int:
    words = command.words(args.command)
    return execute(args, words, tty=args.tty)


def execute(args: argparse.Namespace, words: list[str], *, tty: bool, whole: bool = False) -> int:
    """Run the command as the options say; the exit status for this process. With a container image, `words` are the
    rest of the image's command, unless they are the `whole` of it."""
    _check_changes(args)
    if args.detach:
        from .owner import in_background

        return in_background(args, words)
    with Outcome(args.json) as outcome:
        relay.starting()
        if args.name is None:
            outcome.status = attended(args, words, outcome, tty=tty, whole=whole)
        else:
            from .owner import holding

            with holding(args.name, outcome) as claim:
                outcome.status = attended(args, words, outcome, claim, tty=tty, whole=whole)
        return outcome.status


def _check_changes(args: argparse.Namespace) -> None:
    """Raises ConfigError for a --keep or --diff that cannot be."""
    if args.keep is None and not args.diff:
        return
    if args.sandbox != boot.OFF:
        raise ConfigError("what is kept is written at the end, when a locked-in kvmpy cannot", "use --sandbox off")
    if args.root == NONE:
        raise ConfigError("with --root none there is no record of what was changed", "leave out --keep and --diff")
    if args.detach:
        raise ConfigError("--keep and --diff tell of the end, which --detach does not wait for", "leave one out")
    if args.keep is not None:
        from pathlib import Path

        from ..guest.changes import check_empty

        check_empty(Path(args.keep))


def attended(
    args: argparse.Namespace,
    words: list[str],
    outcome: Outcome,
    claim: Claim | None = None,
    *,
    tty: bool,
    whole: bool = False,
) -> int:
    """Run the command in the foreground; with a `claim`, as a machine that others find."""
    timeout = parse_seconds(args.timeout)
    sandbox, words = make_sandbox(args, words, claim, tty=tty, whole=whole)
    outcome.sandbox = sandbox
    if tty and args.sandbox != boot.OFF:
        stand_by(0)
    try:
        with started(args, sandbox):
            if claim is not None:
                claim.note(running=True)
            try:
                with sandbox.popen(*words, **command.streams(tty=tty)) as process:
                    outcome.process = process
                    return relay.Relay(process, tty=tty).run(timeout)
            finally:
                if not isinstance(sys.exception(), GuestLost):
                    _look_back(sandbox, args)
    except GuestLost as error:
        outcome.error = error
        lines = sandbox.logs().splitlines()[-TAIL:]
        tell("\n".join([f"kvmpy: {printable(str(error))}", *(f"| {printable(line)}" for line in lines)]))
        return error.status


@contextmanager
def started(args: argparse.Namespace, sandbox: Sandbox) -> Iterator[None]:
    """The machine runs, as long as the block does, and this process is locked in as --sandbox has it."""
    lock = boot.make_lock(args.sandbox, json=False)
    try:
        with sandbox.start(lock):
            yield
    finally:
        if lock is not None:
            lock.close()


def make_sandbox(
    args: argparse.Namespace, words: list[str], claim: Claim | None, *, tty: bool, whole: bool = False
) -> tuple[Sandbox, list[str]]:
    """The machine that the options describe, and the command for it; none for a machine that just stays."""
    explain_bus_errors()
    options: dict[str, Any] = {}
    if claim is not None:
        from .owner import ends

        options = ends(claim)
    sandbox = Sandbox(
        cpus=args.cpus,
        mem=args.mem,
        kernel=args.kernel,
        modules_dir=args.modules_dir,
        root=args.root,
        root_limit=args.root_limit,
        pull=args.pull,
        volumes=args.volume,
        network=args.net,
        publish=args.publish,
        env=command.with_terminal(command.variables(args.env), tty=tty),
        cwd=working_directory(args.root) if args.workdir is None else args.workdir,
        user=args.user or "",
        **options,
    )
    sandbox.prepare()
    if sandbox.image is not None and not whole:
        words = sandbox.image.argv(words)
    if not words and not args.detach:
        raise ConfigError("there is no command", "write it behind the options: kvmpy run -- CMD WORDS")
    if claim is not None:
        from .owner import describe

        describe(claim, args, words, sandbox)
    return sandbox, words


def _look_back(sandbox: Sandbox, args: argparse.Namespace) -> None:
    """What --keep and --diff ask for, when the command has ended."""
    if args.keep is not None:
        for line in sandbox.keep(args.keep):
            tell(printable(f"kvmpy: not in {args.keep}: {line}"))
    if args.diff:
        for change in sandbox.diff():
            tell(printable(str(change)))


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
