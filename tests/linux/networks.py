"""What the tests of networks need on the host: interfaces, and servers for the guest."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvmpy.core.errors import HostError
from kvmpy.host.passt import Passt

LIMIT = 150.0  # seconds, for anything that a guest does
CONTROL = """Package: kvmpy-hello
Version: 1.0
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: says hello
"""


def load(name: str, kernel: Path) -> None:
    """Load a module of the emulated host, which has those of the `amd64` kernel but not at hand; else a no-op."""
    for module in kernel.parents[1].glob(f"lib/modules/{os.uname().release}/kernel/drivers/net/{name}.ko*"):
        subprocess.run(["insmod", str(module)], check=True)


def ip(*lines: str) -> None:
    """Run the host's `ip` with the words of each line."""
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


@pytest.fixture
def pingable(amd64: Path) -> str:
    """passt works here, and this address answers pings that go through it: the guest's own if no other does.

    passt wants an interface with a default route: a host without any network gets one that leads nowhere.
    """
    address = "127.0.0.1"
    if shutil.which("ip") and not subprocess.check_output(["ip", "route", "show", "default", "type", "unicast"]):
        load("dummy", amd64)
        ip("link set lo up", "link add nowhere type dummy", "addr add 10.9.0.2/24 dev nowhere", "link set nowhere up")
        ip("route add default via 10.9.0.1")
    if Path("/sys/class/net/nowhere").exists():
        address = "198.51.100.1"
        ip(f"addr replace {address}/32 dev lo")
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")  # what passt may do on most hosts
    try:
        Passt().close()
    except HostError as error:
        pytest.skip(str(error))
    return address


@contextmanager
def serve(folder: Path) -> Iterator[int]:
    """The port of an HTTP server on this host, for the files in `folder`."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[int]:
    """The port of an HTTP server with a repository for apt: `kvmpy-hello`, a program that says hello-42."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb")
    tree, served = tmp_path / "tree", tmp_path / "served"
    program = tree / "usr/bin/kvmpy-hello"
    for folder in (tree / "DEBIAN", program.parent, served):
        folder.mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(CONTROL)
    program.write_text("#!/bin/sh\necho hello-$((6*7))\n")
    program.chmod(0o755)
    words = ["dpkg-deb", "--root-owner-group", "--build", tree, served / "hello.deb"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    data = (served / "hello.deb").read_bytes()
    where = f"Filename: ./hello.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    (served / "Packages").write_text(CONTROL + where)
    with serve(served) as port:
        yield port


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Path]:
    """A socket for two network devices to connect to: what one of them sends the other one gets."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cable"))
        listener.listen(2)
        thread = threading.Thread(target=connect_two, args=[listener])
        thread.start()
        yield tmp_path / "cable"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)


def connect_two(listener: socket.socket) -> None:
    """Until one of them has gone; or nobody comes."""
    with suppress(OSError), listener.accept()[0] as one, listener.accept()[0] as other:
        back = threading.Thread(target=copy, args=[other, one])
        back.start()
        copy(one, other)
        back.join(LIMIT)


def copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
