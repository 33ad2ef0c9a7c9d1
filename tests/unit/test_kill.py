"""kill -9 at any moment: no cache has a corrupt entry, no half-made image is taken for whole, no disk is corrupt, and
no stale lock or socket is in the way of the next start.

KVMPY_KILLS=100 kills each victim so often; a few times by default. See kills.py for how to add a victim.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from disks import Disk
from kills import Victim, kill, script
from oci_images import Image, entry, layer, write_folder

from kvmpy import named, root
from kvmpy.boot import cache
from kvmpy.host.unix_socket import listen_at, remove
from kvmpy.oci import store

KILLS = int(os.environ.get("KVMPY_KILLS", "2"))
SCRIPTS = Path(__file__).parents[2] / "scripts"
PAGE = 4096
PAGES = 64

# Disks: a page has the number of the round that wrote it last, over and over; `flushed ROUND` is said when it is safe.

WRITER = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from disks import Disk
from kvmpy.virtio.blk import S, T
disk = Disk(Path(sys.argv[1]) / "disk.img", format={format!r})
print("ready", flush=True)
for number in range(1, 1 << 30):
    for page in (number % 64, number * 7 % 64, number * 31 % 64):
        assert disk.write(page * 8, number.to_bytes(8, "little") * 512) == S.OK
    assert disk.request(T.FLUSH)[0] == S.OK
    os.write(1, b"flushed %d\\n" % number)
"""


def writer(format: str) -> str:
    return WRITER.format(tests=str(Path(__file__).parent), format=format)


def make_raw(folder: Path) -> None:
    (folder / "disk.img").write_bytes(bytes(PAGE * PAGES))


def make_qcow2(folder: Path) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", folder / "disk.img"]
    subprocess.run([*command, str(PAGE * PAGES)], check=True)


def touched(number: int) -> tuple[int, ...]:
    """The pages that this round writes."""
    return number % 64, number * 7 % 64, number * 31 % 64


def check_pages(folder: Path, format: str, said: str) -> None:
    """Each page has what was flushed last, or what was written to it afterwards."""
    flushed = max((int(line.split()[1]) for line in said.splitlines() if line.startswith("flushed")), default=0)
    expected = [0] * PAGES
    for number in range(1, flushed + 1):
        for page in touched(number):
            expected[page] = number
    disk = Disk(folder / "disk.img", format=format)  # its lock went with the process
    try:
        for page in range(PAGES):
            content = disk.read(page * 8, 8)
            words = {int.from_bytes(content[at : at + 8], "little") for at in range(0, PAGE, 8)}
            later = {flushed + 1} if page in touched(flushed + 1) else set()
            assert words <= {expected[page]} | later, f"page {page}: {words}, flushed {flushed}"
    finally:
        disk.device.close()


def check_raw(folder: Path, said: str) -> None:
    assert (folder / "disk.img").stat().st_size == PAGE * PAGES
    check_pages(folder, "raw", said)


