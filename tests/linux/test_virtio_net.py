"""Networks of a Linux guest: passt with published ports, a tap interface with offloads, and their ends."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from networks import ip, load, serve

import kvmpy
from kvmpy.boot import initramfs, kernels
from kvmpy.host.passt import Passt
from kvmpy.virtio.net import Net

LIMIT = 150.0  # seconds, for anything the guest does
MODULES = ["virtio_mmio", "virtio_net"]
BYTES = 512 << 10  # of the file that is copied in and out
ORDINARY = 1514  # bytes of a full frame
CLONE_NEWNET = 0x40000000  # <linux/sched.h>


@pytest.fixture
def tap(amd64: Path) -> Iterator[str]:
    """A tap interface, with an address, in a network namespace of its own, which the test's thread is in."""
    if not Path("/dev/net/tun").exists():
        load("tun", amd64)
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as outside:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        try:
            ip("tuntap add kvmpy-test mode tap", "addr add 10.8.0.1/24 dev kvmpy-test", "link set kvmpy-test up")
            yield "kvmpy-test"
        finally:
            libc.setns(outside.fileno(), CLONE_NEWNET)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """The port of an HTTP server on this host, and what it serves as `/data`."""
    data = os.urandom(BYTES)
    (tmp_path / "data").write_bytes(data)
    with serve(tmp_path) as port:
        yield port, data


@pytest.fixture
def dns() -> Iterator[int]:
    """The port of a server on this host that answers one question for an IPv4 address, with 192.0.2.7."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 0))
        server.settimeout(LIMIT)
        threading.Thread(target=answer_one, args=[server], daemon=True).start()
        yield server.getsockname()[1]


def answer_one(server: socket.socket) -> None:
    query, asker = server.recvfrom(512)
    head = query[:2] + bytes.fromhex("8180 0001 0001 0000 0000")  # a response: one question, one answer (RFC 1035, 4.1)
    server.sendto(head + query[12:] + bytes.fromhex("c00c 0001 0001 00000001 0004 c0000207"), asker)


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# What the guest's busybox says when it got an address, in DHCP.
DHCP = """
ip link set lo up
cat >/tmp/bound <<'EOF'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/${mask:-24} dev $interface
ip route add default via $router
echo $router >/tmp/router
EOF
chmod +x /tmp/bound
get_address() { ip link set $1 up; udhcpc -i $1 -n -q -s /tmp/bound >/dev/null 2>&1; host=$(cat /tmp/router); }
"""
# A server for UDP port 7, which gives back what it gets in capitals.
SHOUT = r"""
perl -e 'socket(S, 2, 2, 17); bind(S, pack("Sna4x8", 2, 7, "\0" x 4)) or die;
         while ($from = recv(S, $data, 2000, 0)) { send(S, uc $data, 0, $from) }' &
"""
# A file from the host, a name, pings; two servers; then until there is no link.
USE = """
wget -q -O /tmp/data http://$host:{port}/data
sha256sum /tmp/data
nslookup -port={dns} -type=a host.test $host | grep Address: | tail -n 1
ping -c 2 -w 20 {ping} | grep -c ttl=
httpd -p 80 -h /tmp
echo ready-$((6*7))
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
echo no link
"""


def with_perl(kernel: Path, script: str, folder: Path) -> kvmpy.Machine:
    """A machine that runs `script`, with this host's perl besides busybox."""
    perl = Path(shutil.which("perl") or pytest.skip("no perl"))
    modules = kernels.modules_dir_for(kernel)
    files = [(perl, "/bin/perl")]
    data = initramfs.build(exec=script, files=files, modules=MODULES, modules_dir=modules)
    (folder / "initrd").write_bytes(data)
    return kvmpy.Machine(kernel=kernel, initrd=folder / "initrd", append="quiet loglevel=1")


