"""A Debian with systemd, made by scripts/make-image, lives on a virtio disk: either transport, either initrd."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import KVMPY, Boot, Command, Start, wait_until

from kvmpy.boot import cache

LIMIT = "600"  # seconds for all of the guest: an emulated host needs a third of that
ROOT = "root=LABEL=kvmpy-root"  # the label that make-image gives
MIB = 1 << 20

# What runs in systemd's place where the question is only how Linux gets there. The words behind `--` are its arguments.
PROBE = """#!/bin/sh
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
echo "root $(findmnt -no SOURCE,FSTYPE,OPTIONS / | cut -d, -f1)"
echo "$1" >>/root/kept
"$1"
mount -o remount,ro /
poweroff -ff
"""

# Traffic between the network cards has to leave the guest: each is in a network of its own.
EVERYTHING = """#!/bin/sh
for d in /sys/bus/virtio/devices/*; do echo "bound $(basename $(readlink $d/driver)) $(cat $d/status)"; done
for d in /sys/block/vd?; do echo "disk $(basename $d) $(cat $d/serial)"; done
echo "cards $(cat /sys/class/net/eth0/address /sys/class/net/eth1/address | xargs)"
echo "random $(head -c 4096 /dev/hwrng | wc -c) $(cat /sys/class/misc/hw_random/rng_current)"
echo "console $(cat /sys/class/tty/console/active)"
for name in /sys/class/virtio-ports/*/name; do device=/dev/$(basename $(dirname $name)); done
exec 3<>$device  # once: what comes before a close is thrown away by Linux
echo "from the guest" >&3
read -r answer <&3
exec 3>&-
echo "port $(cat $name): $answer"
for n in $(seq 100); do
    inflated=$(sed -n 's/^balloon_inflate //p' /proc/vmstat)
    [ "$inflated" -ge 16384 ] && break
    sleep 0.1
done
echo "balloon $inflated"
dd if=/dev/vdb of=/dev/vdb bs=1M count=1 seek=1 conv=notrunc,fsync 2>/dev/null
ip netns add other
ip link set eth1 netns other
ip addr add 10.1.1.1/24 dev eth0
ip link set eth0 up
ip -n other addr add 10.1.1.2/24 dev eth1
ip -n other link set eth1 up
ping -c 3 -i 0.2 -W 5 10.1.1.2
"""


@pytest.fixture(scope="module")
def debian() -> Path:
    """The folder of the image, as scripts/fetch-image has made it."""
    folder = cache.folder().with_name("images") / "debian"
    if not (folder / "root.img").exists():
        pytest.skip("no Debian image: run scripts/fetch-image")
    return folder


@pytest.fixture(scope="module")
def disk(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the image, which all tests write to."""
    copy = tmp_path_factory.mktemp("disk") / "root.img"
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


def put(disk: Path, name: str, script: str) -> None:
    """Make `script` the program /usr/local/bin/`name` in a file system that is not mounted."""
    source = disk.with_name(name)
    source.write_text(script)
    target = f"/usr/local/bin/{name}"
    for request in (f"rm {target}", f"write {source} {target}", f"set_inode_field {target} mode 0100755"):
        tool("debugfs", "-w", "-R", request, disk)


def kept(disk: Path) -> str:
    """What the boots so far have left on the disk, which must be clean."""
    tool("fsck.ext4", "-fn", disk)
    return tool("debugfs", "-R", "cat /root/kept", disk)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Path]:
    """A socket for --device virtio-console: somebody connects to it, waits for a line and answers."""
    path = tmp_path / "agent"
    heard: list[bytes] = []

    def answer() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            wait_until(lambda: client.connect_ex(str(path)) == 0, "the socket of the port")
            heard.append(client.recv(64))
            client.sendall(b"from the host\n")
            client.recv(1)  # until it is hung up

    thread = threading.Thread(target=answer)
    thread.start()
    yield path
    thread.join()
    assert heard == [b"from the guest\n"]


def test_debians_own_initrd_finds_the_disk_on_pci(boot: Boot, debian: Path, disk: Path) -> None:
    put(disk, "probe", PROBE)

    done = boot(
        *(debian / "root.vmlinuz", "--initrd", debian / "root.initrd", "--disk", disk, "--transport", "pci"),
        *("--append", f"{ROOT} rw init=/usr/local/bin/probe loglevel=4 -- true"),
    )

    assert done.status == 0, done
    assert "root /dev/vda ext4   rw" in done.stdout
    assert kept(disk).endswith("true\n")


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_everything_together(
    boot: Boot, cloud: Path, disk: Path, tmp_path: Path, cable: Path, agent: Path, transport: str
) -> None:
    """Our initramfs, two disks, two network cards, entropy, a balloon, console and port: all of them work at once."""
    put(disk, "probe", PROBE)
    put(disk, "everything", EVERYTHING)
    data = tmp_path / "data.img"
    data.write_bytes(bytes(range(256)) * (MIB // 256) + bytes(MIB))

    done = boot(
        *("-k", cloud, "--transport", transport, "--console", "virtio", "--mem", "512M"),
        *("--disk", f"{disk},serial=first", "--disk", f"{data},serial=second"),
        *("--net", f"socket={cable},mac=02:00:00:00:00:01", "--net", f"socket={cable},mac=02:00:00:00:00:02"),
        *("--device", "virtio-rng", "--device", "virtio-balloon,target=64M"),
        *("--device", f"virtio-console,port=org.example.agent,path={agent}"),
        *("--append", "root=/dev/vda rw init=/usr/local/bin/probe loglevel=4 -- everything"),
    )
    text = done.stdout.replace("\r", "")

    assert done.status == 0, done
    assert "root /dev/vda ext4   rw" in text
    assert "EXT4-fs (vda): couldn't mount" not in text
    assert sorted(re.findall(r"^bound (\w+) 0x0000000f", text, re.MULTILINE)) == [
        "virtio_balloon", "virtio_blk", "virtio_blk", "virtio_console", "virtio_console",
        "virtio_net", "virtio_net", "virtio_rng",
    ]  # fmt: skip
    assert re.findall(r"^disk (.*)", text, re.MULTILINE) == ["vda first", "vdb second"]
    assert "cards 02:00:00:00:00:01 02:00:00:00:00:02\n" in text
    assert "random 4096 virtio_rng.0\n" in text
    assert re.search(r"^console .*\bhvc0\n", text, re.MULTILINE)
    assert "port org.example.agent: from the host\n" in text
    assert re.search(r"^balloon 1638[4-9]$", text, re.MULTILINE)
    assert "3 packets transmitted, 3 received" in text, text
    assert data.read_bytes() == bytes(range(256)) * (2 * MIB // 256)
    assert kept(disk).endswith("everything\n")
