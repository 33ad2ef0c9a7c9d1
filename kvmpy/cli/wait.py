"""Wait for the end of a machine, and end with the status of its command.

That is 0 for a machine without a command, and 255 for one that is lost.
"""

from __future__ import annotations

import argparse

from .. import named
from ..core.errors import GuestLost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the machine, as `kvmpy ps --all` has it")


def run(args: argparse.Namespace) -> int:
    machine = named.find(args.name)
    machine.wait()
    machine = named.find(args.name)
    if machine.state != named.EXITED:
        raise GuestLost(machine.end())
    return int(machine.facts["status"])
