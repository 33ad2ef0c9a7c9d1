"""Disks in a running Linux: one boot, in which a script tries them all, and what it left on the host."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmpy
from kvmpy.virtio.blk import Blk

LIMIT = 150.0  # seconds, for anything the guest does
MIB = 1 << 20
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where mke2fs is

SCRIPT = r"""
say() { name=$1; shift; echo "$name:" $(eval "$*" 2>&1); }
cd /sys/block
say names 'echo vd?'
say sizes 'for disk in vd?; do blockdev --getsize64 /dev/$disk; done'
say serial cat vda/serial
say ro cat vda/ro vdb/ro
say queues 'ls vdc/mq | wc -l'
say blocks cat vda/queue/logical_block_size vda/queue/physical_block_size
say mount 'mount -t ext4 /dev/vda /mnt && echo yes'
say written 'dd if=/dev/urandom of=/mnt/random bs=1M count=8 2>/dev/null; sha256sum < /mnt/random'
say again 'sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/random'
dd if=/dev/zero of=/mnt/big bs=1M count=16 2>/dev/null; sync; rm /mnt/big; sync
say trim 'fstrim -v /mnt | grep -c trimmed'
say umount 'umount /mnt && echo yes'
say read 'sha256sum < /dev/vdb'
say refused 'blockdev --setrw /dev/vdb; dd if=/dev/zero of=/dev/vdb bs=512 count=1 || echo yes'
say discard 'blkdiscard -o 1048576 -l 1048576 /dev/vdc && echo yes'
say holes 'dd if=/dev/vdc bs=1M skip=1 count=1 2>/dev/null | sha256sum'
say direct 'dd if=/dev/vdb of=/dev/vdc bs=64k count=8 oflag=direct 2>/dev/null; head -c 524288 /dev/vdc | sha256sum'
dd if=/dev/zero of=/dev/vdd bs=1M count=1 2>/dev/null; sync
say snapshot 'dd if=/dev/vdd bs=1M count=1 iflag=direct 2>/dev/null | sha256sum'
say errors 'dmesg | grep -ciE "I/O error|EXT4-fs (error|warning)"'
say full 'dd if=/dev/zero of=/dev/vde bs=256k oflag=direct 2>&1 | grep -o "error.*\|No space.*"'
say told 'dmesg | grep -c "I/O error, dev vde"'
say readable 'dd if=/dev/vde bs=256k count=1 iflag=direct 2>/dev/null | wc -c'
say freed 'blkdiscard /dev/vde && echo yes'
dd if=/dev/urandom of=/mnt/new bs=1M count=1 2>/dev/null
say recovered 'dd if=/mnt/new of=/dev/vde bs=256k oflag=direct 2>/dev/null && sha256sum < /mnt/new'
"""
SMALL = 4 * MIB  # of the file system with the image that does not fit


class Session:
    """What the guest said and what its disks hold, afterwards."""

    def __init__(self, folder: Path, small: Path, kernel: Path) -> None:
        self.before = os.urandom(4 * MIB)
        self.disks = {name: folder / name for name in ("vda", "vdb", "vdc", "vdd")}
        for path in self.disks.values():
            path.write_bytes(self.before)
        os.truncate(self.disks["vda"], 0)
        os.truncate(self.disks["vda"], 64 * MIB)
        self.disks["vde"] = small / "vde"
        self.disks["vde"].touch()
        os.truncate(self.disks["vde"], 2 * SMALL)
        tool("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0", self.disks["vda"])
        machine = kvmpy.Machine(kernel=kernel, cpus=2, modules=["ext4"], exec=f"mkdir -p /mnt; {SCRIPT}")
        machine.add(Blk(path=self.disks["vda"], serial="root-disk"))
        machine.add(Blk(path=self.disks["vdb"], ro=True))
        machine.add(Blk(path=self.disks["vdc"], queues=2))
        machine.add(Blk(path=self.disks["vdd"], snapshot=True))
        machine.add(Blk(path=self.disks["vde"]))
        with machine:
            machine.wait(LIMIT)
        lines = (line.split(": ", 1) for line in machine.console.text.splitlines() if ": " in line)
        self.said = {line[0]: line[1].removesuffix(" -") for line in lines}


def tool(*words: str | Path) -> str:
    """The output of one of the host's tools for file systems."""
    program = shutil.which(words[0], path=PATH)
    if program is None:
        pytest.skip(f"no {words[0]} (package e2fsprogs)")
    return subprocess.run([program, *words[1:]], check=True, capture_output=True, text=True).stdout


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system, or just a folder where none can be mounted."""
    path = tmp_path_factory.mktemp("small")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", path]
    mounted = not subprocess.run(mount, capture_output=True, check=False, env={"PATH": PATH}).returncode
    yield path
    subprocess.run(["umount", path] if mounted else ["true"], check=True, env={"PATH": PATH})


@pytest.fixture(scope="module")
def session(cloud: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("disks"), small, cloud)


def test_disks_are_what_was_asked_for(session: Session) -> None:
    assert session.said["names"] == "vda vdb vdc vdd vde"
    assert session.said["sizes"] == f"{64 * MIB} {4 * MIB} {4 * MIB} {4 * MIB} {2 * SMALL}"
    assert session.said["serial"] == "root-disk"
    assert session.said["ro"] == "0 1"
    assert session.said["queues"] == "2"
    assert session.said["blocks"] == "512 4096"
    assert session.said["errors"] == "0"


def test_file_system_comes_back_whole(session: Session) -> None:
    disk = session.disks["vda"]

    assert (session.said["mount"], session.said["umount"]) == ("yes", "yes")
    assert session.said["again"] == session.said["written"]
    tool("e2fsck", "-fn", disk)
    tool("debugfs", "-R", f"dump random {disk}.random", disk)
    assert sha256(Path(f"{disk}.random").read_bytes()) == session.said["written"]


def test_trim_gives_space_back(session: Session) -> None:
    assert session.said["trim"] == "1"
    assert session.disks["vda"].stat().st_blocks * 512 < 24 * MIB


def test_read_only_disk(session: Session) -> None:
    assert session.said["read"] == sha256(session.before)
    assert session.said["refused"].endswith("yes")
    assert session.disks["vdb"].read_bytes() == session.before


def test_discard_and_direct_writes(session: Session) -> None:
    expected = session.before[:MIB] + bytes(MIB) + session.before[2 * MIB :]

    assert session.said["discard"] == "yes"
    assert session.said["holes"] == sha256(bytes(MIB))
    assert session.said["direct"] == sha256(session.before[: MIB // 2])
    assert session.disks["vdc"].read_bytes() == expected


def test_snapshot_is_forgotten(session: Session) -> None:
    assert session.said["snapshot"] == sha256(bytes(MIB))
    assert session.disks["vdd"].read_bytes() == session.before


def test_full_file_system_under_the_image(session: Session, small: Path) -> None:
    """The guest sees I/O errors while there is no room, and goes on when there is."""
    if not small.is_mount():
        pytest.skip("no right to mount a small file system")

    assert "error" in session.said["full"]
    assert int(session.said["told"]) > 0
    assert session.said["readable"] == str(256 << 10)
    assert session.said["freed"] == "yes"
    assert sha256(session.disks["vde"].read_bytes()[:MIB]) == session.said["recovered"]
