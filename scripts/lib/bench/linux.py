"""From power-on to init's first line: the same kernel, initramfs and command line for each contender.

Where this machine's KVM cannot run Linux, all of it happens in one emulated host (scripts/linux-host): its times say
nothing, only their ratios.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .contenders import BUILD, ROOT, Contender, found
from .harness import Failed, Figure, Options, Run

TIME_LIMIT = 600  # seconds for all boots
MEM = 512  # MiB
INIT_SAYS = "init-is-here"


def runs(options: Options, folder: Path) -> dict[str, Run]:
    """All boots are done here, in rounds; what a Run gives is one round of them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kernels = sorted((cache / "kvmpy/kernels/cloud/boot").glob("vmlinuz-*"))
    if not kernels:
        raise Failed("no kernel for the row linux: run scripts/fetch-kernel cloud")
    kvmpy, initrd = BUILD / "venv/bin/kvmpy", folder / "initrd"
    subprocess.run([kvmpy, "initrd", "-o", initrd, "--exec", f"echo {INIT_SAYS}"], check=True)
    monitors = [monitor for monitor in found() if re.search(options.only, monitor.name)]
    commands = {monitor.name: monitor.linux(kernels[-1], initrd, MEM) for monitor in monitors}
    task = {
        "commands": {name: command for name, command in commands.items() if command},
        "environments": {monitor.name: environment(monitor) for monitor in monitors},
        "rounds": options.rounds,
        "says": INIT_SAYS,
        "first": str(folder / "first"),
    }
    (folder / "task.json").write_text(json.dumps(task))
    words = [ROOT / "scripts/linux-host", "--timeout", TIME_LIMIT, "--rw", folder, "--"]
    words += [sys.executable, Path(__file__).parent / "linux_boots.py", folder]
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)
    results = json.loads((folder / "results.json").read_text())
    return {name: partial(one_round, iter(rounds)) for name, rounds in results.items()}


def environment(monitor: Contender) -> dict[str, str]:
    return monitor.environment | {"LD_PRELOAD": str(BUILD / "first_run.so")}


def one_round(rounds: Iterator[dict[str, float]]) -> Iterator[Figure]:
    for case, seconds in next(rounds).items():
        yield Figure(case, "ms", seconds * 1e3)
