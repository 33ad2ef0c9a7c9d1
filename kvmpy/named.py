"""Machines with a name: the folder of each, which other processes of the same user find it by.

    $XDG_RUNTIME_DIR/kvmpy/NAME/        else /run/kvmpy/NAME for root, /run/user/UID/kvmpy/NAME, /tmp/kvmpy-UID/NAME
        lock       locked by the process that owns the machine for as long as it lives, however it ends
        facts      what the machine is and how it has ended: JSON objects, a line each, of which later ones count
        vsock      a UNIX socket for connections to ports of the guest, its agent's among them (host/vsocket.py)
        output     what the command has written, as DATA frames of the agent's protocol (guests/PROTOCOL.md); output.old
        console    what the guest's console has said; console.old
        owner      standard error of an owner in the background

`claim` is for the owner of a machine, `find` and `all_of` are for everybody else. A machine whose owner has been killed
is gone; its folder is all that is left, and the next owner of the name takes it over.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .core.errors import ConfigError, GuestLost, HostError
from .core.record import Record
from .host import filelock
from .host.vsocket import call

LOCK, FACTS, SOCKET, OUTPUT, CONSOLE, OWNER = "lock", "facts", "vsock", "output", "console", "owner"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
REGISTRY = ".lock"  # held while a folder is taken or taken away; no machine has that name
SOCKET_PATH_LIMIT = 107  # bytes (unix(7))
REGISTRY_SECONDS = 10.0  # for others to let go of it: they need milliseconds
VERDICT_SECONDS = 2.0  # from the end of a connection to that of the owner, if that is why
CONNECT_SECONDS = 30.0  # for the guest's kernel to answer
STEP = 0.02  # seconds between two looks at a machine that is to end

STARTING, RUNNING, EXITED, LOST = "starting", "running", "exited", "lost"

Facts = dict[str, Any]


class Named(Record):
    """A machine as its folder shows it at one moment.

    `state` is "starting", "running", "exited" (then `facts` has `status`) or "lost": the guest, or its owner, has gone
    without a status, and `why` says more.
    """

    name: str
    state: str
    facts: Facts

    @property
    def folder(self) -> Path:
        return base() / self.name

    @property
    def why(self) -> str:
        """Why it is lost."""
        return str(self.facts.get("why") or f"process {self.facts.get('pid', '?')}, which owned it, has died")

    @property
    def is_alive(self) -> bool:
        """Whether its owner lives now."""
        return _is_locked(self.folder)

    def must_run(self) -> None:
        """Raises ConfigError for a machine of which nothing can be asked."""
        if self.state == STARTING:
            raise ConfigError(f'machine "{self.name}" is starting', "try again")
        if self.state != RUNNING:
            raise ConfigError(self.end(), f"`kvmpy run --name {self.name}` starts another one")

    def end(self) -> str:
        """How it has ended, as a sentence."""
        if self.state == EXITED:
            return f'machine "{self.name}" has ended with status {self.facts["status"]}'
        return f'machine "{self.name}" is lost: {self.why}'

    def __call__(self) -> socket.socket:
        """A connection to the agent in its guest; raises OSError."""
        from .guest.protocol import PORT

        return call(self.folder / SOCKET, PORT, CONNECT_SECONDS)

    def lost(self, what: str, remedy: str = "") -> GuestLost:
        """The error for a connection that has ended: the machine's end, if that is why."""
        if not self.wait(VERDICT_SECONDS):
            return GuestLost(what, remedy)
        with suppress(ConfigError):
            return GuestLost(find(self.name).end())
        return GuestLost(f'machine "{self.name}" has ended')  # and was forgotten

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until its owner has ended; False when it has not in `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_alive:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(STEP)
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """Signal its owner, and no other process that has its number meanwhile."""
        try:
            process = os.pidfd_open(self.facts["pid"])
        except (KeyError, ProcessLookupError):
            return
        except OSError as error:
            raise HostError(f'cannot reach the owner of machine "{self.name}": {error.strerror}') from None
        try:
            if self.facts.get("process_started") == start_of(self.facts["pid"]):
                signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(process)

    def remove(self) -> None:
        """Forget it; raises ConfigError when it runs."""
        with _registry():
            if self.is_alive:
                raise ConfigError(f'machine "{self.name}" runs', f"`kvmpy stop {self.name}` first, or `kvmpy rm -f`")
            _wipe(self.folder)


class Claim:
    """The owner's hold on a name, from `claim` until `close`, or until the process ends.

    A child of the process that has it holds the name as well. Nothing is opened after `claim`: a process that has
    locked itself in can still note what happens.
    """

    def __init__(self, name: str, lock: int, facts: int) -> None:
        self.name = name
        self.folder = base() / name
        self._lock, self._facts = lock, facts

    def note(self, **facts: Any) -> None:
        """Add to what others see of the machine, as long as the name is held; raises HostError."""
        if self._lock < 0:
            return
        line = json.dumps(facts).encode() + b"\n"
        try:
            if os.write(self._facts, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise HostError(f'cannot write "{self.folder / FACTS}": {error.strerror}', "make room for it") from None

    def note_owner(self) -> None:
        """This process is the owner."""
        self.note(pid=os.getpid(), process_started=start_of(os.getpid()))

    def is_found(self) -> bool:
        """Whether others can find the machine that is held: its folder may be gone, as a session's XDG_RUNTIME_DIR is
        at its end. True when it is held no more."""
        try:
            return self._lock < 0 or os.path.samestat(os.fstat(self._lock), (self.folder / LOCK).stat())
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the name; the folder stays, with what was noted."""
        if self._lock >= 0:
            os.close(self._facts)
            os.close(self._lock)
            self._lock = -1


def claim(name: str | None) -> Claim:
    """Take a name that no running machine has, with nothing left of what had it; None: the first free one of m1, m2...

    Raises ConfigError and HostError.
    """
    if name is not None:
        check(name)
    with _registry():
        if name is None:
            taken = set(os.listdir(base()))
            name = next(f"m{number}" for number in range(1, len(taken) + 2) if f"m{number}" not in taken)
        folder = base() / name
        if len(os.fsencode(folder / SOCKET)) > SOCKET_PATH_LIMIT:
            raise HostError(f'"{folder}" is too long for the path of a socket', "set XDG_RUNTIME_DIR to a shorter one")
        try:
            folder.mkdir(0o700, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError(f'cannot make "{folder}": {error.strerror}', "make room for it") from None
        if _is_locked(folder):
            os.close(lock)
            raise ConfigError(f'the name "{name}" is in use', f"`kvmpy stop {name}` ends that machine")
        filelock.lock(lock, f'"{folder}"', exclusive=True)
        _wipe(folder, keep=LOCK)
        try:
            facts = os.open(folder / FACTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL, 0o600)
        except OSError as error:
            os.close(lock)
            raise HostError(f'cannot make "{folder / FACTS}": {error.strerror}', "make room for it") from None
    return Claim(name, lock, facts)


def find(name: str) -> Named:
    """The machine of that name; raises ConfigError."""
    check(name)
    found = _seen(name) if (base() / name / LOCK).exists() else None
    if found is None:
        raise ConfigError(f'there is no machine "{name}"', "`kvmpy ps --all` lists them")
    return found


def all_of() -> list[Named]:
    """All machines of this user, by name."""
    names = sorted(name for name in os.listdir(base()) if re.fullmatch(NAME, name))
    return [_seen(name) for name in names if (base() / name / LOCK).exists()]


def check(name: str) -> None:
    """Raises ConfigError for what cannot be the name of a machine."""
    if not re.fullmatch(NAME, name, re.ASCII):
        raise ConfigError(
            f'invalid name "{name}"', "use up to 63 of A-Z a-z 0-9 _ . - beginning with a letter or digit"
        )


def base() -> Path:
    """The folder of all machines of this user, which is made; raises HostError when others could change it."""
    user = os.geteuid()
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/"):  # relative ones are to be ignored (XDG Base Directory Specification)
        path = Path(given, "kvmpy")
    elif user == 0:
        path = Path("/run/kvmpy")
    else:
        session = Path(f"/run/user/{user}")
        path = session / "kvmpy" if os.access(session, os.W_OK) else Path(f"/tmp/kvmpy-{user}")
    try:
        path.mkdir(0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostError(f'cannot make "{path}": {error.strerror}', "set XDG_RUNTIME_DIR to a folder of yours") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o022:
        raise HostError(f'"{path}" can be changed by others', "set XDG_RUNTIME_DIR to a folder of yours alone")
    return path


def start_of(pid: int) -> int | None:
    """When a process was started, in ticks since the host's start (proc(5), /proc/PID/stat, field 22)."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return None


def _seen(name: str) -> Named:
    folder = base() / name
    is_alive = _is_locked(folder)  # before the facts: an owner writes its last ones, then ends
    facts: Facts = {}
    with suppress(OSError, ValueError, TypeError):
        for line in (folder / FACTS).read_bytes().split(b"\n")[:-1]:
            facts |= json.loads(line)
    if is_alive:
        state = RUNNING if facts.get("running") else STARTING
    else:
        state = EXITED if facts.get("status") is not None else LOST
    return Named(name, state, facts)


def _is_locked(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return filelock.is_locked(lock)
    finally:
        os.close(lock)


@contextmanager
def _registry() -> Iterator[None]:
    """Alone among those who take names, and take them away."""
    import fcntl

    path = base() / REGISTRY
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError(f'cannot open "{path}": {error.strerror}', "make room for it") from None
    deadline = time.monotonic() + REGISTRY_SECONDS
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HostError(
                        f'"{path}" is locked by another process', "see what that does, and end it"
                    ) from None
            time.sleep(STEP)
        yield
    finally:
        os.close(fd)


def _wipe(folder: Path, keep: str = "") -> None:
    """Take away what is in the folder, and with nothing to keep, the folder; raises HostError."""
    try:
        with suppress(FileNotFoundError):
            for name in sorted(
                os.listdir(folder), key=lambda name: name == LOCK
            ):  # while that is there, so is the rest
                if name != keep:
                    (folder / name).unlink()
            if not keep:
                folder.rmdir()
    except OSError as error:
        raise HostError(f'cannot take away "{folder}": {error.strerror}', "see what is in it") from None
