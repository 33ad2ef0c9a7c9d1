"""Networks of a Linux guest: passt with published ports, a tap interface with offloads, and their ends."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import signal
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
BYTES = 2 << 20  # of the file that is copied in and out


def load(name: str, kernel: Path) -> None:
    """Load a module of the emulated host, which has those of the `amd64` kernel but not at hand; else a no-op."""
    for module in kernel.parents[1].glob(f"lib/modules/{os.uname().release}/**/{name}.ko*"):
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


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


GUEST = """
ip link set eth0 up
ip addr add {guest}/24 dev eth0
ip route add default via {host}
ping -c 2 -w 20 {host} | grep -c ttl=
wget -q -O /tmp/data http://{host}:{port}/data
sha256sum /tmp/data
httpd -p 80 -h /tmp
while :; do echo udp-pong | nc -u -l -p 53 -w 60 >/tmp/udp; done &
echo ready-$((6*7))
while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
cat /tmp/udp
echo carrier-lost
"""


def ask_udp(address: tuple[str, int]) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT)
        client.sendto(b"udp-ping\n", address)
        return client.recv(100)


def test_user_network(cloud: Path, needs_passt: None, served: tuple[int, bytes], tmp_path: Path) -> None:
    """A file in, the same file out through a published port, UDP; then passt dies, and the guest sees no link."""
    port, data = served
    tcp, udp = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    net = Net(publish=f"127.0.0.1:{tcp}:80+127.0.0.1:{udp}:53/udp", mtu=1400, pcap=tmp_path / "capture")
    script = GUEST.format(guest="10.9.0.2", host="10.9.0.1", port=port) + "cat /sys/class/net/eth0/mtu"
    machine = kvmpy.Machine(kernel=cloud, modules=MODULES, exec=script)
    machine.add(net)

    with machine:
        machine.wait_for_console("ready-42", LIMIT)
        back = urllib.request.urlopen(f"http://127.0.0.1:{tcp}/data", timeout=LIMIT).read()
        answer = ask_udp(("127.0.0.1", udp))
        os.kill(net.backend.process.pid, signal.SIGKILL)
        stop = machine.wait(LIMIT)
    net.close()

    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    assert sha256(back) == sha256(data)
    assert answer == b"udp-pong\n"
    lines = machine.console.text.split("\r\n")
    assert lines[:2] == ["2", f"{sha256(data)}  /tmp/data"]
    assert lines[-5:] == ["ready-42", "udp-ping", "carrier-lost", "1400", ""]
    assert (tmp_path / "capture").stat().st_size > 2 * BYTES


def test_tap_with_offloads(cloud: Path, needs_tap: None, served: tuple[int, bytes]) -> None:
    """TCP in segments larger than a frame, both ways; then the interface is removed."""
    port, data = served
    net = Net("tap", name="kvmpy-test")
    script = "cat /sys/bus/virtio/devices/virtio0/features\n" + GUEST.format(
        guest="10.8.0.2", host="10.8.0.1", port=port
    )
    machine = kvmpy.Machine(kernel=cloud, modules=MODULES, exec=script)
    machine.add(net)

    with machine:
        for words in ("addr add 10.8.0.1/24 dev kvmpy-test", "link set kvmpy-test up"):
            subprocess.run(["ip", *words.split()], check=True)
        machine.wait_for_console("ready-42", LIMIT)
        back = urllib.request.urlopen("http://10.8.0.2/data", timeout=LIMIT).read()
        answer = ask_udp(("10.8.0.2", 53))
        subprocess.run(["ip", "link", "delete", "kvmpy-test"], check=True)
        stop = machine.wait(LIMIT)
    net.close()

    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0)
    assert sha256(back) == sha256(data)
    assert answer == b"udp-pong\n"
    lines = machine.console.text.split("\r\n")
    offered = {n for n, bit in enumerate(lines[0]) if bit == "1"}
    assert offered >= {0, 1, 5, 7, 8, 11, 12, 15, 16}
    assert lines[1:3] == ["2", f"{sha256(data)}  /tmp/data"]
    assert lines[-4:] == ["ready-42", "udp-ping", "carrier-lost", ""]
