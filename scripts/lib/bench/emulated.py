"""Rows whose guests are Linux: all contenders' runs happen in one host that has KVM for it (scripts/linux-host).

A program in that host does the rounds: PROGRAM FOLDER reads task.json there, and leaves results.json: `rounds` has for
each contender a list with one object for each round, whose members are figures, and `failures` what a contender did
instead of its part. Where the host is emulated, its times say nothing, only their ratios.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .contenders import ROOT
from .harness import Failed, Figure, Run


def kernel(row: str, name: str) -> Path:
    """Debian's kernel of that name (scripts/fetch-kernel); raises Failed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = sorted((cache / f"kvmpy/kernels/{name}/boot").glob("vmlinuz-*"))
    if not kernels:
        raise Failed(f"no kernel for the row {row}: run scripts/fetch-kernel {name}")
    return kernels[-1]


def rounds(program: str, folder: Path, task: dict[str, Any], time_limit: int) -> dict[str, Run]:
    """Let `program`, a file beside this one, do `task`; what a Run gives is one round of it."""
    (folder / "task.json").write_text(json.dumps(task))
    words = [ROOT / "scripts/linux-host", "--timeout", time_limit, "--rw", folder, "--"]
    words += [sys.executable, Path(__file__).parent / program, folder]
    status = subprocess.run([str(word) for word in words], cwd=ROOT).returncode
    if status:
        raise Failed(f"{program} in scripts/linux-host ended with status {status}")
    results = json.loads((folder / "results.json").read_text())
    failures = results["failures"]
    return {
        name: partial(_one_round, iter(rounds), failures.get(name, "")) for name, rounds in results["rounds"].items()
    }


def _one_round(rounds: Iterator[dict[str, float]], failure: str) -> Iterator[Figure]:
    """Figures whose names end with their units in brackets; raises Failed when there are no more."""
    figures = next(rounds, None)
    if figures is None:
        raise Failed(failure)
    for name, value in figures.items():
        case, _, unit = name.rpartition(" [")
        yield Figure(case, unit.rstrip("]"), value)
