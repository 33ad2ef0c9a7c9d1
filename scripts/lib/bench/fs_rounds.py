"""Boots guests that read a shared folder, as task.json says, and leaves results.json there: fs_rounds.py FOLDER."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 400.0  # seconds, for one guest
LINE = re.compile(rb"bench-fs (fresh|again) ([0-9.]+) ([0-9.]+) ([0-9.]+) ([0-9]+)")


def one(contender: dict[str, Any], env: dict[str, str], big: int) -> dict[str, float]:
    daemon = None
    try:
        if "daemon" in contender:
            daemon = subprocess.Popen(contender["daemon"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(1000):
                if Path(contender["socket"]).exists():
                    break
                time.sleep(0.02)
        command = contender["command"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=LIMIT)
    finally:
        if daemon is not None:
            daemon.kill()
            daemon.wait()
            Path(contender["socket"]).unlink(missing_ok=True)
    figures: dict[str, float] = {}
    for turn, *moments, size in LINE.findall(done.stdout):
        begin, middle, end = map(float, moments)
        name = turn.decode()
        figures[f"tar c, {name} [MB/s]"] = int(size) / 1e6 / max(middle - begin, 0.01)
        figures[f"sequential read, {name} [MB/s]"] = big / 1e6 / max(end - middle, 0.01)
    if len(figures) != 4:
        raise RuntimeError(f"did not finish: {done.stdout[-300:]!r} {done.stderr[-500:]!r}")
    return figures


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    names = list(task["contenders"])
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPYCACHEPREFIX"] = "/tmp/bench-pycache"
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for turn in range(task["rounds"]):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            try:
                found = one(task["contenders"][name], env, task["big"])
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failures[name] = str(error)
                continue
            print(f"fs: {name}: {found}", file=sys.stderr, flush=True)
            results[name].append(found)
    (folder / "results.json").write_text(json.dumps({"rounds": results, "failures": failures}))


if __name__ == "__main__":
    main()
