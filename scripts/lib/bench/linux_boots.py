"""Boots Linux as task.json in a folder says, in rounds, and leaves results.json there: linux_boots.py FOLDER."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

BOOT_LIMIT = 120.0  # seconds


def boot(command: list[str], env: dict[str, str], says: bytes, first: Path) -> dict[str, float]:
    """Milliseconds to init's first line, from the start of the process and from its first KVM_RUN."""
    first.unlink(missing_ok=True)
    begin = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    limit = threading.Timer(BOOT_LIMIT, process.kill)
    limit.start()
    told = b""
    try:
        while says not in told:
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                sys.exit(f"no init: {' '.join(command)}: {told[-2000:].decode(errors='replace')}")
            told += data
        end = time.monotonic()
    finally:
        limit.cancel()
        process.kill()
        process.communicate()
    run_at = int(first.read_text()) / 1e9
    return {"process start to init [ms]": (end - begin) * 1e3, "first KVM_RUN to init [ms]": (end - run_at) * 1e3}


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    names = list(task["commands"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(-1, task["rounds"]):  # the first one is for the page cache
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            env = kept | task["environments"][name] | {"BENCH_FIRST_RUN": task["first"]}
            found = boot(task["commands"][name], env, task["says"].encode(), Path(task["first"]))
            print(f"linux: {name}: {found}", file=sys.stderr, flush=True)
            if turn >= 0:
                results[name].append(found)
    (folder / "results.json").write_text(json.dumps({"rounds": results, "failures": {}}))


if __name__ == "__main__":
    main()
