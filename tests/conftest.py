"""What all levels share: the marks, and the reason when a whole level cannot run here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from kvmpy.core.errors import KvmError
from kvmpy.kvm.handle import Kvm

# The same examples in each run, however slow the machine; `--hypothesis-profile=default` looks for others.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

KVM_LEVEL = Path(__file__).parent / "kvm"
# Seconds, on a machine that is ten times as slow as an idle one (guests of the linux level have 600 themselves); then
# the stacks of all threads, and a failure.
LIMITS = {"tests": 120, "unit": 120, "kvm": 180, "linux": 700}


def kvm_missing() -> str:
    """Why this machine has no usable /dev/kvm; empty when it has one."""
    try:
        kvm = Kvm()
    except KvmError as error:
        return str(error)
    kvm.close()
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in LIMITS and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMITS[item.path.parent.name]))
    level = [item for item in items if KVM_LEVEL in item.path.parents]
    missing = kvm_missing() if level else ""
    for item in level:
        item.add_marker(pytest.mark.kvm)
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


# Several runs can share a level: each file is for the one that comes to it first.

SHARED = os.environ.get("KVMPY_SHARE", "")  # a folder that all of them see; a file's name in it says that it is taken
OURS: dict[str, bool] = {}  # whether a file of tests is for this run


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not SHARED:
        return None
    name = item.path.name
    if name not in OURS:
        try:
            Path(SHARED, name).mkdir()
            OURS[name] = True
        except FileExistsError:
            OURS[name] = False
            LEVELS_THAT_RAN.add(item.path.parent.name)  # elsewhere
    return None if OURS[name] else True


# A level of which nothing ran, on a machine that is said to be able to run it, is a failure, not a pass.

LEVELS_THAT_RAN: set[str] = set()


def levels_missing() -> set[str]:
    """Levels named in KVMPY_REQUIRE_LEVELS (comma-separated folders of tests/) none of whose tests has run."""
    return set(filter(None, os.environ.get("KVMPY_REQUIRE_LEVELS", "").split(","))) - LEVELS_THAT_RAN


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        LEVELS_THAT_RAN.add(report.nodeid.split("/")[1])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if levels_missing() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for level in sorted(levels_missing()):
        terminalreporter.line(
            f"no test of the level {level} has run, but this machine should be able to run it", red=True
        )
