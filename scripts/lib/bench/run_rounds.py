"""Runs commands as task.json in a folder says, in rounds, and leaves results.json there: run_rounds.py FOLDER."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 400.0  # seconds, for one command

# Prints ms of a warm command, as seen from outside, and beyond what it takes by the clock in the guest.
WARM = """
import sys, time, kvmpy
kernel, count, command = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with kvmpy.Sandbox(kernel=kernel) as sandbox:
    for _ in range(5):
        sandbox.run(command)
    begin = time.monotonic()
    inside = sum(sandbox.run(command).duration for _ in range(count))
    taken = time.monotonic() - begin
print(taken / count * 1e3, (taken - inside) / count * 1e3)
"""


def cold(command: list[str], env: dict[str, str]) -> dict[str, float]:
    begin = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=LIMIT)
    end = time.monotonic()
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-500:].decode(errors='replace')}")
    return {"cold, start to end [ms]": (end - begin) * 1e3}


def warm(task: dict[str, object], env: dict[str, str]) -> dict[str, float]:
    words = [task["python"], "-c", WARM, task["kernel"], task["warm"], task["command"]]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"its warm sandbox ended with {done.returncode}: {done.stderr[-500:]}")
    whole, beyond = map(float, done.stdout.split())
    return {"warm, sandbox.run [ms]": whole, "warm, beyond the guest's own [ms]": beyond}


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    names = list(task["commands"])
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPYCACHEPREFIX"] = "/tmp/bench-pycache"  # modules are compiled once, as in an installation
    os.chdir("/tmp")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for turn in range(-1 if task["rounds"] > 1 else 0, task["rounds"]):  # the first one is for the page cache
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            try:
                found = cold(task["commands"][name], env)
                if name == "kvmpy" and turn >= 0:
                    found |= warm(task, env)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failures[name] = str(error)
                continue
            print(f"run: {name}: {found}", file=sys.stderr, flush=True)
            if turn >= 0:
                results[name].append(found)
    (folder / "results.json").write_text(json.dumps({"rounds": results, "failures": failures}))


if __name__ == "__main__":
    main()
