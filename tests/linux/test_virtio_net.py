"""Networks of a Linux guest: passt with published ports, a tap interface with offloads, and their ends."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmpy
from kvmpy.core.errors import HostError
from kvmpy.host.passt import Passt
from kvmpy.host.tap import Tap
from kvmpy.virtio.net import Net

LIMIT = 150.0  # seconds, for anything the guest does
MODULES = ["virtio_mmio", "virtio_net"]
BYTES = 512 << 10  # of the file that is copied in and out
ORDINARY = 1514  # bytes of a full frame


def load(name: str, kernel: Path) -> None:
    """Load a module of the emulated host, which has those of the `amd64` kernel but not at hand; else a no-op."""
    for module in kernel.parents[1].glob(f"lib/modules/{os.uname().release}/kernel/drivers/net/{name}.ko*"):
        subprocess.run(["insmod", str(module)], check=True)


@pytest.fixture
def needs_passt(amd64: Path) -> None:
    """passt wants an interface with a default route: a host without any network gets one that leads nowhere."""
    if shutil.which("ip") and not subprocess.check_output(["ip", "route", "show", "default"]):
        load("dummy", amd64)
        for words in ("link add nowhere type dummy", "addr add 10.9.0.2/24 dev nowhere", "link set nowhere up",
                      "route add default via 10.9.0.1"):  # fmt: skip
            subprocess.run(["ip", *words.split()], check=True)
    try:
        Passt().close()
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def needs_tap(amd64: Path) -> None:
    if not Path("/dev/net/tun").exists():
        load("tun", amd64)
    try:
        Tap().close()
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """The port of an HTTP server on this host, and what it serves as `/data`."""
    data = os.urandom(BYTES)
    (tmp_path / "data").write_bytes(data)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], data
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


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
cat >/tmp/bound <<'EOF'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/${mask:-24} dev eth0
ip route add default via $router
echo $router >/tmp/router
EOF
chmod +x /tmp/bound
udhcpc -i eth0 -n -q -s /tmp/bound >/dev/null 2>&1
host=$(cat /tmp/router)
"""
STATIC = "host=10.8.0.1; ip addr add 10.8.0.2/24 dev eth0; ping -c 2 -w 20 $host | grep -c ttl="
# A file from the host, and a name; a server; then until there is no link: how many datagrams came to no one's port.
USE = """
wget -q -O /tmp/data http://$host:{port}/data
sha256sum /tmp/data
nslookup -port={dns} -type=a host.test $host | grep Address: | tail -n 1
httpd -p 80 -h /tmp
echo ready-$((6*7))
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
awk '/^Udp:/ {{ count = $3 }} END {{ print count, "for nobody" }}' /proc/net/snmp
"""


def send_udp(address: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"anybody there?", address)


def test_user_network(cloud: Path, needs_passt: None, served: tuple[int, bytes], dns: int, tmp_path: Path) -> None:
    """DHCP, a file in, the same file out through a published port, UDP; then passt dies, and the guest sees no link."""
    port, data = served
    tcp, udp = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    net = Net(publish=f"127.0.0.1:{tcp}:80+127.0.0.1:{udp}:7/udp", mtu=1400, pcap=tmp_path / "capture")
    script = "cat /sys/class/net/eth0/mtu; ip link set eth0 up" + DHCP + USE.format(port=port, dns=dns)
    machine = kvmpy.Machine(kernel=cloud, modules=MODULES, exec=script)
    machine.add(net)

    with machine:
        machine.wait_for_console("ready-42", LIMIT)
        send_udp(("127.0.0.1", udp))
        back = urllib.request.urlopen(f"http://127.0.0.1:{tcp}/data", timeout=LIMIT).read()
        assert isinstance(net.backend, Passt) and net.backend.process is not None
        net.backend.process.kill()
        stop = machine.wait(LIMIT)
    net.close()

    assert machine.console.text.splitlines() == [
        "1400", f"{sha256(data)}  /tmp/data", "Address: 192.0.2.7", "ready-42", "1 for nobody"
    ]  # fmt: skip
    assert sha256(back) == sha256(data)
    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    assert (tmp_path / "capture").stat().st_size > 2 * BYTES


def test_tap_with_offloads(cloud: Path, needs_tap: None, served: tuple[int, bytes], dns: int, tmp_path: Path) -> None:
    """TCP in segments larger than a frame, both ways; then the interface is removed."""
    port, data = served
    net = Net("tap", name="kvmpy-test", pcap=tmp_path / "capture")
    script = f"cat /sys/class/net/eth0/device/features; ip link set eth0 up; {STATIC}" + USE.format(port=port, dns=dns)
    machine = kvmpy.Machine(kernel=cloud, modules=MODULES, exec=script)
    machine.add(net)

    with machine:
        for words in ("addr add 10.8.0.1/24 dev kvmpy-test", "link set kvmpy-test up"):
            subprocess.run(["ip", *words.split()], check=True)
        machine.wait_for_console("ready-42", LIMIT)
        send_udp(("10.8.0.2", 7))
        back = urllib.request.urlopen("http://10.8.0.2/data", timeout=LIMIT).read()
        subprocess.run(["ip", "link", "delete", "kvmpy-test"], check=True)
        stop = machine.wait(LIMIT)
    net.close()

    features, *lines = machine.console.text.splitlines()
    assert {n for n, bit in enumerate(features) if bit == "1"} >= {0, 1, 5, 7, 8, 9, 11, 12, 13, 15, 16}
    assert lines == [
        "2", f"{sha256(data)}  /tmp/data", "Address: 192.0.2.7", "ready-42", "1 for nobody"
    ]  # fmt: skip
    assert sha256(back) == sha256(data)
    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    to_guest, from_guest = longest_frames(tmp_path / "capture", net.mac)
    assert min(to_guest, from_guest) > 2 * ORDINARY


def longest_frames(capture: Path, mac: bytes) -> tuple[int, int]:
    """The bytes of the longest frame to `mac` and from it, in a capture."""
    packets, at, sizes = capture.read_bytes(), 24, {True: 0, False: 0}
    while at < len(packets):
        size = int.from_bytes(packets[at + 8 : at + 12], "little")
        to_guest = packets[at + 16 : at + 22] == mac
        sizes[to_guest] = max(sizes[to_guest], size)
        at += 16 + size
    return sizes[True], sizes[False]
