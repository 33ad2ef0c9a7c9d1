"""A command in a fresh Linux: from the start of the process to its end; and one more command in a sandbox that runs.

`vng` is virtme-ng, which boots the same kernel with the host's file system under QEMU, here over 9p.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from . import emulated
from .contenders import BUILD
from .harness import QEMU, Options, Run

TIME_LIMIT = 1800  # seconds for all rounds
WARM = 30  # commands in a sandbox, in each round
MEM = 512  # MiB
COMMAND = "/bin/true"


def runs(options: Options, folder: Path) -> dict[str, Run]:
    kernel = emulated.kernel("run", "amd64")  # the cloud kernel has no 9p
    commands = {"kvmpy": [str(BUILD / "venv/bin/kvmpy"), "run", "--kernel", str(kernel), "--", COMMAND]}
    vng = shutil.which("vng", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if vng is None:
        print("bench: run: no vng to compare with: pip install virtme-ng", file=sys.stderr)
    else:
        words = f"{vng} -r {kernel} --force-9p --cpus 1 --memory {MEM}M -- {COMMAND}"
        commands[f"{QEMU}, vng"] = words.split()
    task = {
        "commands": {name: words for name, words in commands.items() if re.search(options.only, name)},
        "rounds": options.rounds,
        "python": str(BUILD / "venv/bin/python"),
        "kernel": str(kernel),
        "warm": WARM,
        "command": COMMAND,
    }
    return emulated.rounds("run_rounds.py", folder, task, TIME_LIMIT)
