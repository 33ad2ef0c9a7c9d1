"""Streams between programs of Linux and of the host (virtio/vsock.py)."""

from __future__ import annotations

import hashlib
import os
import queue
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kvmpy
from kvmpy.boot import initramfs
from kvmpy.virtio.vsock import LINGER, Vsock

LIMIT = 60.0  # seconds, for anything the guest does
CID = 42
ECHO, FLOOD, SINK, DEAF, NOBODY = range(5000, 5005)  # ports of the guest
OURS, PROGRAM = 1024, 1025  # ports of the host: of this process, of another one
SIZE = 4 << 20  # bytes of a large transfer
PATTERN = bytes(n % 251 for n in range(1 << 16))
MODULES = ["virtio_mmio", "virtio_pci", "vmw_vsock_virtio_transport"]


@pytest.fixture
def disk(cloud: Path, tmp_path: Path) -> Path:
    """An initramfs with a program for the guest's ends of streams."""
    source, program = Path(__file__).with_name("vsock_peer.c"), tmp_path / "peer"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    modules = cloud.parent.parent / "lib/modules" / cloud.name.removeprefix("vmlinuz-")
    data = initramfs.build(files=[(program, "/peer")], modules=MODULES, modules_dir=modules)
    (tmp_path / "initrd").write_bytes(data)
    return tmp_path / "initrd"


def ask(vm: kvmpy.Machine, command: str) -> str:
    """The output of `command` in the guest's shell."""
    vm.console.send(f"echo begin-$((6*7)); {command}; echo end-$((6*7))\n")
    vm.wait_for_console("begin-42\r\n", LIMIT)
    return vm.wait_for_console(r"(?s).*?end-42\r\n", LIMIT).removesuffix("end-42\r\n")


def wait_until(condition: Callable[[], bool], limit: float = LIMIT) -> bool:
    deadline = time.monotonic() + limit
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def connect(vsock: Vsock, port: int) -> socket.socket:
    stream = vsock.connect(port, timeout=LIMIT)
    stream.settimeout(LIMIT)
    return stream


def read_all(stream: socket.socket) -> bytes:
    data = b""
    while piece := stream.recv(1 << 20):
        data += piece
    return data


def fill_up(stream: socket.socket) -> int:
    """How many bytes go into a stream that nobody reads, until nothing more does for a second."""
    sent, last = 0, time.monotonic()
    stream.setblocking(False)
    while time.monotonic() < last + 1:
        try:
            sent += stream.send(bytes(1 << 16))
            last = time.monotonic()
        except BlockingIOError:
            time.sleep(0.02)
    return sent


def busy(seconds: float) -> float:
    """CPU seconds that this process takes in that time, its guest's left out as far as it halts."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_streams(cloud: Path, disk: Path, tmp_path: Path, transport: str) -> None:
    vsock = Vsock(CID, tmp_path / "v.sock")
    accepted: queue.Queue[socket.socket] = queue.Queue()
    vsock.listen(OURS, accepted.put)
    vm = kvmpy.Machine(kernel=cloud, initrd=disk, append="quiet", transport=transport)
    vm.add(vsock)
    program = socket.socket(socket.AF_UNIX)
    program.bind(f"{tmp_path}/v.sock_{PROGRAM}")
    program.listen(1)
    program.settimeout(LIMIT)

    with vm, program:
        vm.wait_for_console("# ", LIMIT)
        cid = ask(vm, f"/peer cid; /peer echo {ECHO}; /peer flood {FLOOD} {SIZE}; /peer sink {SINK}; /peer deaf {DEAF}")
        with pytest.raises(ConnectionRefusedError):
            connect(vsock, NOBODY)

        with connect(vsock, ECHO) as stream:
            stream.sendall(b"hello")
            echoes = [stream.recv(64)]
            stream.shutdown(socket.SHUT_WR)
            echoes.append(stream.recv(64))

        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(LIMIT)
            client.connect(str(tmp_path / "v.sock"))
            client.sendall(b"CONNECT %d\nhello" % ECHO)
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)

        with connect(vsock, FLOOD) as stream:
            flood = hashlib.sha256(read_all(stream)).digest()
        with connect(vsock, SINK) as stream:
            data = os.urandom(SIZE)
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            total = int(read_all(stream))

        refused = ask(vm, f"/peer call {NOBODY} </dev/null; echo $?")
        vm.console.send(f"echo question | /peer call {OURS}\n")
        with accepted.get(timeout=LIMIT) as stream:
            stream.settimeout(LIMIT)
            question = read_all(stream)
            stream.sendall(b"an-answer\n")
        vm.wait_for_console("an-answer\r\n", LIMIT)
        vm.console.send(f"echo question | /peer call {PROGRAM}\n")
        with program.accept()[0] as stream:
            stream.settimeout(LIMIT)
            second = read_all(stream)
            stream.sendall(b"another-answer\n")
        vm.wait_for_console("another-answer\r\n", LIMIT)

        many = [connect(vsock, ECHO) for _ in range(50)]
        for n, stream in enumerate(many):
            stream.sendall(b"%d" % n)
        numbers = [stream.recv(64) for stream in many]
        for stream in many:
            stream.close()

        with connect(vsock, DEAF) as stream:
            taken = fill_up(stream)
            idle = busy(2)
        ask(vm, "killall peer")
        ended = wait_until(lambda: not vsock._streams and not vsock._retired, 2 * LINGER)

    assert cid == f"{CID}\r\n"
    assert echoes == [b"hello", b""]
    assert answer.startswith(b"OK 1073741")
    assert answer.endswith(b"\nhello")
    assert flood == hashlib.sha256(PATTERN * (SIZE // len(PATTERN))).digest()
    assert total == sum(data)
    assert refused == "104\r\n"  # ECONNRESET
    assert (question, second) == (b"question\n", b"question\n")
    assert numbers == [b"%d" % n for n in range(50)]
    assert 0 < taken < 4 << 20
    assert idle < 0.3
    assert ended
