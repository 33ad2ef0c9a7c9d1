"""A test that does not end: it fails with the stacks of all threads, and the others go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import threading

def test_that_waits_for_ever():
    first, second = threading.Lock(), threading.Lock()
    first.acquire()
    def other_thread():
        with second, first:
            pass
    threading.Thread(target=other_thread, daemon=True).start()
    while not second.locked():
        pass
    second.acquire()

def test_that_comes_next():
    pass
"""


def test_a_deadlock_is_told(tmp_path: Path) -> None:
    (tmp_path / "test_stuck.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-o", "timeout=0.5", str(tmp_path)]

    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    told = done.stdout + done.stderr
    assert done.returncode == 1
    assert "1 failed, 1 passed" in told
    assert "in other_thread" in told
    assert "second.acquire()" in told


def test_every_test_has_a_limit(request: pytest.FixtureRequest) -> None:
    assert all(item.get_closest_marker("timeout") for item in request.session.items)
