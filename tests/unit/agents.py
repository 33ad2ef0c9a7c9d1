"""The guest's agent as a process of this machine, on a UNIX socket."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvmpy.guest.client import Agent

GUESTS = Path(__file__).parents[2] / "guests"
LIMIT = 30.0  # seconds


class NativeAgent(Agent):
    """An agent that listens at `path`."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        super().__init__(self.connect)
        self.path = path
        self.process = process

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(LIMIT)
        try:
            connection.connect(str(self.path))
        except OSError:
            connection.close()
            raise
        return connection


def build(folder: Path) -> Path:
    binary = folder / "agent"
    subprocess.run(["make", "-s", "-C", GUESTS, "agent", f"AGENT={binary}"], check=True, timeout=LIMIT)
    return binary


def build_with_sanitizers(folder: Path) -> Path | None:
    """With what finds wrong accesses to memory, where the compiler has that."""
    binary = folder / "agent"
    sources = sorted((GUESTS / "agent").glob("*.c"))
    options = ["-std=gnu11", "-g", "-O1", "-DHOSTED", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run(["gcc", *options, "-o", binary, *sources], capture_output=True, timeout=LIMIT)
    return None if done.returncode else binary


@contextmanager
def running(binary: Path, folder: Path) -> Iterator[NativeAgent]:
    """What it says is in `folder`/says; its socket is there as well."""
    path = folder / "socket"
    with (folder / "says").open("wb") as says:
        process = subprocess.Popen([binary, path], stdin=subprocess.DEVNULL, stdout=says, stderr=says)
    agent = NativeAgent(path, process)
    try:
        agent.wait_until_ready(LIMIT)
        yield agent
    finally:
        process.kill()
        process.wait()


def has_ended(pid: int) -> bool:
    """Whether the process ends, now or soon; it may be a zombie."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        state = "X"
        with suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "XZ":
            return True
        time.sleep(0.01)
    return False
