"""A fresh Linux machine for commands: `Sandbox`.

    with kvmpy.Sandbox(mem="1G", volumes={"./src": "/src:ro"}) as sandbox:
        done = sandbox.run("python3", "-c", "print(6 * 7)", timeout=10)
        assert done.stdout == b"42\n"

It sees the host's own file system, and what it writes is forgotten with it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from subprocess import PIPE
from types import TracebackType
from typing import Any, Protocol, Self

from .config import MachineConfig
from .core import progress
from .core.board import Reason, Stop
from .core.errors import ConfigError, GuestLost
from .guest.client import Agent, Word
from .guest.process import Completed, Process
from .guest.protocol import PORT
from .machine import Machine
from .virtio.vsock import Vsock

START_SECONDS = 60.0  # from power-on to the agent: 0.3 on an idle host
CONNECT_SECONDS = 30.0  # for the guest's kernel to answer; longer than it ever takes, but for a guest that hangs
VERDICT_SECONDS = 2.0  # from a connection's end to that of the machine, if that is why
REPORTED = (Reason.PANIC, Reason.TRIPLE_FAULT, Reason.CRASH, Reason.ERROR)
HOST, NONE = "host", "none"
NETWORKS = (NONE, "user")


class Lock(Protocol):
    """What locks a process in that is nothing but one sandbox, and makes its crash report; as `kvmpy run` does."""

    def lock_down(self, machine: Machine) -> Callable[[str], None]: ...

    def report(self, machine: Machine, stop: Stop) -> tuple[str, str]: ...


class Sandbox:
    """A machine whose guest does nothing but what it is asked: `with Sandbox() as sandbox:` starts and ends it.

    cpus, mem, kernel, modules_dir   as for Machine
    root       where the guest's file system comes from: "host" (this host's), a folder, or "none" (what is in the
               initramfs: busybox). It is read-only; what the guest writes is kept in its memory
    volumes    folders besides: {host: guest} or {host: "guest:ro"}, or "host:guest[:ro]" each; without ro, the guest
               changes them
    network    "none", or "user": out through this host, without privileges
    publish    TCP ports of this host that lead into the guest, as [ip:]host:guest[/udp], or a number for both
    env        variables of all commands
    cwd, user  of all commands that name none; by default / and root
    start_timeout   seconds that the guest may take to be ready

    Its methods may be called from any thread. They raise GuestLost when the machine is gone; its `stop` and `report`
    tell why. The start raises what that of a Machine does, and GuestLost with stage "start".
    """

    def __init__(
        self,
        *,
        cpus: str | int = 1,
        mem: str | int = "512M",
        kernel: str | PathLike[str] | None = None,
        modules_dir: str | PathLike[str] | None = None,
        root: str | PathLike[str] = HOST,
        volumes: Mapping[str | PathLike[str], str] | Sequence[str] = (),
        network: str = NONE,
        publish: Sequence[str | int] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        start_timeout: float = START_SECONDS,
    ) -> None:
        if network not in NETWORKS:
            raise ConfigError(f'invalid network "{network}"', f"use {' or '.join(NETWORKS)}")
        words = []
        if network != NONE:
            from .virtio.user_net import IP_WORD  # takes as long as all the rest, for those who want it

            words = [IP_WORD]
        self.env, self.cwd, self.user = dict(env or {}), cwd, user
        self.stopped: Stop | None = None  # how the machine has ended, once it has
        self.report = ""  # and the crash report, if that was no orderly end
        self.ready_seconds = 0.0  # from power-on until the agent was there
        self._network = network
        self._published = [f"{port}:{port}" if isinstance(port, int) else port for port in publish]
        self._start_timeout = start_timeout
        self._vsock = Vsock()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None
        self._agent = Agent(_Door(self))
        self.files = self._agent.files
        self.machine = Machine(
            MachineConfig.of(
                kernel=kernel,
                modules_dir=modules_dir,
                mem=mem,
                cpus=cpus,
                append=words,
                agent=True,
                root="/" if root == HOST else None if root == NONE else root,
                volumes=_volumes(volumes),
            )
        )

    # Life.

    def __enter__(self) -> Self:
        return self if self._keeper is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, lock: Lock | None = None) -> Self:
        """Boot, and wait until commands can be run. With a `lock`, the process is locked in for good meanwhile."""
        if self._keeper is not None:
            raise ConfigError("this sandbox was started before", "make another one")
        try:
            with progress.working("starting a machine"):
                self._boot(lock)
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.monotonic() - self.machine.started_at
        return self

    def close(self) -> None:
        """End the machine and all that runs in it; safe to call twice."""
        self.machine.stop(Stop(Reason.QUIT))
        if self._keeper is not None:
            self._keeper.join()
        self.machine.close()

    # Commands.

    def run(
        self,
        *argv: Word,
        input: bytes | str | None = None,
        timeout: float | None = None,
        check: bool = False,
        stderr: int = PIPE,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        **options: Any,
    ) -> Completed:
        """Run a command to its end and return its `returncode`, `stdout`, `stderr` and `duration`.

        Raises CommandError when it cannot be started, TimedOut after `timeout` seconds, and with `check` CommandFailed
        when its status is not 0. Other options are those of Agent.run.
        """
        data = input.encode() if isinstance(input, str) else input
        how = self._how(env, cwd, user) | options
        return self._agent.run(argv, input=data, timeout=timeout, check=check, stderr=stderr, **how)

    def popen(
        self,
        *argv: Word,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        **options: Any,
    ) -> Process:
        """Start a command, as subprocess.Popen does. Other options are those of Agent.popen: tty, rlimits, umask."""
        how = self._how(env, cwd, user) | options
        return self._agent.popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, **how)

    # The machine.

    def publish(self, port: str | int) -> None:
        """Lead a port of this host into the guest, as the option of that name; before the start."""
        if self._keeper is not None:
            raise ConfigError("ports are published before a sandbox starts", "give it publish=[...]")
        self._published.append(f"{port}:{port}" if isinstance(port, int) else port)

    def logs(self) -> str:
        """What the guest's console has said: nothing, but for a kernel in distress."""
        return self.machine.console.text

    def metrics(self) -> dict[str, float]:
        """What the machine has used: seconds since power-on, until it was ready, and of the host's CPUs; bytes of RAM
        that it has, and that the host has really given for it."""
        machine = self.machine
        fd = machine.memory.fd
        return {
            "seconds": time.monotonic() - machine.started_at,
            "ready_seconds": self.ready_seconds,
            "cpu_seconds": sum(vcpu.cpu_seconds() for vcpu in machine.vcpus),
            "memory": machine.config.mem,
            "memory_used": os.fstat(fd).st_blocks * 512 if fd >= 0 else machine.config.mem,
        }

    def pause(self) -> None:
        """Let the guest stand still; whoever waits for a command then waits for `resume`."""
        self.machine.pause()

    def resume(self) -> None:
        self.machine.resume()

    # Inside.

    def _boot(self, lock: Lock | None) -> None:
        machine = self.machine
        machine.add(self._vsock)
        if self._network != NONE:
            from .virtio.user_net import UserNet

            machine.add(UserNet("+".join(self._published)))
        elif self._published:
            raise ConfigError("ports cannot be published without a network", 'give network="user" (--net user)')
        self._vsock.listen(PORT, self._greeted)
        machine.start(None if lock is None else lambda: lock.lock_down(machine))
        self._keeper = threading.Thread(target=self._keep, args=(lock,), name="kvmpy-keeper", daemon=True)
        self._keeper.start()
        if not self._ready.wait(self._start_timeout):
            raise self._start_failed(f"the guest was not ready within {self._start_timeout:g} s")
        if self.stopped is not None:
            raise self._start_failed(f"the guest did not start: {self.stopped}")

    def _how(self, env: Mapping[str, str] | None, cwd: str | None, user: str | None) -> dict[str, Any]:
        return {
            "env": self.env | dict(env or {}),
            "cwd": self.cwd if cwd is None else cwd,
            "user": self.user if user is None else user,
        }

    def _greeted(self, stream: socket.socket) -> None:
        """The agent says that it is there (guests/PROTOCOL.md); on the event loop."""
        stream.close()
        self._ready.set()

    def _keep(self, lock: Lock | None) -> None:
        """Wait for the machine's end; then tell those who wait for the guest, whatever goes wrong meanwhile."""
        machine = self.machine
        stop: Stop | None = None
        try:
            stop = machine.wait()
            if stop.reason in REPORTED:
                self.report = crash_report(machine, stop) if lock is None else lock.report(machine, stop)[0]
        except BaseException as error:  # the thread's last guard: who waits for the guest would wait for ever
            stop = stop or Stop(Reason.ERROR, f"{type(error).__name__}: {error}", cause=error)
            self.report = self.report or f"no report: {type(error).__name__}: {error}"
        self.stopped = stop
        self._ended.set()
        with self._vsock.lock:
            self._vsock.reset()
        self._ready.set()

    def _start_failed(self, what: str) -> GuestLost:
        said = [line for line in self.logs().splitlines() if line.strip()]
        error = GuestLost(what + (f": {said[-1].strip()}" if said else ""))
        error.stage, error.stop, error.report = "start", self.stopped, self.report
        return error


def crash_report(machine: Machine, stop: Stop) -> str:
    from . import report  # needed when something is wrong

    return report.crash_report(machine, stop)


class _Door:
    """How the agent is reached, and why it is not."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def __call__(self) -> socket.socket:
        """A connection to the agent; raises OSError."""
        if self._sandbox.stopped is not None or self._sandbox._keeper is None:
            raise ConnectionRefusedError("the sandbox does not run")
        return self._sandbox._vsock.connect(PORT, CONNECT_SECONDS)

    def lost(self, what: str, remedy: str = "") -> GuestLost:
        """The error for a connection that has ended: a lost machine, if that is why."""
        sandbox = self._sandbox
        if sandbox._keeper is None or not sandbox._ended.wait(VERDICT_SECONDS) or sandbox.stopped is None:
            return GuestLost(what, remedy)
        error = GuestLost(f"the guest is lost: {sandbox.stopped}")
        error.stop, error.report = sandbox.stopped, sandbox.report
        return error


def _volumes(volumes: Mapping[str | PathLike[str], str] | Sequence[str]) -> list[str]:
    """As MachineConfig has them."""
    if isinstance(volumes, Mapping):
        return [f"{fspath(host)}:{guest}" for host, guest in volumes.items()]
    return list(volumes)
