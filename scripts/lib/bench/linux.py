"""From power-on to init's first line: the same kernel, initramfs and command line for each contender.

Where this machine's KVM cannot run Linux, all of it happens in one emulated host (scripts/linux-host): its times say
nothing, only their ratios.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from . import emulated
from .contenders import BUILD, Contender, found
from .harness import Options, Run

TIME_LIMIT = 600  # seconds for all boots
MEM = 512  # MiB
INIT_SAYS = "init-is-here"


def runs(options: Options, folder: Path) -> dict[str, Run]:
    """All boots are done here, in rounds; what a Run gives is one round of them."""
    kernel = emulated.kernel("linux", "cloud")
    kvmpy, initrd = BUILD / "venv/bin/kvmpy", folder / "initrd"
    subprocess.run([kvmpy, "initrd", "-o", initrd, "--exec", f"echo {INIT_SAYS}"], check=True)
    monitors = [monitor for monitor in found() if re.search(options.only, monitor.name)]
    commands = {monitor.name: monitor.linux(kernel, initrd, MEM) for monitor in monitors}
    task = {
        "commands": {name: command for name, command in commands.items() if command},
        "environments": {monitor.name: environment(monitor) for monitor in monitors},
        "rounds": options.rounds,
        "says": INIT_SAYS,
        "first": str(folder / "first"),
    }
    return emulated.rounds("linux_boots.py", folder, task, TIME_LIMIT)


def environment(monitor: Contender) -> dict[str, str]:
    return monitor.environment | {"LD_PRELOAD": str(BUILD / "first_run.so")}
