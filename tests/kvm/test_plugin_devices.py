"""The pytest plugin's machines with devices of the test's own, here with faults, and a tiny guest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TEST = """
from pathlib import Path
import pytest
from kvmpy import faults, pytest_plugin
from kvmpy.core.board import Reason, Stop
from kvmpy.core.regs import Reg, RegisterDevice

pytest_plugin.why_not = lambda: ""  # it is no Linux that runs here

class Bell(RegisterDevice, span=1):
    RING = Reg(0, read=False)

    def attach(self, board):
        self.board, self.line = board, board.irq(5)
        board.pio(0x5E0, 1, self)

    def write_RING(self, value):
        self.line.pulse()
        self.board.stop(Stop(Reason.EXIT, status=value))

def test_bell(kvm_machine_factory, tmp_path):
    (tmp_path / "sector").write_bytes(bytes.fromhex("bae005 b007 ee ebfe").ljust(510, b"\\0") + b"\\x55\\xaa")
    bell = Bell()
    injected = faults.inject(bell, faults.LostInterrupt())
    machine = kvm_machine_factory(bell, kernel=tmp_path / "sector", mem="1M")
    assert machine.wait(30).status == 7
    assert [hit.on for hit in injected] == ["interrupt"]
"""


def test_devices_of_the_tests_own(tmp_path: Path) -> None:
    (tmp_path / "test_demo.py").write_text(TEST)
    words = ["-p", "no:kvmpy", "-p", "kvmpy.pytest_plugin", "-p", "no:cacheprovider", "-c", "/dev/null"]

    command = [sys.executable, "-m", "pytest", *words, "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert "1 passed" in done.stdout, done.stdout
