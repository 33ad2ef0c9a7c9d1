"""What virtio devices borrow from the host they give back, also where they come to nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy.core.errors import ConfigError
from kvmpy.host.fuse_wire import IN_HEADER, Op
from kvmpy.host.passt import parse_forwards
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio import user_net
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.port import PortSocket
from kvmpy.virtio.spec import F
from kvmpy.virtio.user_net import ADDRESS, IP_WORD, UserNet
from kvmpy.virtio.vsock import Vsock


class FullBoard(FakeBoard):
    """Has no place for another virtio device."""

    def virtio(self, device: VirtioDevice) -> None:
        raise ConfigError("no room for another device", "attach fewer")


BORROWERS: dict[str, Callable[[Path], VirtioDevice]] = {
    "blk": lambda path: Blk(path=path),
    "fs": lambda path: Fs(path=path.parent, tag="share"),
    "port": lambda path: PortSocket(port="org.example.agent", path=path.parent / "socket"),
    "vsock": lambda path: Vsock(path=path.parent / "socket"),
}


@pytest.mark.parametrize("name", BORROWERS)
def test_a_device_that_finds_no_room_leaves_nothing_open(name: str, path: Path) -> None:
    seen = []
    for _ in range(3):
        with pytest.raises(ConfigError, match="no room"):
            BORROWERS[name](path).attach(FullBoard())
        seen.append((os.listdir("/proc/self/fd"), os.listdir(path.parent)))

    assert len(seen[1][0]) == len(seen[2][0])  # the first time something may be loaded, and stay open
    assert seen[2][1] == [path.name]


def test_a_share_that_was_closed_answers_nothing(tmp_path: Path, transport: str) -> None:
    share = Fs(path=tmp_path, tag="share")
    share.attach(FakeBoard(4 << 20, transport))
    driver = RingDriver(share.board)
    driver.start(F.VERSION_1, [8, 8])
    share.close()

    driver.submit(1, [IN_HEADER.pack(IN_HEADER.size, Op.STATFS, 2, 1, 0, 0, 1, 0, 0)], [256])
    driver.kick(1)
    answered = driver.used(1)
    driver.set("Status", 0)
    share.close()

    assert answered == []
    assert driver.get("Status") == 0


def test_user_net_tells_passt_and_the_guest_the_same_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(user_net, "Passt", lambda forwards, address: asked.append((forwards, address)))

    UserNet("8080:80").attach(FakeBoard())
    UserNet().attach(FakeBoard())

    assert asked == [(parse_forwards("8080:80"), ADDRESS), ([], ADDRESS)]
    assert IP_WORD.startswith(f"kvmpy.ip={ADDRESS.ip}::{ADDRESS.gateway}:")
