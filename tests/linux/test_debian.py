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


def test_debian_lives_on_a_disk(start: Start, debian: Path, disk: Path) -> None:
    guest = start(
        *(KVMPY, "boot", debian / "root.vmlinuz", "--initrd", debian / "root.initrd", "--disk", disk),
        *("--mem", "512M", "--append", f"{ROOT} loglevel=4", "--timeout", LIMIT),
    )

    log_in(guest)
    guest.type("echo kept >/root/file; findmnt -no SOURCE,FSTYPE /\n")
    mounted = guest.expect(r"/dev/vda\s+\S+\s")
    guest.type("echo failed=$(systemctl --failed --plain --no-legend)\n")
    failed = guest.expect(r"failed=[^$\r]*\r")
    guest.type("systemctl poweroff\n")
    done = guest.end()

    assert done.status == 0
    assert mounted.split() == ["/dev/vda", "ext4"]
    assert failed.strip() == "failed="
    assert tool("debugfs", "-R", "cat /root/file", disk) == "kept\n"
    tool("fsck.ext4", "-fn", disk)
