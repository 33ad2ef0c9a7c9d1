"""kill -9 of `kvmpy boot` at any moment: the next one with the same disk and sockets starts, and no process is left.

KVMPY_KILLS=100 kills so often; see tests/kills.py.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import Victim, kill

KILLS = int(os.environ.get("KVMPY_KILLS", "2"))
SECONDS = 60.0
MARK = "KVMPY_TEST_VICTIM"
POWER_OFF, SPIN = "ba0006 b034 ee fa f4", "ebfe"  # machine code for 7C00h, real mode; as in test_machine.py


def sector(folder: Path, code: str) -> Path:
    path = folder / f"{code[:4]}.bin"
    path.write_bytes(bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")
    return path


def words(folder: Path, code: str, *more: str | Path) -> list[str | Path]:
    devices = ["--disk", folder / "disk.img", "--device", f"virtio-vsock,path={folder / 'vsock'}"]
    devices += ["--device", f"virtio-console,port=a,path={folder / 'port'}", "--serial", f"unix={folder / 'serial'}"]
    if shutil.which("passt"):
        devices += ["--net", "user"]
    return [sys.executable, "-m", "kvmpy", "boot", "--mem", "2M", *devices, *more, sector(folder, code)]


def prepare(folder: Path) -> None:
    (folder / "disk.img").write_bytes(bytes(1 << 20))


def check(folder: Path, said: str) -> None:
    done = subprocess.run(words(folder, POWER_OFF), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in folder.iterdir() if path.is_socket()} == set()
    deadline = time.monotonic() + SECONDS
    while left := [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if is_marked(path, folder)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def is_marked(path: Path, folder: Path) -> bool:
    try:
        return f"{MARK}={folder}".encode() in path.read_bytes()
    except OSError:
        return False


def boot(*options: str) -> Victim:
    def command(folder: Path) -> list[str | Path]:
        return ["sh", "-c", 'echo ready; exec "$@"', "-", *words(folder, SPIN, *options)]

    return Victim(" ".join(["boot", *options]), command, check, 1.0, prepare, lambda folder: {MARK: str(folder)})


VICTIMS = [boot("--sandbox", "off"), boot("--sandbox", "default")]


@pytest.mark.parametrize("time", range(KILLS))
@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: str(victim.name))
def test_kill(tmp_path: Path, victim: Victim, time: int) -> None:
    said = kill(victim, tmp_path, random.Random(f"{victim.name} {time}"))

    victim.check(tmp_path, said)
