"""The pytest plugin without a guest: it skips, with the reason, and reports what machines can tell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIMIT = 60.0
TESTS = """
import pytest

@pytest.mark.requires_kvm
def test_marked():
    raise AssertionError

def test_sandbox(kvm_sandbox):
    raise AssertionError

def test_machine(kvm_machine):
    raise AssertionError

def test_factory(kvm_machine_factory):
    raise AssertionError

def test_nothing_of_the_kind():
    pass
"""


def run(folder: Path, conftest: str, tests: str) -> str:
    """What pytest prints for `tests` with the plugin, which may be installed as well."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_demo.py").write_text(tests)
    words = ["-p", "no:kvmpy", "-p", "kvmpy.pytest_plugin", "-p", "no:cacheprovider", "-rs", "--strict-markers"]
    command = [sys.executable, "-m", "pytest", *words, "-c", "/dev/null", "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT).stdout


def test_skipped_with_the_reason(tmp_path: Path) -> None:
    conftest = "from kvmpy import pytest_plugin\npytest_plugin.why_not = lambda: 'ring 0: emulated; use another host'\n"

    output = run(tmp_path, conftest, TESTS)

    assert "1 passed, 4 skipped" in output
    assert output.count("ring 0: emulated; use another host") >= 1
    assert re.search(r"SKIPPED \[\d\].*ring 0: emulated; use another host", output)


def test_a_failure_shows_the_machine(tmp_path: Path) -> None:
    tests = """
    import pytest
    from kvmpy import Machine
    from kvmpy.pytest_plugin import MACHINES

    def test_fails(request):
        machine = Machine()
        request.node.stash[MACHINES] = [machine]
        machine.console._tail += b"last words\\n"
        machine.close()
        raise AssertionError
    """.replace("\n    ", "\n")

    output = run(tmp_path, "", tests)

    assert "1 failed" in output
    assert re.search(r"-+ kvmpy: console of machine -+\nlast words\n", output)