def ask_udp(address: tuple[str, int], question: bytes) -> bytes:
    """The answer of a UDP server, which gets a few tries to begin."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT / 10)
        client.connect(address)
        for _ in range(10):
            with suppress(OSError):  # no answer; ICMP: nobody there
                client.send(question)
                return client.recv(2000)
    return b"nobody answers"


def test_user_network(cloud: Path, pingable: str, served: tuple[int, bytes], dns: int, tmp_path: Path) -> None:
    """DHCP, a file in, ping; the same file out and UDP by published ports; then passt dies: the guest sees no link."""
    port, data = served
    tcp, udp = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    net = Net(publish=f"127.0.0.1:{tcp}:80+127.0.0.1:{udp}:7/udp", mtu=1400, pcap=tmp_path / "capture")
    use = USE.format(port=port, dns=dns, ping=pingable)
    machine = with_perl(cloud, f"cat /sys/class/net/eth0/mtu{DHCP}get_address eth0{SHOUT}{use}", tmp_path)
    machine.add(net)

    with machine:
        machine.wait_for_console("ready-42", LIMIT)
        shouted = ask_udp(("127.0.0.1", udp), b"anybody there?")
        back = urllib.request.urlopen(f"http://127.0.0.1:{tcp}/data", timeout=LIMIT).read()
        assert isinstance(net.backend, Passt)
        assert net.backend.process is not None
        net.backend.process.kill()
        stop = machine.wait(LIMIT)

    assert machine.console.text.splitlines() == [
        "1400", f"{sha256(data)}  /tmp/data", "Address: 192.0.2.7", "2", "ready-42", "no link"
    ]  # fmt: skip
    assert (sha256(back), shouted) == (sha256(data), b"ANYBODY THERE?")
    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    assert (tmp_path / "capture").stat().st_size > 2 * BYTES


def test_tap_with_offloads(cloud: Path, tap: str, served: tuple[int, bytes], dns: int, tmp_path: Path) -> None:
    """Ping, UDP and TCP in segments larger than a frame, all of it both ways; then the interface is removed."""
    port, data = served
    net = Net("tap", name=tap, pcap=tmp_path / "capture")
    use = USE.format(port=port, dns=dns, ping="$host")
    address = "ip link set eth0 up; host=10.8.0.1; ip addr add 10.8.0.2/24 dev eth0"
    script = f"cat /sys/class/net/eth0/device/features; {address}{SHOUT}{use}"
    machine = with_perl(cloud, script, tmp_path)
    machine.add(net)

    with machine:
        machine.wait_for_console("ready-42", LIMIT)
        words = [initramfs.find_busybox() or "busybox", "ping", "-c", "2", "-w", "20", "10.8.0.2"]
        pings = subprocess.run(words, capture_output=True, text=True).stdout
        shouted = ask_udp(("10.8.0.2", 7), b"anybody there?")
        back = urllib.request.urlopen("http://10.8.0.2/data", timeout=LIMIT).read()
        ip(f"link delete {tap}")
        stop = machine.wait(LIMIT)

    features, *lines = machine.console.text.splitlines()
    assert {n for n, bit in enumerate(features) if bit == "1"} >= {0, 1, 5, 7, 8, 9, 11, 12, 13, 15, 16}
    assert lines == [
        f"{sha256(data)}  /tmp/data", "Address: 192.0.2.7", "2", "ready-42", "no link"
    ]  # fmt: skip
    assert (sha256(back), shouted, pings.count("ttl=")) == (sha256(data), b"ANYBODY THERE?", 2)
    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    to_guest, from_guest = longest_frames(tmp_path / "capture", net.mac)
    assert min(to_guest, from_guest) > ORDINARY


# The one that serves, and the one that asks: first over the cable, then its second card gets a link.
LEFT = f"""
ip link set eth0 up; ip addr add 10.7.0.1/24 dev eth0
head -c {BYTES} /dev/urandom >/tmp/data; sha256sum /tmp/data
httpd -p 80 -h /tmp
echo ready-$((6*7))
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
echo no link
"""
RIGHT = """
ip link set eth0 up; ip addr add 10.7.0.2/24 dev eth0; ip link set eth1 up
for nic in eth0 eth1; do (cd /sys/class/net/$nic; echo $nic $(cat address mtu carrier)); done
ping -c 2 -w 20 10.7.0.1 | grep -c ttl=
wget -q -O /tmp/data http://10.7.0.1/data; sha256sum /tmp/data
echo waiting-$((6*7))
until [ "$(cat /sys/class/net/eth1/carrier)" = 1 ]; do sleep 0.1; done
"""


def test_two_guests_and_two_networks(cloud: Path, pingable: str, served: tuple[int, bytes], cable: Path) -> None:
    """One on each transport, on a cable between them; the second card of one leads to the host, from when it has a
    link."""
    port, data = served
    left = kvmpy.Machine(kernel=cloud, mem="256M", transport="pci", exec=LEFT)
    left.add(Net("socket", path=cable, mac="02:00:00:00:07:01"))
    fetch = f"wget -q -O /tmp/data http://$host:{port}/data; sha256sum /tmp/data"
    right = kvmpy.Machine(kernel=cloud, mem="256M", exec=f"{DHCP}{RIGHT}get_address eth1; {fetch}")
    right.add(Net("socket", path=cable, mac="02:00:00:00:07:02", mtu=1300))
    user = Net(mac="02:00:00:00:07:03", link=False)
    right.add(user)

    with left:
        left.wait_for_console("ready-42", LIMIT)
        with right:
            right.wait_for_console("waiting-42", LIMIT)
            with user.lock:
                user.set_link(True)
            stop = right.wait(LIMIT)
        left.wait(LIMIT)

    shared, *rest = left.console.text.splitlines()
    assert rest == ["ready-42", "no link"]
    assert right.console.text.splitlines() == [
        "eth0 02:00:00:00:07:02 1300 1", "eth1 02:00:00:00:07:03 1500 0", "2", shared, "waiting-42",
        f"{sha256(data)}  /tmp/data",
    ]  # fmt: skip
    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)


def longest_frames(capture: Path, mac: bytes) -> tuple[int, int]:
    """The bytes of the longest frame to `mac` and from it, in a capture."""
    packets, at, sizes = capture.read_bytes(), 24, {True: 0, False: 0}
    while at < len(packets):
        size = int.from_bytes(packets[at + 8 : at + 12], "little")
        to_guest = packets[at + 16 : at + 22] == mac
        sizes[to_guest] = max(sizes[to_guest], size)
        at += 16 + size
    return sizes[True], sizes[False]
