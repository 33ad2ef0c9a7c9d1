"""A fresh Linux machine for commands: `Sandbox`.

    with kvmpy.Sandbox(mem="1G", volumes={"./src": "/src:ro"}) as sandbox:
        done = sandbox.run("python3", "-c", "print(6 * 7)", timeout=10)
        assert done.stdout == b"42\n"

It sees the host's own file system, or an image's, and what it writes is forgotten with it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from subprocess import PIPE
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from .config import MachineConfig
from .core import progress
from .core.board import Reason, Stop
from .core.errors import ConfigError, GuestLost, NotFoundError
from .guest.client import Agent, Word
from .guest.completed import Completed
from .guest.process import Process
from .guest.protocol import PORT
from .machine import Machine
from .virtio.vsock import Vsock

if TYPE_CHECKING:
    from .guest.changes import Change
    from .host.published import PublishedPort
    from .machine import MakeEndpoint
    from .oci.manifest import Config

START_SECONDS = 60.0  # from power-on to the agent: 0.3 on an idle host
CONNECT_SECONDS = 30.0  # for the guest's kernel to answer; longer than it ever takes, but for a guest that hangs
VERDICT_SECONDS = 2.0  # from a connection's end to that of the machine, if that is why
KEPT_TIMES = 4  # the guest's memory: what `keep` copies at most, since hard links become files, and holes content
REPORTED = (Reason.PANIC, Reason.TRIPLE_FAULT, Reason.CRASH, Reason.ERROR)
LOG_LIMIT = 64 << 20  # bytes
ANY = "0.0.0.0"  # all addresses of this host
HOST, NONE = "host", "none"
NETWORKS = (NONE, "user")


class Lock(Protocol):
    """What locks a process in that is nothing but one sandbox, and makes its crash report; as `kvmpy run` does."""

    def lock_down(self, machine: Machine) -> Callable[[str], None]: ...

    def report(self, machine: Machine, stop: Stop) -> tuple[str, str]: ...


class Sandbox:
    """A machine whose guest does nothing but what it is asked: `with Sandbox() as sandbox:` starts and ends it.

    cpus, mem, kernel, modules_dir   as for Machine
    root       where the guest's file system comes from: "host" (this host's), a folder, a disk image, a container image
               (an OCI layout, what `docker save` writes, or "oci:NAME" from a registry), or "none" (what is in the
               initramfs: busybox). It is only read; what the guest writes is kept in its memory
    root_limit how large a container image may be when it is unpacked; pull: when "oci:NAME" is asked for in its
               registry: "missing" (if it is not here), "always" or "never"
    volumes    folders besides: {host: guest} or {host: "guest:ro"}, or "host:guest[:ro]" each; without ro, the guest
               changes them
    network    "none", or "user": out through this host, without privileges
    publish    ports of this host that lead into the guest, as [ip:]host:guest[/udp], or a number for both; with a
               host of 0, one that is free. UDP only with network="user". See the method
    env        variables of all commands, besides those of a container image
    cwd, user  of all commands that name none; by default those of the container image, else / and root
    vsock      a UNIX socket, which is made, for other processes that want to reach ports of the guest, as the option
               `path` of virtio-vsock
    endpoint   makes the host's end of the console, as for Machine, instead of `log`
    start_timeout   seconds that the guest may take to be ready
    log        a file that is to have what the guest's console says, the first 64 MiB of it, and at the end the crash
               report if there is one

    Its methods may be called from any thread. They raise GuestLost when the machine is gone; its `stop` and `report`
    tell why, its `log` where more is. The start raises what that of a Machine does, and GuestLost with stage "start".
    """

    def __init__(
        self,
        *,
        cpus: str | int = 1,
        mem: str | int = "512M",
        kernel: str | PathLike[str] | None = None,
        modules_dir: str | PathLike[str] | None = None,
        root: str | PathLike[str] = HOST,
        root_limit: str | int = "16G",
        pull: str = "missing",
        volumes: Mapping[str | PathLike[str], str] | Sequence[str] = (),
        network: str = NONE,
        publish: Sequence[str | int] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        vsock: str | PathLike[str] | None = None,
        endpoint: MakeEndpoint | None = None,
        start_timeout: float = START_SECONDS,
        log: str | PathLike[str] | None = None,
    ) -> None:
        if network not in NETWORKS:
            raise ConfigError(f'invalid network "{network}"', f"use {' or '.join(NETWORKS)}")
        words = []
        if network != NONE:
            from .virtio.user_net import IP_WORD  # takes as long as all the rest, for those who want it

            words = [IP_WORD]
        self.env, self.cwd, self.user = dict(env or {}), cwd, user
        self.image: Config | None = None  # how a container image wants to be run, from `prepare` on
        self.stopped: Stop | None = None  # how the machine has ended, once it has
        self.report = ""  # and the crash report, if that was no orderly end
        self.ready_seconds = 0.0  # from power-on until the agent was there
        self._root = None if root in (HOST, NONE) or _is_folder(root) else root
        self._root_limit, self._pull = root_limit, pull
        self._network = network
        self._published = list(map(_forward, publish))
        self._ports: list[PublishedPort] = []
        self._log = "" if log is None else fspath(log)
        self._start_timeout = start_timeout
        self._vsock = Vsock(path=None if vsock is None else Path(vsock))
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._life = threading.RLock()  # while it starts or ends
        self._awake = threading.Event()  # unless the machine is paused
        self._awake.set()
        self._keeper: threading.Thread | None = None
        self._door = _Door(self)
        self._agent = Agent(self._door)
        self.files = self._agent.files
        self.machine = Machine(
            MachineConfig.of(
                kernel=kernel,
                modules_dir=modules_dir,
                mem=mem,
                cpus=cpus,
                append=words,
                agent=True,
                root="/" if root == HOST else None if root == NONE or self._root is not None else root,
                volumes=_volumes(volumes),
            ),
            endpoint=endpoint or (_into(self._log) if self._log else None),
        )

    # Life.

    def __enter__(self) -> Self:
        return self if self._keeper is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self) -> None:
        """Have the image of the root at hand, which `start` does otherwise; raises what kvmpy.root.find raises."""
        folder = self.machine.config.root
        if folder is not None and not Path(folder).exists():
            raise NotFoundError(f"there is no {folder}", "give --root a folder or an image that exists")
        if self._root is None:
            return
        from .root import find  # with what images take

        found = find(self._root, limit=self._root_limit, pull=self._pull)
        self._root = None
        self.machine.add(found.disk)
        self.image = found.image
        if found.image is not None:
            self.env = dict(found.image.env) | self.env
            self.cwd, self.user = self.cwd or found.image.cwd, self.user or found.image.user

    def start(self, lock: Lock | None = None) -> Self:
        """Boot, and wait until commands can be run. With a `lock`, the process is locked in for good meanwhile."""
        if self._keeper is not None:
            raise ConfigError("this sandbox was started before", "make another one")
        with self._life:
            try:
                self.prepare()
                with progress.working("starting a machine"):
                    self._boot(lock)
            except BaseException:
                self.close()
                raise
        self.ready_seconds = time.monotonic() - self.machine.started_at
        return self

    def wait(self, timeout: float | None = None) -> Stop | None:
        """Wait until the machine has ended, and say how; None when it has not in `timeout` seconds."""
        self._ended.wait(timeout)
        return self.stopped

    def close(self) -> None:
        """End the machine and all that runs in it; safe to call twice, and from any thread: a start that is under way
        fails."""
        self.machine.stop(Stop(Reason.QUIT))
        self._awake.set()
        with self._life:
            for port in self._ports:
                port.close()
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

        Raises CommandError when it cannot be started, TimedOut after `timeout` seconds, TooLarge when it writes more
        than `limit` bytes (64 MiB) to stdout or stderr, and with `check` CommandFailed when its status is not 0. In the
        first three cases nothing of it runs any more. Other options are those of Agent.run.
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

    # What was written.

    def diff(self) -> tuple[Change, ...]:
        """What commands have changed of the root, by path; each is `kind` (A, C or D) and `path`, which `str` joins.

        Raises ConfigError with root="none". Volumes are not in it, nor /dev, /proc and /sys.
        """
        return self.files.changes(*self._not_changed())

    def keep(self, host: str | PathLike[str]) -> list[str]:
        """Copy what commands have changed of the root to a new or empty folder of the host, with a file `.wh.NAME` for
        each NAME that was deleted; returns what had to be left out, a line each. Modes lose all but rwxr-xr-x.

        Raises also ConfigError and HostError for the folder.
        """
        from pathlib import Path

        from .guest.changes import Keeper

        keeper = Keeper(Path(host), KEPT_TIMES * self.machine.config.mem)
        try:
            self.files.changes(*self._not_changed(), keep=keeper)
        finally:
            keeper.close()
        return keeper.left_out

    # The machine.

    def publish(self, port: str | int) -> int:
        """Lead a port of this host into the guest, as the option of that name; the host's port.

        Once the sandbox runs, and without a network before that too, connections go through the agent to the guest's
        loopback interface: TCP alone, and a program that listens at 127.0.0.1 is enough. Raises ConfigError, GuestLost.
        """
        text = _forward(port)
        if self.stopped is not None:
            raise self._door.lost("the sandbox does not run")
        if self._keeper is not None:
            (opened,) = self._open_ports([text])
            opened.start()
            return opened.port
        from .host.passt import parse_forwards

        (forward,) = parse_forwards(text)
        self._published.append(text)
        return forward.host

    def logs(self) -> str:
        """What the guest's console has said: nothing, but for a kernel in distress."""
        return self.machine.console.text

    def metrics(self) -> dict[str, float]:
        """What the machine has used: seconds since power-on, until it was ready, and of the host's CPUs; bytes of RAM
        that it has, and that the host has really given for it."""
        machine = self.machine
        return {
            "seconds": time.monotonic() - machine.started_at,
            "ready_seconds": self.ready_seconds,
            "cpu_seconds": sum(vcpu.cpu_seconds() for vcpu in machine.vcpus),
            "memory": machine.config.mem,
            "memory_used": machine.memory.resident(),
        }

    def pause(self) -> None:
        """Let the guest stand still; whoever waits for a command then waits for `resume`."""
        self._awake.clear()
        self.machine.pause()

    def resume(self) -> None:
        self.machine.resume()
        self._awake.set()

    # Inside.

    def _boot(self, lock: Lock | None) -> None:
        machine = self.machine
        machine.add(self._vsock)
        if self._network != NONE:
            from .virtio.user_net import UserNet

            machine.add(UserNet("+".join(self._published)))
        else:
            self._open_ports(self._published)
        self._vsock.listen(PORT, self._greeted)
        machine.start(None if lock is None else lambda: lock.lock_down(machine))
        self._keeper = threading.Thread(target=self._keep, args=(lock,), name="kvmpy-keeper", daemon=True)
        self._keeper.start()
        if not self._ready.wait(self._start_timeout):
            raise self._start_failed(f"the guest was not ready within {self._start_timeout:g} s")
        if self.stopped is not None:
            raise self._start_failed(f"the guest did not start: {self.stopped}")
        for port in self._ports:
            port.start()

    def _open_ports(self, texts: Sequence[str]) -> list[PublishedPort]:
        """Raises ConfigError, for those that cannot be had or parsed."""
        if not texts:
            return []
        from .host.passt import parse_forwards
        from .host.published import PublishedPort

        opened = []
        for forward in parse_forwards("+".join(texts), lowest=0):
            if forward.kind != "tcp":
                raise ConfigError(
                    f"udp port {forward.host} cannot be published without a network card",
                    'give network="user" (--net user) and publish=[...] from the start',
                )
            dial = partial(self._agent.dial, forward.guest, CONNECT_SECONDS)
            opened.append(PublishedPort(dial, forward.host, forward.ip or ANY))
            self._ports.append(opened[-1])
        return opened

    def _how(self, env: Mapping[str, str] | None, cwd: str | None, user: str | None) -> dict[str, Any]:
        return {
            "env": self.env | dict(env or {}),
            "cwd": self.cwd if cwd is None else cwd,
            "user": self.user if user is None else user,
        }

    def _not_changed(self) -> tuple[list[str], list[str]]:
        ours = [] if self._network == NONE else ["/etc/resolv.conf"]
        return ours, [volume.guest for volume in self.machine.config.volumes]

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
        if self.report and self._log:
            with suppress(OSError), open(self._log, "a") as log:
                log.write(f"\n{self.report}\n")
        self.stopped = stop
        self._ended.set()
        with self._vsock.lock:
            self._vsock.reset()
        self._ready.set()

    def _start_failed(self, what: str) -> GuestLost:
        said = [line for line in self.logs().splitlines() if line.strip()]
        error = GuestLost(what + (f": {said[-1].strip()}" if said else ""))
        error.stage, error.stop, error.report = "start", self.stopped, self.report
        error.log = self._log
        return error


