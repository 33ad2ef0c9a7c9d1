"""The ladder: `cloud` and `amd64` (Debian's kernels), `start` (a command), `boot` (`kvmpy boot` until it ends);
`cable`, `pingable` and `repository` for networks.

All tests here boot Linux, but those of scripts/linux-host. They are skipped where this host's KVM cannot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import KVMPY, Boot, Command, Finished, Start
from networks import cable as cable
from networks import pingable as pingable
from networks import repository as repository

from kvmpy.boot import cache
from kvmpy.core.errors import KvmError
from kvmpy.kvm.handle import Kvm
from kvmpy.kvm.probe import runs_ring0_natively

HERE = Path(__file__).parent
LIMIT = "150"  # seconds: a guest that hangs ends with a crash report, before the test gives up


def no_linux() -> str:
    """Why no Linux kernel runs on this host; empty when it does."""
    try:
        kvm = Kvm()
        native = runs_ring0_natively(kvm)
        kvm.close()
    except KvmError as error:
        return str(error)
    return "" if native else "this host's KVM cannot run Linux: run scripts/test, or this through scripts/linux-host"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    level = [item for item in items if item.path.parent == HERE and item.path.name != "test_linux_host.py"]
    reason = no_linux() if level else ""
    for item in level:
        item.add_marker(pytest.mark.linux)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def kernel(name: str) -> Path:
    """Debian's kernel `name`, as scripts/fetch-kernel has unpacked it."""
    found = sorted(cache.folder().with_name("kernels").glob(f"{name}/boot/vmlinuz-*"))
    if not found:
        pytest.skip(f"no {name} kernel: run scripts/fetch-kernel {name}")
    return found[-1]


@pytest.fixture(scope="session")
def cloud() -> Path:
    return kernel("cloud")


@pytest.fixture(scope="session")
def amd64() -> Path:
    return kernel("amd64")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The user's; but Python keeps compiled modules, which makes the start of a command much shorter here."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("pycache"))}


@pytest.fixture
def start(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a command, see Command; afterwards no process of it lives, and there is no temporary file."""
    commands: list[Command] = []
    temporary = tmp_path_factory.mktemp("temporary")

    def start(*words: str | Path, **options: Any) -> Command:
        command = Command(list(map(str, words)), environment | {"TMPDIR": str(temporary)}, **options)
        commands.append(command)
        return command

    yield start
    for command in commands:
        command.close()
    assert not list(temporary.iterdir())


@pytest.fixture
def boot(start: Start) -> Boot:
    """Runs `kvmpy boot` with these options and nothing to read until it ends."""

    def boot(*options: str | Path, **more: Any) -> Finished:
        with open(os.devnull) as nothing:
            return start(KVMPY, "boot", "--timeout", LIMIT, *options, **{"stdin": nothing.fileno(), **more}).end()

    return boot
