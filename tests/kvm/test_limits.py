"""`kvmpy boot` where the host has too few descriptors, threads or too little memory: one line and a status."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60.0
POWER_OFF = "ba0006 b034 ee fa f4"  # machine code for 7C00h, real mode; as in test_machine.py
MIB = 1 << 20
LIMITS = [(resource.RLIMIT_NOFILE, count) for count in (7, 11, 15, 18, 21)]
LIMITS += [(resource.RLIMIT_AS, size * MIB) for size in (35, 45, 55)]
LIMITS += [(resource.RLIMIT_FSIZE, MIB)]


@pytest.mark.parametrize(("kind", "limit"), LIMITS)
def test_limit(tmp_path: Path, kind: int, limit: int) -> None:
    (tmp_path / "sector").write_bytes(bytes.fromhex(POWER_OFF).ljust(510, b"\0") + b"\x55\xaa")
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    words = ["--mem", "2M", "--disk", tmp_path / "disk.img", "--serial", f"unix={tmp_path}/socket", tmp_path / "sector"]

    done = subprocess.run(
        [sys.executable, "-m", "kvmpy", "boot", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
    )

    assert done.returncode in (0, 125, 126), done.stderr  # how much a start takes depends on the host
    assert len(done.stderr.splitlines()) == (done.returncode != 0), done.stderr
    assert not (tmp_path / "socket").exists()
