"""Print what the command of a machine in the background has written.

What it wrote to standard output and to standard error goes there. The last 8 MiB are kept, until `kvmpy rm`, or until
another machine takes the name.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from .. import named
from ..core.errors import ConfigError
from ..guest.protocol import Parser
from ..host import recent
from ..named import CONSOLE, OUTPUT, Named
from . import tell

PERIOD = 0.1  # seconds between two looks for more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-f", "--follow", action="store_true", help="go on until the machine has ended")
    add("--console", action="store_true", help="what the guest's console has said, instead")
    add("name", metavar="NAME", help="the machine, as `kvmpy ps --all` has it")


def run(args: argparse.Namespace) -> int:
    machine = named.find(args.name)
    if not args.console and not machine.facts.get("detached", True):
        raise ConfigError(
            f'machine "{machine.name}" is in the foreground of process {machine.facts.get("pid")}',
            "its output is there; --console has what its guest's console says",
        )
    wait = _patience(machine) if args.follow else None
    if args.console:
        for data in recent.read(machine.folder / CONSOLE, wait):
            _put(1, data)
    else:
        _print_output(machine.folder / OUTPUT, wait)
    now = named.find(args.name)
    if now.state == named.LOST:
        tell(f"kvmpy: {now.end()}")
    return 0


def _patience(machine: Named) -> Callable[[], bool]:
    """Waits for more; whether there can be any, beyond what is there after the call."""

    def wait() -> bool:
        if not machine.is_alive:
            return False
        time.sleep(PERIOD)
        return True

    return wait


def _print_output(path: Path, wait: Callable[[], bool] | None) -> None:
    parser = Parser()
    for data in recent.read(path, wait):
        for _, stream, payload in parser.feed(data):
            _put(stream, payload)


def _put(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
