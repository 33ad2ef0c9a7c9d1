"""Networking without privileges through passt, a process that stands between a guest and the host's sockets."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..core.errors import ConfigError, HostError
from ..core.record import Record
from .netsocket import FrameStream

LOOK_MS = 1  # between two looks whether it is ready
START_SECONDS = 10.0  # for passt to be ready: 0.03 on an idle machine
END_SECONDS = 1.0  # for passt to notice that its socket is closed, or to become a process that has ended
ROOTS_TEMPORARY = "/tmp"  # where nobody can get to, too; TMPDIR may name a folder that only root enters
WORDS = 4096  # bytes of what passt says that are looked at
NOISE = re.compile(r"Failed to send \d+ bytes to syslog|Don't run as root.*|No external routable interface for IPv6")
FORWARD = re.compile(
    r"(?:(?P<ip>\[[0-9A-Fa-f:.]+\]|[0-9.]+):)?(?P<host>\d{1,5}):(?P<guest>\d{1,5})(?:/(?P<kind>tcp|udp))?", re.ASCII
)
PRIVILEGED = "publish one from 1024 on, or lower the limit: sudo sysctl net.ipv4.ip_unprivileged_port_start=80"
REMEDY = "use [IP:]HOST:GUEST[/udp], several of them with +"


class Forward(Record, frozen=True):
    """Port `host` of the host's address `ip` (all of them: None) leads to port `guest` of the guest."""

    ip: str | None
    host: int
    guest: int
    kind: str = "tcp"

    def __str__(self) -> str:
        """As passt wants it."""
        return f"{self.ip}/{self.host}:{self.guest}" if self.ip else f"{self.host}:{self.guest}"

    def check(self) -> None:
        """Raises ConfigError when the host's port cannot be had: in use, not ours, no such address."""
        version = ipaddress.ip_address(self.ip or "0.0.0.0").version
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM if self.kind == "udp" else socket.SOCK_STREAM) as probe:
            if self.kind == "tcp":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.ip or "", self.host))
                if self.kind == "tcp":
                    probe.listen(1)
            except OSError as error:
                where = f" of {self.ip}" if self.ip else ""
                remedy = PRIVILEGED if error.errno == errno.EACCES else "publish another one"
                raise ConfigError(
                    f"cannot publish {self.kind} port {self.host}{where}: {error.strerror}", remedy
                ) from None


def parse_forwards(text: str, lowest: int = 1) -> list[Forward]:
    """`[ip:]host:guest[/udp]`, several joined by `+`; an IPv6 address stands in brackets. `lowest` is the host's lowest
    port: with 0, any may be had. Raises ConfigError."""
    found: dict[tuple[str | None, int, str], Forward] = {}
    for part in text.split("+"):
        match = FORWARD.fullmatch(part)
        if not match:
            raise ConfigError(f'cannot publish "{part}"', REMEDY)
        ip, host, guest = match["ip"], int(match["host"]), int(match["guest"])
        if not (lowest <= host <= 0xFFFF and 0 < guest <= 0xFFFF):
            raise ConfigError(f'cannot publish "{part}": ports are 1 to 65535', REMEDY)
        if ip is not None:
            ip = ip.strip("[]")
            try:
                ipaddress.ip_address(ip)
            except ValueError:
                raise ConfigError(f'cannot publish "{part}": {ip} is no IP address', REMEDY) from None
        forward = Forward(ip, host, guest, match["kind"] or "tcp")
        if found.setdefault((ip, host, forward.kind), forward) != forward:
            raise ConfigError(f'cannot publish "{part}": {forward.kind} port {host} is published already', REMEDY)
    return list(found.values())


class Address(Record, frozen=True):
    """What a guest is told: its own address in a network of `bits`, the gateway's, and the name server's."""

    ip: str
    bits: int
    gateway: str
    nameserver: str

    def words(self) -> list[str]:
        """As passt wants it."""
        return [
            *("--address", self.ip, "--netmask", str(self.bits), "--gateway", self.gateway),
            *("--dns-forward", self.nameserver),
        ]


