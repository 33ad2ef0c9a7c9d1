"""Images as roots, as README.md has them: a container image, and a disk with partitions."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from command import KVMPY
from networks import LIMIT
from oci_images import Image, entry, folder, layer, link, write_archive

from kvmpy.boot import initramfs

README = Path(__file__).parents[2] / "README.md"
MIB = 1 << 20
APPLETS = ("sh", "cat", "id", "ls", "rm", "touch")


def readme(kind: str) -> str:
    """The example of this kind in the section."""
    match = re.search(r"^## Images as roots\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    assert match is not None
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", match[1], re.DOTALL | re.MULTILINE)
    return str(found)


@pytest.fixture(scope="module")
def busybox() -> Path:
    found = initramfs.find_busybox()
    if found is None:
        pytest.skip("no static busybox: install busybox-static")
    return found


def test_a_container_image(cloud: Path, environment: dict[str, str], busybox: Path, tmp_path: Path) -> None:
    """Entrypoint, Env, WorkingDir, User, whiteouts, owners, and what was written."""
    ann = {"uid": 1234, "gid": 77}
    script = b'#!/bin/sh\n[ -e /gone ] || [ "$SAID" != so ] || echo this is its entrypoint\nexec "$@"\n'
    base = layer(
        entry("bin/busybox", busybox.read_bytes(), mode=0o755),
        *(link(f"bin/{name}", "busybox") for name in APPLETS),
        entry("bin/entry", script, mode=0o755),
        entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nann:x:1234:77::/home/ann:/bin/sh\n"),
        entry("gone"),
    )
    home = layer(folder("home/ann", **ann), entry("home/ann/motd", b"welcome\n", mode=0o600, **ann), entry(".wh.gone"))
    image = Image(base, home, Entrypoint=["entry"], Env=["PATH=/bin", "SAID=so"], WorkingDir="/home/ann", User="ann")
    write_archive(tmp_path / "image.tar", image.docker_files())
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", readme(""), re.MULTILINE)
    variables = {"PATH": f"{Path(KVMPY).parent}:{os.environ['PATH']}"}

    outputs = [
        subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env=environment | variables,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
        ).stdout
        for command, _ in commands
    ]

    assert outputs == [expected for _, expected in commands]
    assert len(commands) == 2


def test_a_disk_with_partitions(cloud: Path, busybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mke2fs = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if mke2fs is None:
        pytest.skip("no mke2fs: install e2fsprogs")
    tree, disk = tmp_path / "tree", tmp_path / "disk.img"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    for name in APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    with disk.open("wb") as file:
        file.truncate(18 * MIB)
        file.seek(446)
        file.write(struct.pack("<4xB3xII", 0x83, MIB // 512, 17 * MIB // 512).ljust(64, b"\0") + b"\x55\xaa")
    options = ["-q", "-t", "ext4", "-E", f"offset={MIB}", "-d", tree]
    subprocess.run([mke2fs, *options, disk, "17M"], check=True, capture_output=True)
    before = disk.read_bytes()
    monkeypatch.chdir(tmp_path)

    done = subprocess.run([sys.executable, "-c", readme("python")], capture_output=True, text=True, timeout=LIMIT)

    assert (done.stdout, done.stderr, done.returncode) == ("A /new\n", "", 0)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["new"]
    assert disk.read_bytes() == before
