"""Folders of the host in a running Linux: a script that works in them, and what it left on the host; and a system on a
disk that has them."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from command import Boot

import kvmpy
from kvmpy.boot import initramfs

LIMIT = 150.0  # seconds, for anything the guest does
MIB = 1 << 20

SCRIPT = r"""
say() { name=$1; shift; echo "$name:" $(eval "$*" 2>&1); }
say mounts 'grep -c virtiofs /proc/mounts'
say sum 'sha256sum < /ro/big'
say refused 'touch /ro/new || echo yes'
say remount 'mount -o remount,rw /ro; touch /ro/new || rm /ro/big || chmod 777 /ro/big || echo yes'
cd /rw
mkdir -p /tmp/tree/a/b; cd /tmp/tree
for n in 1 2 3 4 5 6 7 8 9; do echo "text $n" > a/file$n; cp a/file$n a/b/; done
ln -s ../file1 a/b/link; chmod 4751 a/file2; chown 7:8 a/file3
tar cf /tmp/tree.tar .; mkdir /rw/tree; cd /rw/tree
say tar 'tar xf /tmp/tree.tar && diff -r /tmp/tree /rw/tree && echo same'
say find 'find . -type f | wc -l'
say grep 'grep -rl "text 5" . | sort'
say mv 'mv a/file5 a/b/file6; cat a/b/file6'
say ln 'ln a/file7 hard; stat -c %h a/file7'
say deleted 'exec 3<>a/open; echo kept >&3; rm a/open; exec 4< /proc/self/fd/3; cat <&4; exec 3>&- 4>&-'
say outside 'ln -s /etc/passwd out; cat out | grep -c root'
say node 'mknod disk b 8 0 || echo yes'
say fifo 'mkfifo pipe || echo yes'
dd if=/dev/urandom of=/tmp/random bs=1M count=4 2>/dev/null; cp /tmp/random /rw/random
say written 'sha256sum < /tmp/random'
say again 'sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /rw/random'
say df 'df -k /rw | wc -l'
say append 'echo one > /rw/log; echo two >> /rw/log; cat /rw/log'
mkdir /rw/gone; touch /rw/gone/x; rm -r /rw/gone
cd /
say umount 'umount /rw /ro && echo yes'
say device 'mount -t virtiofs nothing /rw || echo yes'
say errors 'dmesg | grep -E "fuse|virtiofs" | grep -iE "error|fail|bad" || echo none'
"""


class Session:
    """What the guest said and what is in the folders, afterwards."""

    def __init__(self, folder: Path, kernel: Path) -> None:
        self.ro, self.rw = folder / "ro", folder / "rw"
        self.ro.mkdir()
        self.rw.mkdir()
        self.big = os.urandom(3 * MIB + 17)
        (self.ro / "big").write_bytes(self.big)
        volumes = [f"{self.rw}:/rw", f"{self.ro}:/ro:ro"]
        with kvmpy.Machine(kernel=kernel, volumes=volumes, exec=SCRIPT) as machine:
            machine.wait(LIMIT)
        self.text = machine.console.text
        lines = (line.split(": ", 1) for line in self.text.splitlines() if ": " in line)
        self.said = {line[0]: line[1].removesuffix(" -") for line in lines}


@pytest.fixture(scope="module")
def session(cloud: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("shares"), cloud)


def test_volumes_are_mounted(session: Session) -> None:
    assert session.said["mounts"] == "2", session.text
    assert session.said["df"] == "2"
    assert session.said["umount"] == "yes"
    assert session.said["device"].endswith("yes")
    assert session.said["errors"] == "none"


def test_read_only_volume_stays_as_it_is(session: Session) -> None:
    assert session.said["sum"] == hashlib.sha256(session.big).hexdigest()
    assert session.said["refused"].endswith("Read-only file system yes")
    assert session.said["remount"].endswith("yes")
    assert os.listdir(session.ro) == ["big"]
    assert (session.ro / "big").read_bytes() == session.big


def test_a_tree_is_the_same_on_both_sides(session: Session) -> None:
    tree = session.rw / "tree"

    assert (session.said["tar"], session.said["find"]) == ("same", "18")
    assert session.said["grep"] == "./a/b/file5 ./a/file5"
    assert (session.said["mv"], session.said["ln"]) == ("text 5", "2")
    assert (tree / "a/b/file6").read_text() == "text 5\n"
    assert (tree / "hard").stat().st_nlink == 2
    assert str((tree / "a/b/link").readlink()) == "../file1"
    assert stat.S_IMODE((tree / "a/file2").stat().st_mode) == 0o4751
    assert not (session.rw / "gone").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owners_are_the_guests(session: Session) -> None:
    status = (session.rw / "tree/a/file3").stat()

    assert (status.st_uid, status.st_gid) == (7, 8)


def test_data_comes_back_whole(session: Session) -> None:
    assert session.said["again"] == session.said["written"]
    assert hashlib.sha256((session.rw / "random").read_bytes()).hexdigest() == session.said["written"]
    assert (session.rw / "log").read_text() == "one\ntwo\n"
    assert session.said["deleted"] == "kept"


def test_links_and_special_files(session: Session) -> None:
    assert session.said["outside"] == "1"  # the guest's own file
    assert session.said["node"].endswith("Operation not permitted yes")
    assert session.said["fifo"].endswith("Operation not permitted yes")
    assert not (session.rw / "tree/disk").exists()


INIT = """#!/bin/busybox sh
echo; echo hello: $(/bin/busybox cat /var/run/src/hello)
echo kept > /out/new
/bin/busybox umount /out
/bin/busybox poweroff -f
"""


def test_a_system_on_a_disk_has_them_too(boot: Boot, cloud: Path, tmp_path: Path) -> None:
    mke2fs = shutil.which("mke2fs", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    busybox = initramfs.find_busybox()
    if mke2fs is None or busybox is None:
        pytest.skip("no mke2fs (package e2fsprogs), or no static busybox (busybox-static)")
    root, disk, out = tmp_path / "root", tmp_path / "disk", tmp_path / "out"
    for folder in ("bin", "sbin", "dev", "proc", "sys", "run", "var"):
        (root / folder).mkdir(parents=True)
    (root / "var/run").symlink_to("/run")
    shutil.copy(busybox, root / "bin/busybox")
    (root / "sbin/init").write_text(INIT)
    (root / "sbin/init").chmod(0o755)
    out.mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src/hello").write_text("from the host")
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", root, disk, "64M"], check=True)

    volumes = ("--volume", f"{tmp_path}/src:/var/run/src:ro", "--volume", f"{out}:/out")
    done = boot("-k", cloud, "--disk", disk, *volumes, "--transport", "pci")

    assert "hello: from the host" in done.stdout
    assert (out / "new").read_text() == "kept\n"
    assert done.status == 0