def check_qcow2(folder: Path, said: str) -> None:
    for _ in range(2):  # as it was left, and as it is after it was used again
        done = subprocess.run(["qemu-img", "check", folder / "disk.img"], capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: leaked clusters, and nothing else
        check_pages(folder, "qcow2", said)


# The cache of decompressed kernels.

CACHE = """
import sys
from kvmpy.boot import cache
print("ready", flush=True)
for number in range(1 << 30):
    source = memoryview(b"%d" % (number % 20))
    content = cache.recall(source, lambda: bytes(source) * 200000)
    assert content == bytes(source) * 200000
"""


def check_cache(folder: Path, said: str) -> None:
    entries = [path for path in cache.folder().glob("*") if len(path.name) == 64]
    for path in entries:
        content = cache._read(path)
        assert content is not None, f"{path} is damaged"
    for number in range(20):
        source = b"%d" % number
        assert cache.recall(memoryview(source), lambda source=source: source * 200000) == source * 200000  # type: ignore[misc]
    assert len(list(cache.folder().iterdir())) <= cache.KEEP


# Kernels and images that scripts fetch; what would take minutes is played by small programs.

FAKES = {
    "apt-cache": """case $1 in
depends) echo "  Depends: linux-image-6.1.0-1-amd64" ;;
show) echo "Version: 6.1.1-1" ;;
esac""",
    "apt-get": "echo package >linux-image.deb",
    "depmod": """for n in 1 2 3 4 5; do echo $n >>"$2/lib/modules/$3/modules.dep"; sleep 0.002; done""",
    "dpkg-deb": """mkdir -p "$3/boot" "$3/lib/modules/6.1.0-1-amd64" "$3/usr/share"
for n in 1 2 3 4 5; do echo $n >>"$3/boot/vmlinuz-6.1.0-1-amd64"; sleep 0.002; done""",
}
MAKE_IMAGE = """#!/bin/bash
set -e
for n in 1 2 3 4 5; do echo $n >>"$1.part"; sleep 0.002; done
cp "$1.part" "${1%.img}.vmlinuz"
cp "$1.part" "${1%.img}.initrd"
mv "$1.part" "$1"
"""
FIVE = "1\n2\n3\n4\n5\n"


def fakes(folder: Path) -> None:
    (folder / "bin").mkdir()
    (folder / "scripts").mkdir()
    for name, text in FAKES.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    for name in ("fetch-kernel", "fetch-image"):
        shutil.copy(SCRIPTS / name, folder / "scripts" / name)
    shutil.copytree(SCRIPTS / "lib", folder / "scripts" / "lib", ignore=shutil.ignore_patterns("bench"))
    (folder / "scripts" / "make-image").write_text(MAKE_IMAGE)
    (folder / "scripts" / "make-image").chmod(0o755)


def with_fakes(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")}


def fetching(*words: str) -> Victim:
    """A script that fetches something into the cache: whatever is there is whole, and the next call finishes it."""

    def command(folder: Path) -> list[str | Path]:
        return ["bash", "-c", 'echo ready; exec "$@"', "-", folder / "scripts" / words[0], *words[1:]]

    def check(folder: Path, said: str) -> None:
        where = folder / "cache" / "kvmpy"
        for found in [*where.glob("kernels/*/boot/vmlinuz-*"), *where.glob("images/debian*/root.*")]:
            assert found.read_text() == FIVE, f"{found} is not whole"
        for link in [*where.glob("kernels/*"), *where.glob("images/*")]:
            assert not link.is_symlink() or link.is_dir(), f"{link} leads nowhere"
        done = subprocess.run(
            list(command(folder)), capture_output=True, text=True, timeout=60, env=os.environ | with_fakes(folder)
        )
        assert done.returncode == 0, done.stderr
        result = Path(done.stdout.splitlines()[-1])
        files = [*result.glob("boot/vmlinuz-*"), *result.glob("lib/modules/*/modules.dep"), *result.glob("root.*")]
        assert len(files) in (2, 3)
        assert [path.read_text() for path in files] == [FIVE] * len(files)

    return Victim(" ".join(words), command, check, 0.15, fakes, with_fakes)


# What make-image puts in its place.

PUT = """
import importlib.util, sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path({script!r}).parent))
spec = importlib.util.spec_from_loader("make_image", SourceFileLoader("make_image", {script!r}))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
folder = Path(sys.argv[1])
print("ready", flush=True)
for number in range({times}):
    files = {{}}
    for name in ("root.vmlinuz", "root.initrd", "root.img"):
        (folder / "new").mkdir(exist_ok=True)
        (folder / "new" / name).write_text(str(number % 10) * 100000)
        files[folder / name] = folder / "new" / name
    module.put(files)
"""


def putting(times: int) -> str:
    return PUT.format(script=str(SCRIPTS / "make-image"), times=times)


def check_put(folder: Path, said: str) -> None:
    """An image is there only with the kernel and the initrd that go with it, all of them whole."""
    found = [
        path.read_text() for path in (folder / f"root.{end}" for end in ("img", "vmlinuz", "initrd")) if path.exists()
    ]
    assert all(len(text) == 100000 and len(set(text)) == 1 for text in found)
    if (folder / "root.img").exists():
        assert len(found) == 3
        assert len(set(found)) == 1
    subprocess.run([sys.executable, "-c", putting(1), folder], check=True, stdout=subprocess.DEVNULL)
    assert not list(folder.glob(".*.part"))


# Sockets.

SOCKETS = """
import sys
from pathlib import Path
from kvmpy.host.unix_socket import listen_at, remove
print("ready", flush=True)
while True:
    socket = listen_at(Path(sys.argv[1]) / "socket")
    socket.close()
    remove(Path(sys.argv[1]) / "socket")
"""


def check_socket(folder: Path, said: str) -> None:
    listener = listen_at(folder / "socket")
    assert stat.S_ISSOCK((folder / "socket").stat().st_mode)
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "socket"))
    remove(folder / "socket")
    assert not (folder / "socket").exists()


