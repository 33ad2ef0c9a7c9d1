"""The register-name lint finds the mistake it is for, and leaves correct code alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LINT = Path(__file__).parents[2] / "scripts" / "lint-registers"
HEAD = """
class LCR(Bits):
    DLAB = bit(7)
class FCR(Bits):
    CLEAR_RX = bit(1)
class Serial(RegisterDevice, span=8):
    def update(self, value):
"""


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("return self.LCR & FCR.CLEAR_RX", 1),
        ("self.FCR &= ~LCR.DLAB", 1),
        ("return value & (self.LCR | FCR.CLEAR_RX)", 1),
        ("return self.LCR & LCR.DLAB", 0),
        ("self.FCR |= value & FCR.CLEAR_RX", 0),
        ("return self.LCR & LCR.DLAB or self.FCR & FCR.CLEAR_RX", 0),
    ],
)
def test_lint(tmp_path: Path, line: str, status: int) -> None:
    source = tmp_path / "device.py"
    source.write_text(f"{HEAD}        {line}\n")

    done = subprocess.run([sys.executable, str(LINT), str(source)], capture_output=True, text=True)

    assert done.returncode == status, done.stdout
    assert bool(done.stdout) == bool(status)
