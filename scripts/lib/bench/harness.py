"""Rounds, figures, ratios: what all rows of the benchmark share."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

BARE, QEMU, UNLOCKED = "bare C loop", "QEMU", "kvmpy --sandbox off"  # what the others are compared with


class Figure(NamedTuple):
    """One measured value. More is better for rates, less for all others."""

    case: str
    unit: str
    value: float


Run = Callable[[], Iterable[Figure]]  # one run of one contender


class Failed(Exception):
    """What a contender did instead of its part: it is left out from then on."""


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    rounds: int
    seconds: float  # of each phase of a guest
    smoke: bool  # as little as shows that everything works
    folder: Path  # for disk images
    only: str  # contenders, a regular expression

    def sliced(self, slices: int) -> Options:
        """For a row that divides each round: what else the host does changes from one second to the next, and meets
        contenders alike that take turns more often."""
        return replace(self, rounds=self.rounds * slices, seconds=self.seconds / slices)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the images of a row."""
        with tempfile.TemporaryDirectory(prefix="kvmpy-bench-", dir=self.folder) as name:
            yield Path(name)


@dataclass
class Row:
    """All figures of a row: (case, unit) -> contender -> one value for each round."""

    name: str
    figures: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def measure(self, options: Options, runs: dict[str, Run]) -> None:
        """Interleaved rounds, each begun by another contender, so that what else the machine does meets all alike."""
        names = [name for name in runs if re.search(options.only, name)]
        if not names:
            raise Failed(f"no contender matches; there are: {', '.join(runs)}")
        for turn in range(options.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                try:
                    figures = list(runs[name]()) if name in runs else []
                except (Failed, OSError, subprocess.SubprocessError) as error:
                    self.failures.append(f"{self.name}: {name} {error}")
                    del runs[name]
                    continue
                for case, unit, value in figures:
                    self.figures.setdefault((case, unit), {}).setdefault(name, []).append(value)
            print(f"{self.name}: round {turn + 1} of {options.rounds} done", file=sys.stderr, flush=True)

    def records(self) -> list[dict[str, Any]]:
        """One record for each case, unit and contender, in the order in which they were first measured."""
        return [
            self._record(case, unit, name, values)
            for (case, unit), by_name in self.figures.items()
            for name, values in sorted(by_name.items(), key=lambda item: _order(item[0]))
        ]

    def _record(self, case: str, unit: str, name: str, values: list[float]) -> dict[str, Any]:
        by_name = self.figures[case, unit]
        record: dict[str, Any] = {
            "row": self.name,
            "case": case,
            "unit": unit,
            "contender": name,
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "values": values,
            "ratios": {},
        }
        for label, other in (("bare", BARE), ("qemu", best(by_name, QEMU, unit)), ("off", UNLOCKED)):
            if other in by_name and other != name and (found := ratio(values, by_name[other])):
                record["ratios"][label] = found | {"to": other}
        if "bare" in record["ratios"]:
            record["over_bare"] = statistics.median(a - b for a, b in zip(values, by_name[BARE], strict=False))
        return record


def _order(name: str) -> tuple[bool, bool, str]:
    return name != BARE, not name.startswith("kvmpy"), name


def more_is_better(unit: str) -> bool:
    return unit.endswith("/s") or unit == "IOPS"


def best(by_name: dict[str, list[float]], prefix: str, unit: str) -> str:
    """Of the contenders whose names begin with `prefix`, the one with the better median; "" if there is none."""
    names = [name for name in by_name if name.startswith(prefix)]
    choose = max if more_is_better(unit) else min
    return choose(names, key=lambda name: statistics.median(by_name[name])) if names else ""


def ratio(values: list[float], others: list[float]) -> dict[str, float]:
    """Of two contenders: the ratio of each round, their median, lowest and highest."""
    ratios = [a / b for a, b in zip(values, others, strict=False) if b]
    if not ratios:
        return {}
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


# What people and programs get.

WIDTHS = "{:<34} {:<12} {:<15} {:>10} {:>21} {:>21} {:>9} {:>19}"


def table(records: list[dict[str, Any]]) -> str:
    head = WIDTHS.format(
        "case", "unit", "contender", "median", "lowest..highest", "x bare C", "- bare C", "x QEMU"
    ).rstrip()
    lines, last = [], ("", "", "")
    for r in records:
        if r["row"] != last[0]:
            lines += ["", f"{r['row']}", head, "-" * len(head)]
        same = (r["row"], r["case"], r["unit"]) == last
        last = r["row"], r["case"], r["unit"]
        spread = f"{number(r['lowest'])}..{number(r['highest'])}"
        bare, qemu = (_ratio_text(r["ratios"].get(label)) for label in ("bare", "qemu"))
        over = number(r["over_bare"]) if "over_bare" in r else ""
        case, unit = ("", "") if same else (r["case"], r["unit"])
        lines.append(WIDTHS.format(case, unit, r["contender"], number(r["median"]), spread, bare, over, qemu).rstrip())
    return "\n".join(lines)


def _ratio_text(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['lowest']:.2f}..{found['highest']:.2f})" if found else ""


def number(value: float) -> str:
    """With three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def come_first() -> None:
    """On a busy host, look at the clock as soon as a guest has said that a phase is over; contenders stay as they are.
    It takes root."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def heading() -> str:
    """One line on the host, and what a busy one means."""
    facts = host()
    busy = facts["load"] > (os.cpu_count() or 1) / 2
    line = f"{facts['cpu']}, {facts['cpus']} CPUs, Linux {facts['kernel']}, load {facts['load']:.1f}"
    return line + (": a busy host, look at CPU times" if busy else "")


def host() -> dict[str, Any]:
    """What the figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts = {
        "cpu": model[1] if model else "",
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
    for name, command in (("qemu", "qemu-system-x86_64 --version"), ("commit", "git rev-parse --short HEAD")):
        try:
            done = subprocess.run(command.split(), capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:
            continue
        facts[name] = done.stdout.partition("\n")[0]
    return facts


def write_json(path: Path, options: Options, records: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    result = {"host": host(), "rounds": options.rounds, "seconds": options.seconds, "figures": records}
    path.write_text(json.dumps(result | {"targets": verdicts}, indent=1) + "\n")
