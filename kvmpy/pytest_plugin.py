"""The pytest plugin: fixtures for sandboxes and machines, and what a failed test needs to be understood.

    def test_runs(kvm_sandbox):                       # a Sandbox of this test's own, running
        assert kvm_sandbox.run("uname").stdout == b"Linux\\n"

    @pytest.mark.parametrize("kvm_sandbox", [{"mem": "1G", "network": "user"}], indirect=True)
    def test_with_options(kvm_sandbox): ...

    def test_boots(kvm_machine): ...                  # a Machine with the built-in initramfs, running
    def test_two(kvm_machine_factory): ...            # kvm_machine_factory(*devices, **options) makes and starts one

    @pytest.mark.requires_kvm                         # skipped, with the reason, where Linux cannot be booted
    def test_by_hand(): ...

Every test has machines of its own, which end with it, so that tests may run in parallel (pytest-xdist).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .core.board import Attachable
    from .machine import Machine
    from .sandbox import Sandbox

CONSOLE_LINES = 50

MACHINES = pytest.StashKey["list[Machine]"]()  # of the test that runs


@cache
def why_not() -> str:
    """Why this host boots no Linux, as `kvmpy doctor` has it; empty when it does."""
    from . import doctor
    from .kvm.handle import DEVICE

    for check in doctor.kvm(Path("/"), DEVICE):
        if check.level is doctor.Level.FAIL:
            return f"{check.name}: {check.found}" + (f"; {check.remedy}" if check.remedy else "")
    return ""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvmpy")
    group.addoption("--kvm-kernel", metavar="FILE", help="kernel of the machines (default: the host's newest)")
    group.addoption("--kvm-mem", metavar="SIZE", default="512M", help="memory of each machine (default 512M)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires_kvm: skipped where this host's KVM cannot boot Linux")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_kvm") is not None and (reason := why_not()):
        pytest.skip(reason)


@pytest.fixture
def kvm_machine_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Makes and starts a Machine with these devices added, such as disks with faults (kvmpy.faults); its options are
    those of Machine, --kvm-kernel and --kvm-mem are their defaults."""
    from .machine import Machine

    with ExitStack() as running:

        def make(*devices: Attachable, **options: Any) -> Machine:
            machine = Machine(**_defaults(request) | options)
            _remember(request, machine)
            for device in devices:
                machine.add(device)
            return running.enter_context(machine)

        _skip_without_kvm()
        yield make


@pytest.fixture
def kvm_machine(request: pytest.FixtureRequest, kvm_machine_factory: Callable[..., Machine]) -> Machine:
    """A running Machine; indirect parametrization gives it options."""
    return kvm_machine_factory(**getattr(request, "param", {}))


@pytest.fixture
def kvm_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A running Sandbox; indirect parametrization gives it options."""
    from .sandbox import Sandbox

    _skip_without_kvm()
    sandbox = Sandbox(**_defaults(request) | getattr(request, "param", {}))
    _remember(request, sandbox.machine)
    with sandbox:
        yield sandbox


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the machines of a failed test can tell."""
    report = yield
    if report.failed and call.when != "teardown":
        machines: list[Machine] = item.stash.get(MACHINES, [])
        for number, machine in enumerate(machines):
            name = f"machine {number}" if number else "machine"
            report.sections += [(f"kvmpy: {title} of {name}", text) for title, text in _testimony(machine)]
    return report


def _testimony(machine: Machine) -> Iterator[tuple[str, str]]:
    """Titles with texts: why it stopped or where it is, with registers and last exits; its kernel's oopses; and its
    console's last lines."""
    from .core.board import Reason, Stop
    from .core.text import printable
    from .oops import oops
    from .report import crash_report

    if machine.started_at:
        try:
            with machine.paused():
                yield (
                    "state",
                    crash_report(machine, machine.stopped or Stop(Reason.QUIT, "it runs; the test has failed")),
                )
        except Exception as error:  # it is half taken apart; the test's own failure is what counts
            yield "state", f"not to be had: {type(error).__name__}: {error}"
    text = printable(machine.console.text)
    if said := oops(text):
        yield "oops", said
    yield "console", "\n".join(text.splitlines()[-CONSOLE_LINES:]) or "(nothing was written to it)"


def _remember(request: pytest.FixtureRequest, machine: Machine) -> None:
    request.node.stash.setdefault(MACHINES, []).append(machine)


def _skip_without_kvm() -> None:
    if reason := why_not():
        pytest.skip(reason)


def _defaults(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"kernel": request.config.getoption("--kvm-kernel"), "mem": request.config.getoption("--kvm-mem")}
