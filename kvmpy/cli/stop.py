"""End machines.

The command of a machine in the background gets SIGTERM and some time; then, and without a command or in the foreground
at once, the machine ends, and what runs in it is killed. `kvmpy ps --all` still lists it, with its status.
"""

from __future__ import annotations

import argparse
import signal

from .. import named
from ..core.errors import HostError
from ..core.units import parse_seconds
from ..named import Named
from . import each

SECONDS = "10"
END_SECONDS = 10.0  # for a machine to end when it has to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--timeout", metavar="S", default=SECONDS, help=f"how long the command has to end (default {SECONDS} s)")
    add("names", metavar="NAME", nargs="+", help="the machines, as `kvmpy ps` has them")


def run(args: argparse.Namespace) -> int:
    timeout = parse_seconds(args.timeout, zero=True) or 0
    return each(args.names, lambda name: stop(named.find(name), timeout))


def stop(machine: Named, timeout: float) -> None:
    """End a machine, after asking its command to end within `timeout` seconds; raises HostError."""
    if timeout:
        machine.send_signal(signal.SIGTERM)
    if timeout and machine.wait(timeout):
        return
    for number in (signal.SIGHUP, signal.SIGKILL):
        machine.send_signal(number)
        if machine.wait(END_SECONDS):
            return
    raise HostError(f'machine "{machine.name}" does not end', f"see what process {machine.facts.get('pid')} does")
