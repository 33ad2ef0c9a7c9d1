"""The file systems that images become, as e2fsck and debugfs see them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from kvmpy.core.errors import ImageError
from kvmpy.oci.ext4 import Ext4
from kvmpy.oci.tree import Node, Tree

TOOLS = {
    name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for name in ("e2fsck", "debugfs")
}
pytestmark = pytest.mark.skipif(None in TOOLS.values(), reason="no e2fsck and debugfs: install e2fsprogs")
LIMIT = 1 << 34


class Disk:
    """A file system in the making, in a file; `finish` writes it and lets e2fsck look at it."""

    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, Tree(1_000_000)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.writer = Ext4(self.fd, LIMIT)

    def file(self, name: str, data: bytes = b"", mode: int = 0o644) -> Node:
        node = Node(stat.S_IFREG | mode)
        self.writer.add([data], node)
        self.tree.put(name.encode(), node)
        return node

    def link(self, name: str, target: bytes) -> None:
        node = Node(stat.S_IFLNK | 0o777)
        node.target = target
        self.tree.put(name.encode(), node)

    def finish(self) -> None:
        self.writer.finish(self.tree, b"name")
        os.close(self.fd)
        done = subprocess.run([TOOLS["e2fsck"], "-fn", self.path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout

    def ask(self, request: str) -> str:
        done = subprocess.run([TOOLS["debugfs"], "-R", request, self.path], capture_output=True, text=True, timeout=60)
        return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "disk")


def test_an_empty_one(disk: Disk) -> None:
    disk.finish()

    assert disk.ask("ls -p /").split() == ["/2/040755/0/0/.//", "/2/040755/0/0/..//"]


def test_attributes(disk: Disk) -> None:
    node = disk.file("su", b"x" * 5000, 0o4755)
    node.uid, node.gid, node.mtime = 70000, 100001, 5_000_000_000 * 10**9 + 7  # in 2128
    node.xattrs = {"security.capability": b"\1\0\0\2" + bytes(16)}
    large = disk.file("large")
    large.xattrs = {"user.large": b"v" * 3000, "user.empty": b"", "security.z": b"1"}
    device = Node(stat.S_IFBLK | 0o660)
    device.rdev = (259, 300)
    disk.tree.put(b"device", device)
    disk.tree.root.xattrs = {"user.root": b"r" * 200}
    disk.finish()

    told = disk.ask("stat /su")
    assert "Mode:  04755" in told
    assert "User: 70000   Group: 100001" in told
    assert "Size: 5000" in told
    assert "mtime: 0x2a05f200:0000001d" in told
    assert "security.capability (20) = 01 00 00 02" in told
    assert "user.large (3000)" in disk.ask("ea_list /large")
    assert "user.empty (0)" in disk.ask("ea_list /large")
    assert "user.root (200)" in disk.ask("ea_list /")
    assert "major/minor number: 259:300" in disk.ask("stat /device")


def test_content_of_files_and_links(disk: Disk) -> None:
    disk.file("etc/one", b"one\n")
    disk.tree.link(b"two", b"etc/one")
    disk.link("short", b"etc/one")
    disk.link("long", b"l" * 200)
    disk.finish()

    assert disk.ask("cat /two") == "one\n"
    assert "Links: 2" in disk.ask("stat /two")
    assert 'Fast link dest: "etc/one"' in disk.ask("stat /short")
    assert disk.ask("cat /long") == "l" * 200


def test_many_files_in_one_folder_and_deep_folders(disk: Disk) -> None:
    for number in range(3000):
        disk.file(f"many/{'n' * (number % 200)}{number}", b"%d" % number)
    disk.file("d/" * 200 + "end", b"deep")
    disk.finish()

    assert disk.ask(f"cat /many/{'n' * 199}2999") == "2999"
    assert disk.ask("cat /" + "d/" * 200 + "end") == "deep"


def test_more_files_than_fit_into_the_groups_that_their_content_needs(disk: Disk) -> None:
    disk.tree.root.children = {b"%d" % number: (Node(stat.S_IFREG | 0o644), 0) for number in range(40_000)}
    disk.finish()

    assert "Size: 0" in disk.ask("stat /39999")


def test_files_of_many_extents_with_holes(disk: Disk) -> None:
    node = Node(stat.S_IFREG | 0o644)
    disk.writer.add([*([bytes(1 << 20)] * 520), b"end"], node)
    disk.tree.put(b"sparse", node)
    disk.finish()

    assert f"Size: {(520 << 20) + 3}" in disk.ask("stat /sparse")
    assert disk.path.stat().st_blocks * 512 < 4 << 20


def test_what_was_replaced_takes_no_room(disk: Disk) -> None:
    disk.file("a", b"x" * 10_000_000)
    disk.file("b", b"b")
    disk.file("a", b"y")
    disk.finish()

    assert disk.ask("cat /a") == "y"
    assert disk.path.stat().st_blocks * 512 < 1 << 20


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    disks = [Disk(tmp_path / name) for name in "ab"]
    for disk in disks:
        disk.file("f", b"x")
        disk.finish()

    first, second = (subprocess.check_output(["head", "-c", "2M", disk.path]) for disk in disks)
    assert first == second
    assert first.count(0) < len(first)


def test_attributes_that_ext4_has_no_room_for(disk: Disk) -> None:
    disk.file("f").xattrs = {"user.huge": bytes(5000)}

    with pytest.raises(ImageError, match="more than 4 KiB"):
        disk.writer.finish(disk.tree, b"name")


def test_more_names_than_a_file_may_have(disk: Disk) -> None:
    node = disk.file("f")
    disk.tree.root.children |= {b"%d" % number: (node, 0) for number in range(65_000)}

    with pytest.raises(ImageError, match="65001 names"):
        disk.writer.finish(disk.tree, b"name")
