"""The dimension `transport` and the devices that several modules test: what names them runs on each transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import NativeAgent, build, running
from balloons import balloon
from consoles import switchboard, terminal
from disks import connect, disk, engine, path, syncs
from nics import TapNet, plugged, rig, tap
from vsocks import guest, reachable

from kvmpy.testing import FakeBoard
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.console import VirtioConsole
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.vsock import Vsock

__all__ = [
    "balloon",
    "connect",
    "disk",
    "engine",
    "guest",
    "path",
    "plugged",
    "reachable",
    "rig",
    "switchboard",
    "syncs",
    "tap",
    "terminal",
]

DEVICES: dict[str, Callable[[Path], VirtioDevice]] = {
    "blk": lambda image: Blk(path=image, queues=2),
    "net": lambda image: TapNet("tap", mac="02:00:00:00:00:01", mtu=1500),
    "rng": lambda image: Rng(),
    "balloon": lambda image: Balloon(stats=1),
    "console": lambda image: VirtioConsole(ports=2),
    "vsock": lambda image: Vsock(),
    "fs": lambda image: Fs(path=image.parent, tag="share"),
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeAgent]:
    """The guest's agent, as a process that has nothing to complain of."""
    folder = tmp_path_factory.mktemp("agent")
    with running(build(folder), folder) as agent:
        yield agent
    assert (folder / "says").read_bytes() == b""


@pytest.fixture(params=["mmio", "pci"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DEVICES)
def each_device(request: pytest.FixtureRequest, path: Path, transport: str) -> Iterator[VirtioDevice]:
    """One device of every kind, attached to a board of its own: `each_device.board`."""
    device = DEVICES[request.param](path)
    device.attach(FakeBoard(16 << 20, transport))
    yield device
    device.close()
