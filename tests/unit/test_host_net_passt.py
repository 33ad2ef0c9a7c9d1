"""passt as a child process: what is published, how it starts, and how it ends."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.core.errors import ConfigError, HostError
from kvmpy.host.passt import Address, Forward, Passt, parse_forwards

SECONDS = 30.0
GUEST = bytes.fromhex("020000000001")


def why_not() -> str:
    """Why passt does not run on this host; empty when it does."""
    try:
        Passt().close()
    except HostError as error:
        return str(error)
    return ""


needs_passt = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def passt() -> Iterator[Passt]:
    passt = Passt()
    yield passt
    passt.close()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(passt: Passt) -> None:
    poll = select.poll()
    poll.register(passt, select.POLLIN)
    assert poll.poll(1000 * SECONDS)


@pytest.mark.parametrize(
    ("text", "forwards"),
    [
        ("8080:80", [Forward(None, 8080, 80)]),
        ("8080:80/tcp", [Forward(None, 8080, 80)]),
        ("127.0.0.1:53:5353/udp", [Forward("127.0.0.1", 53, 5353, "udp")]),
        ("[::1]:1:65535+2:2", [Forward("::1", 1, 65535), Forward(None, 2, 2)]),
        ("1:1+1:1/udp", [Forward(None, 1, 1), Forward(None, 1, 1, "udp")]),
    ],
)
def test_what_is_published(text: str, forwards: list[Forward]) -> None:
    assert parse_forwards(text) == forwards


@pytest.mark.parametrize(
    "text",
    ["", "80", "80:", ":80", "0:80", "80:65536", "80:0", "99999:1", "80:80/sctp", "80:80+", "x:80:80", "1.2.3:80:80",
     "256.0.0.1:80:80", "[::g]:80:80", "::1:80:80", "8_0:80", "٨:80", "80:80,90:90", "80:1+80:2"],
)  # fmt: skip
def test_what_cannot_be_published(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot publish .*; use ") as caught:
        parse_forwards(text)

    assert "\n" not in str(caught.value)


def test_port_in_use(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot publish tcp port {taken} of 127.0.0.1: Address already in use; pub"):
        Forward("127.0.0.1", taken, 80).check()


def test_port_of_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is another one than for a port that is in use."""

    def bind(probe: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "bind", bind)

    with pytest.raises(ConfigError, match=r"tcp port 80: Permission denied; publish one from 1024 on, or .*sysctl"):
        Forward(None, 80, 80).check()


def test_address_of_another_host() -> None:
    with pytest.raises(ConfigError, match=r"cannot publish udp port 53 of 192.0.2.99: Cannot assign requested address"):
        Forward("192.0.2.99", 53, 53, "udp").check()


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(HostError, match="passt, which `user` networking needs, is not installed; apt install passt"):
        Passt()


def test_passt_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho 'No routable interface, exiting' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with pytest.raises(HostError, match="passt does not start: No routable interface; it needs"):
        Passt()


@needs_passt
def test_says_the_address_that_the_guest_is_to_have() -> None:
    passt = Passt(address=Address("10.7.8.9", 24, "10.7.8.1", "10.7.8.2"))
    assert passt.process is not None
    words = Path(f"/proc/{passt.process.pid}/cmdline").read_text().split("\0")
    passt.close()

    assert "--address 10.7.8.9 --netmask 24 --gateway 10.7.8.1 --dns-forward 10.7.8.2" in " ".join(words)


@needs_passt
def test_answers_arp(passt: Passt) -> None:
    """It claims every address but the guest's own."""
    sender = bytes.fromhex("0001 0800 06 04 0001") + GUEST + bytes([10, 99, 0, 2])
    request = bytes.fromhex("ffffffffffff") + GUEST + bytes.fromhex("0806") + sender + bytes(6) + bytes([10, 99, 0, 1])

    assert passt.send([request])
    answer = b""
    while answer[12:14] != request[12:14]:  # it advertises IPv6 routes besides
        wait_for(passt)
        answer = bytes(passt.receive() or b"")

    assert (answer[:6], answer[20:22], answer[28:32]) == (GUEST, b"\0\2", bytes([10, 99, 0, 1]))  # a reply, to us


@needs_passt
def test_temporary_folder_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As libpam-tmpdir makes them: what is nobody, as passt is where root starts it, cannot enter."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    Passt().close()


@needs_passt
def test_published_port_is_open() -> None:
    port = free_port()
    passt = Passt(parse_forwards(f"127.0.0.1:{port}:80"))

    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass
    passt.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), SECONDS)


@needs_passt
def test_end_of_passt_is_an_error(passt: Passt) -> None:
    process = passt.process
    assert process is not None
    process.kill()
    wait_for(passt)

    with pytest.raises(HostError, match="passt has ended with status -9"):
        passt.receive()


@needs_passt
def test_ends_with_us() -> None:
    """Even when there is no time to say goodbye."""
    code = "from kvmpy.host.passt import Passt; p = Passt(); print(p.process.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        ended = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)

    poll = select.poll()
    poll.register(ended, select.POLLIN)
    assert poll.poll(1000 * SECONDS)
    os.close(ended)


@needs_passt
def test_ends_with_us_when_it_has_just_been_started() -> None:
    """It must not wait for us to look whether it is ready."""
    code = "from kvmpy.host.passt import Passt; import os, time; kill = lambda self, process, ready: "
    code += "(print(process.pid, flush=True), time.sleep(0.1), os.kill(os.getpid(), 9)); Passt._await = kill; Passt()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
    (left,) = Path(tempfile.gettempdir()).glob(f"kvmpy-passt-{parent.pid}-*")  # all that is
    shutil.rmtree(left)
    try:
        ended = os.pidfd_open(number)
    except ProcessLookupError:
        return

    poll = select.poll()
    poll.register(ended, select.POLLIN)
    if not poll.poll(5000):
        os.kill(number, signal.SIGKILL)
        pytest.fail("passt still runs")
    os.close(ended)