def crash_report(machine: Machine, stop: Stop) -> str:
    from . import report  # needed when something is wrong

    return report.crash_report(machine, stop)


class _Door:
    """How the agent is reached, and why it is not."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def __call__(self) -> socket.socket:
        """A connection to the agent, once the machine is not paused; raises OSError."""
        sandbox = self._sandbox
        while True:
            sandbox._awake.wait()
            try:
                return self._connect(CONNECT_SECONDS)
            except TimeoutError:
                if sandbox._awake.is_set():
                    raise

    def within(self, seconds: float) -> socket.socket:
        """A connection to the agent, or TimeoutError; raises OSError."""
        return self._connect(min(seconds, CONNECT_SECONDS) if self._sandbox._awake.is_set() else seconds)

    def _connect(self, seconds: float) -> socket.socket:
        if self._sandbox.stopped is not None or self._sandbox._keeper is None:
            raise ConnectionRefusedError("the sandbox does not run")
        return self._sandbox._vsock.connect(PORT, seconds)

    def lost(self, what: str, remedy: str = "") -> GuestLost:
        """The error for a connection that has ended: a lost machine, if that is why."""
        sandbox = self._sandbox
        if sandbox._keeper is None or not sandbox._ended.wait(VERDICT_SECONDS) or sandbox.stopped is None:
            return GuestLost(what, remedy)
        error = GuestLost(f"the guest is lost: {sandbox.stopped}")
        error.stop, error.report = sandbox.stopped, sandbox.report
        error.log = sandbox._log
        return error


def _is_folder(root: str | PathLike[str]) -> bool:
    from .root import is_folder  # with what most do without

    return is_folder(root)


def _into(log: str) -> MakeEndpoint:
    """The console's end in a file."""
    from .host.endpoint import File

    return lambda loop, console: File(loop, log, console.sent, LOG_LIMIT)


def _forward(port: str | int) -> str:
    return f"{port}:{port}" if isinstance(port, int) else port


def _volumes(volumes: Mapping[str | PathLike[str], str] | Sequence[str]) -> list[str]:
    """As MachineConfig has them."""
    if isinstance(volumes, Mapping):
        return [f"{fspath(host)}:{guest}" for host, guest in volumes.items()]
    return list(volumes)
