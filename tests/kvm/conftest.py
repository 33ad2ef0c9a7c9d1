"""The ladder: `kvm` (the device), `vm` (a VM on recording buses, empty), then `vm.load`, `vm.start`, `vm.run`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import GUESTS, Rig, emulates_kernel_code

from kvmpy.kvm.handle import Kvm

SECTOR = 512


@pytest.fixture(scope="session", autouse=True)
def guests() -> None:
    """The tiny guests, built from their sources."""
    subprocess.run(["make", "-s", "-C", str(GUESTS), "tiny"], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Callable[[bytes], Path]:
    """A boot sector of this code."""

    def make(code: bytes) -> Path:
        path = tmp_path / "sector.bin"
        path.write_bytes(code.ljust(SECTOR - 2, b"\0") + b"\x55\xaa")
        return path

    return make


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """/dev/kvm."""
    kvm = Kvm()
    yield kvm
    kvm.close()


@pytest.fixture(params=["compiled", "python"])
def vm(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A VM with in-kernel interrupt controllers, and either of the two run loops."""
    rig = Rig(compiled=request.param == "compiled")
    yield rig
    rig.close()


@pytest.fixture
def bare_vm() -> Iterator[Rig]:
    """A VM without interrupt controllers."""
    rig = Rig(irqchip=False)
    yield rig
    rig.close()


@pytest.fixture
def emulating_kvm() -> None:
    """A host whose KVM emulates what a guest does in ring 0."""
    if not emulates_kernel_code():
        pytest.skip("this host's KVM runs guests on the processor, which knows all instructions")


@pytest.fixture
def hardware_kvm() -> None:
    """A host with VT-x or AMD-V below its KVM."""
    if emulates_kernel_code():
        pytest.skip("this host's KVM emulates ring 0, for want of VT-x or AMD-V")