# The disks that container images become.

IMAGES = """
import sys
from kvmpy import named, root
from kvmpy.oci import store
store.KEEP = 1
print("ready", flush=True)
for number in range(1 << 30):
    root.find(f"{sys.argv[1]}/layout{number % 3}")
"""
HEAD = 1 << 20  # bytes: where all is that such a disk has


def make_layouts(folder: Path) -> None:
    for number in range(3):
        files = Image(
            layer(*(entry(f"{name}", b"%d" % number * 1000) for name in range(50))), Cmd=[str(number)]
        ).files()
        write_folder(folder / f"layout{number}", files)


def check_images(folder: Path, said: str) -> None:
    """An entry that is there is whole: the same image gives the same bytes again. What was half made goes with the next
    one."""
    entries = [path for path in store.folder().glob("*") if path.suffix == ".1"]
    kept = {path.name: _disk(path) for path in entries}
    for path in entries:
        path.rename(folder / path.name)
    for number in range(3):
        found = root.find(folder / f"layout{number}").disk.path.parent
        assert kept.get(found.name, _disk(found)) == _disk(found)
    assert not list(store.folder().glob("*.part"))
    assert len([path for path in store.folder().glob("*") if path.suffix == ".1"]) == 3


def _disk(entry: Path) -> tuple[int, bytes, str]:
    with (entry / "root.ext4").open("rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(HEAD), (entry / "config.json").read_text()


# Names of machines: one is taken, given facts, let go of and forgotten, over and over.

NAMES = """
import sys
from kvmpy import named
print("ready", flush=True)
while True:
    claim = named.claim("job")
    claim.note_owner()
    (claim.folder / "vsock").touch()
    claim.note(running=True)
    claim.note(status=3)
    claim.close()
    named.find("job").remove()
"""


def check_names(folder: Path, said: str) -> None:
    """Whatever is left is no machine that runs, and nobody's way is barred."""
    assert [machine.state for machine in named.all_of()] in ([], ["lost"], ["exited"])

    claim = named.claim("job")

    assert set(os.listdir(claim.folder)) == {"facts", "lock"}
    claim.close()
    named.find("job").remove()
    assert named.all_of() == []


VICTIMS = [
    Victim("raw disk", script(writer("raw")), check_raw, prepare=make_raw),
    Victim("qcow2 disk", script(writer("qcow2")), check_qcow2, prepare=make_qcow2),
    Victim(
        "payload cache",
        script(CACHE),
        check_cache,
        environment=lambda folder: {"XDG_CACHE_HOME": str(folder / "cache")},
    ),
    fetching("fetch-kernel", "amd64"),
    fetching("fetch-image"),
    Victim("make-image", script(putting(1 << 30)), check_put, 0.5),
    Victim("socket", script(SOCKETS), check_socket, 0.05),
    Victim("names", script(NAMES), check_names, 0.05, environment=lambda folder: {"XDG_RUNTIME_DIR": str(folder)}),
    Victim(
        "image cache",
        script(IMAGES),
        check_images,
        prepare=make_layouts,
        environment=lambda folder: {"XDG_CACHE_HOME": str(folder / "cache")},
    ),
]


@pytest.mark.parametrize("time", range(KILLS))
@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: str(victim.name))
def test_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: Victim, time: int) -> None:
    if victim.name == "qcow2 disk" and not shutil.which("qemu-img"):
        pytest.skip("no qemu-img: apt-get install qemu-utils")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    said = kill(victim, tmp_path, random.Random(f"{victim.name} {time}"))

    victim.check(tmp_path, said)
