"""A Debian with systemd, made by scripts/make-image, lives on a virtio disk: with its own kernel and its own initrd."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from command import KVMPY, Command, Start

from kvmpy.boot import cache

LIMIT = "600"  # seconds for all of the guest: an emulated host needs a third of that
ROOT = "root=LABEL=kvmpy-root"  # the label that make-image gives


@pytest.fixture
def debian() -> Path:
    """The folder of the image, as scripts/fetch-image has made it."""
    folder = cache.folder().with_name("images") / "debian"
    if not (folder / "root.img").exists():
        pytest.skip("no Debian image: run scripts/fetch-image")
    return folder


@pytest.fixture
def disk(debian: Path, tmp_path: Path) -> Path:
    """A copy of the image, to be written to."""
    copy = tmp_path / "root.img"
    subprocess.run(["cp", "--sparse=always", debian / "root.img", copy], check=True)
    return copy


def tool(*words: str | Path) -> str:
    """What a program of e2fsprogs says; it must succeed."""
    path = "/usr/sbin:/sbin:/usr/bin:/bin"
    return subprocess.run(words, check=True, capture_output=True, text=True, env={"PATH": path}).stdout


def log_in(guest: Command) -> None:
    guest.expect("Welcome to ")  # systemd
    guest.expect("login: ")
    guest.type("root\n")
    guest.expect("# ")


# The address and the way out come by DHCP, without anybody's help.
INSTALL = r"""
until host=$(ip route | sed -n 's/^default via \([0-9.]*\) .*/\1/p'); [ "$host" ]; do sleep 0.2; done
echo "deb [trusted=yes] http://$host:{port} ./" >/etc/apt/sources.list
apt-get -qq update </dev/null && apt-get -qq install kvmpy-hello </dev/null >/dev/null 2>&1; echo apt=$?=
kvmpy-hello
ping -c 2 -W 9 {ping}
"""


def test_debian_lives_on_a_disk(start: Start, debian: Path, disk: Path, pingable: str, repository: int) -> None:
    """Systemd comes up, with a network over which a package is installed; what was written stays."""
    guest = start(
        *(KVMPY, "boot", debian / "root.vmlinuz", "--initrd", debian / "root.initrd", "--disk", disk),
        *("--net", "user", "--mem", "512M", "--append", f"{ROOT} loglevel=4", "--timeout", LIMIT),
    )

    log_in(guest)
    guest.type("echo kept >/root/file; findmnt -no SOURCE,FSTYPE /\n")
    mounted = guest.expect(r"/dev/vda\s+\S+\s")
    guest.type("echo failed=$(systemctl --failed --plain --no-legend)\n")
    failed = guest.expect(r"failed=[^$\r]*\r")
    guest.type(INSTALL.format(port=repository, ping=pingable))
    installed = guest.expect(r"apt=\d+=")
    guest.expect("hello-42")
    guest.expect(" 2 received")
    guest.type("systemctl poweroff\n")
    done = guest.end()

    assert done.status == 0
    assert mounted.split() == ["/dev/vda", "ext4"]
    assert (failed.strip(), installed) == ("failed=", "apt=0=")
    assert tool("debugfs", "-R", "cat /root/file", disk) == "kept\n"
    tool("fsck.ext4", "-fn", disk)
