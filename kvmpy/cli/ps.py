"""List the machines that have a name.

They are starting or running, or lost: a machine is lost when its guest, or the process that owned it, has died. --all
also lists those that have exited, with the status of their command.
"""

from __future__ import annotations

import argparse
import time
from shlex import join
from typing import Any

from .. import named
from ..core.text import escaped
from ..named import EXITED, Named

COLUMNS = ("NAME", "STATE", "SINCE", "CPUS", "MEM", "COMMAND")
PERIODS = ((86400, "d"), (3600, "h"), (60, "min"), (0, "s"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-a", "--all", action="store_true", help="with those that have exited")
    add("--json", action="store_true", help="print a list of objects as JSON; sizes in bytes, times in s since 1970")


def run(args: argparse.Namespace) -> int:
    machines = [machine for machine in named.all_of() if args.all or machine.state != EXITED]
    if args.json:
        import json

        print(json.dumps([_facts(machine) for machine in machines], indent=2))
        return 0
    rows = [COLUMNS, *map(_row, machines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip())
    return 0


def _facts(machine: Named) -> dict[str, Any]:
    """All but the values of variables, which may be secret."""
    facts = {name: value for name, value in machine.facts.items() if name not in ("env", "running", "process_started")}
    why = {"why": machine.why} if machine.state == named.LOST else {}
    return {"name": machine.name, "state": machine.state, "folder": str(machine.folder)} | facts | why


def _row(machine: Named) -> tuple[str, ...]:
    facts = machine.facts
    state = f"{machine.state} {facts['status']}" if machine.state == EXITED else machine.state
    since = facts.get("ended") or facts.get("created")
    return (
        machine.name,
        state,
        "" if since is None else _period(time.time() - since),
        str(facts.get("cpus", "")),
        f"{facts['mem'] >> 20}M" if "mem" in facts else "",
        escaped(join(facts.get("command", []))),
    )


def _period(seconds: float) -> str:
    length, unit = next((length, unit) for length, unit in PERIODS if seconds >= length or not length)
    return f"{max(0, seconds) // (length or 1):.0f} {unit}"
