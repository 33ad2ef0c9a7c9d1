"""SIGTERM ends the command soon, whatever it and the guest are doing (on terminals: test_console.py)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from command import KVMPY, Start, wait_until

SOON = 10.0 if Path("/dev/linux-host").exists() else 2.0  # seconds; an emulated host needs some for Python itself
STATUS = 128 + signal.SIGTERM


def test_guest_spins(start: Start, cloud: Path) -> None:
    command = start(KVMPY, "boot", "-k", cloud, "-c", "2", "--exec", "echo spinning; while :; do :; done")
    command.expect("spinning")

    os.kill(command.pid, signal.SIGTERM)

    assert command.wait(SOON) == STATUS
    assert not command.has_left_processes()


def test_nobody_reads(start: Start, cloud: Path) -> None:
    command = start(KVMPY, "boot", "-k", cloud, "--exec", "yes")
    command.narrow()
    wait_until(lambda: command.unread() > 0, "output")
    time.sleep(2)  # until the pipe is full, but for a few bytes

    os.kill(command.pid, signal.SIGTERM)

    assert command.wait(SOON) == STATUS


def test_guest_boots(start: Start, cloud: Path) -> None:
    command = start(KVMPY, "boot", "-v", "-k", cloud)
    command.expect_error("command line")

    os.kill(command.pid, signal.SIGTERM)

    assert command.wait(SOON) == STATUS


def test_kernel_is_decompressed(start: Start, amd64: Path, tmp_path: Path) -> None:
    command = start("env", f"XDG_CACHE_HOME={tmp_path}", KVMPY, "boot", "--boot", "pvh", "-k", amd64)
    wait_until(
        lambda: amd64.name in Path(f"/proc/{command.pid}/maps").read_text(), "the kernel; decompression comes next"
    )

    os.kill(command.pid, signal.SIGTERM)

    assert command.wait(SOON) == STATUS
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
