"""The short forms of --device, and where Linux goes on from when there is a disk."""

from __future__ import annotations

import pytest

from kvmpy.cli import options, settings


def told(words: str) -> settings.Told:
    args = options.read(words.split(), settings.OPTIONS)
    assert args is not None
    return settings.of(args)


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        ("", []),
        ("--disk a.img --disk b.img,ro", ["virtio-blk,path=a.img", "virtio-blk,path=b.img,ro"]),
        ("--net user", ["virtio-net,backend=user"]),
        ("--net tap=tap0,mtu=9000", ["virtio-net,backend=tap,name=tap0,mtu=9000"]),
        ("--net socket=/run/s", ["virtio-net,backend=socket,path=/run/s"]),
        ("--publish 8080:80 --publish 53:53/udp", ["virtio-net,backend=user,publish=8080:80+53:53/udp"]),
        (
            "--net tap --net user,mtu=1400 --net user --publish 1:2",
            [
                "virtio-net,backend=tap",
                "virtio-net,backend=user,publish=1:2,mtu=1400",
                "virtio-net,backend=user",
            ],
        ),
        ("--device virtio-rng --disk a", ["virtio-blk,path=a", "virtio-rng"]),
    ],
)
def test_short_forms(words: str, devices: list[str]) -> None:
    assert settings.devices(told(words)) == devices


@pytest.mark.parametrize(
    ("words", "root"),
    [
        ("--disk a", ["root=/dev/vda rw"]),
        ("", []),
        ("--device virtio-blk,path=a", []),
        ("--disk a --exec true", []),
        ("--disk a --cmdline console=ttyS0", []),
        ("--disk a --append root=LABEL=x", []),
    ],
)
def test_first_disk_is_the_root(words: str, root: list[str]) -> None:
    assert settings.root_words(told(words)) == root