class Passt(FrameStream):
    """A NetBackend that is a passt of our own.

    It needs no privileges (as root it becomes nobody), and ends as soon as its socket is closed, whatever way we end:
    no PR_SET_PDEATHSIG, which would end it with the thread that started it, and which is void once it is nobody.
    """

    def __init__(
        self, forwards: Sequence[Forward] = (), mtu: int | None = None, address: Address | None = None
    ) -> None:
        """Without `address`, the guest gets the host's own. Raises HostError when passt is missing or does not start,
        ConfigError when a port cannot be had."""
        program = shutil.which("passt")
        if program is None:
            raise HostError("passt, which `user` networking needs, is not installed", "apt install passt")
        for forward in forwards:
            forward.check()
        command = [program, "--foreground", "--quiet", *_ports(forwards)]
        command += ["--mtu", str(mtu)] if mtu is not None else []
        command += address.words() if address is not None else []
        self.process: subprocess.Popen[bytes] | None = None
        near, far = socket.socketpair()
        super().__init__(near, "passt")
        self._words, words = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a passt that says too much must not wait for us
        try:
            where = None if os.geteuid() else ROOTS_TEMPORARY
            with tempfile.TemporaryDirectory(prefix=f"kvmpy-passt-{os.getpid()}-", dir=where) as folder:
                Path(folder).chmod(0o711)  # it opens the file as nobody, where it was started as root
                ready = Path(folder, "ready")  # no pipe: it would wait for ever for one who was killed to read it
                ready.touch()
                ready.chmod(0o622)
                self.process = subprocess.Popen(
                    [*command, "--fd", str(far.fileno()), "--pid", str(ready)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    pass_fds=[far.fileno()],
                    start_new_session=True,  # a Ctrl-C at the terminal is not for it
                )
                self._await(self.process, ready)
        except OSError as error:
            self.close()
            raise HostError(f"cannot start passt: {error.strerror}") from None
        except BaseException:
            self.close()
            raise
        finally:
            far.close()
            os.close(words)

    def close(self) -> None:
        super().close()
        if self.process is not None:
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(PermissionError):  # locked in; then it stays until init has it
                    self.process.kill()
                    self.process.wait()
            self.process = None
        if self._words >= 0:
            os.close(self._words)
            self._words = -1

    def _await(self, process: subprocess.Popen[bytes], ready: Path) -> None:
        """Until it has written its process id, which it does when all is set up; raises HostError."""
        ended = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            deadline = time.monotonic() + START_SECONDS
            while not (happened := poll.poll(LOOK_MS)) and not ready.stat().st_size and time.monotonic() < deadline:
                pass
        finally:
            os.close(ended)
        if not ready.stat().st_size:
            why = self._last_words() or ("it ended" if happened else f"nothing happened for {START_SECONDS:g} s")
            raise HostError(
                f"passt does not start: {why}",
                "it needs an interface with a default route; try it by hand: passt --foreground",
            )

    def _broken(self, why: str) -> HostError:
        """Its socket has failed: most likely, it has ended."""
        try:
            status = self.process.wait(END_SECONDS) if self.process is not None else None
        except subprocess.TimeoutExpired:
            status = None
        if status is None:
            return super()._broken(why)
        words = self._last_words()
        return HostError(f"passt has ended with status {status}" + (f": {words}" if words else ""))

    def _last_words(self) -> str:
        """The last line that passt wrote and that means something."""
        try:
            text = os.read(self._words, WORDS).decode(errors="replace")
        except BlockingIOError:
            return ""
        lines = [line for line in text.splitlines() if line and not NOISE.fullmatch(line)]
        return lines[-1].removesuffix(", exiting") if lines else ""


def _ports(forwards: Sequence[Forward]) -> list[str]:
    """The options of passt for them; `none` must be said, or UDP ports follow those of TCP."""
    words = []
    for option, kind in (("--tcp-ports", "tcp"), ("--udp-ports", "udp")):
        for ports in [str(forward) for forward in forwards if forward.kind == kind] or ["none"]:
            words += [option, ports]
    return words
