"""`kvmpy` without machines: what `kvmpy run` starts is the agent as a process of this machine ($AGENT).

It is a program; its words are those of kvmpy. The socket of a named machine is served as by a Vsock.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from kvmpy import cli, sandbox
from kvmpy.cli import run
from kvmpy.console import Console
from kvmpy.core.board import Reason, Stop
from kvmpy.core.events import EventLoop
from kvmpy.guest.client import Agent
from kvmpy.host.vsocket import VsockListener

SECONDS = 30.0


class NativeSandbox(sandbox.Sandbox):
    """Has no machine. `KVMPY_TEST_START` in the environment is a file that it waits for when it starts."""

    def __init__(self, *, vsock: Path | None = None, endpoint: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self._path, self._endpoint = vsock, endpoint
        self.machine.stop = self._stop  # type: ignore[method-assign]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_locked_in = False

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def start(self, lock: Any = None) -> Self:
        gate = os.environ.get("KVMPY_TEST_START")
        while gate and not Path(gate).exists():
            threading.Event().wait(0.01)
        assert self._path is not None
        inner = self._path.with_name("agent")
        null = subprocess.DEVNULL
        words = [os.environ["AGENT"], inner]
        self._process = subprocess.Popen(words, process_group=0, stdin=null, stdout=null, stderr=null)
        self._path.with_name("agent.pid").write_text(str(self._process.pid))
        self._agent = Agent(lambda: _connect(inner))
        self._agent.wait_until_ready(SECONDS)
        self._loop = EventLoop("io", lambda error: os._exit(99))
        owner = type("Owner", (), {"lock": threading.Lock()})()
        self._listener = VsockListener(self._loop, self._path, lambda port, client: _join(client, inner), bool, owner)
        self._listener._room = lambda: True
        if self._endpoint is not None:
            console = self._endpoint(self._loop, Console(self._loop))
            console.write(b"hello from the console\n")
        self._loop.start()
        if lock is not None:  # as with a machine that has the host's files
            self._is_locked_in = True
            device = SimpleNamespace(reaches=True, folders=((Path("/"), False),), longest_file=0)
            board = SimpleNamespace(virtio_devices=lambda: [device])
            lock.lock_down(SimpleNamespace(board=board, config=SimpleNamespace(exec=None)))
        return self

    def _stop(self, why: Stop) -> None:
        self.stopped = why
        self._ended.set()

    def close(self) -> None:
        self.machine.stop(Stop(Reason.QUIT))
        if self._process is not None and not self._is_locked_in:  # else the test does it
            self._process.kill()
            self._process.wait()
            self._process = None
        self.machine.close()


def _connect(path: Path) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(SECONDS)
    stream.connect(str(path))
    return stream


def _join(client: socket.socket, inner: Path) -> None:
    """The client is connected to the agent."""
    agent = _connect(inner)
    client.setblocking(True)
    agent.setblocking(True)
    client.sendall(b"OK 1073741824\n")
    for ends in ((client, agent), (agent, client)):
        threading.Thread(target=_pump, args=ends, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):  # one of them has gone, perhaps without reading all
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    run.Sandbox = NativeSandbox  # type: ignore[misc]
    sys.exit(cli.main(sys.argv[1:]))
