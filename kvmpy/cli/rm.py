"""Forget machines that have ended: their logs, their status, their name."""

from __future__ import annotations

import argparse

from .. import named
from . import each
from .stop import stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-f", "--force", action="store_true", help="end those that run first, at once")
    add("names", metavar="NAME", nargs="+", help="the machines, as `kvmpy ps --all` has them")


def run(args: argparse.Namespace) -> int:
    return each(args.names, lambda name: _remove(name, force=args.force))


def _remove(name: str, *, force: bool) -> None:
    machine = named.find(name)
    if force and machine.is_alive:
        stop(machine, 0)
    machine.remove()
