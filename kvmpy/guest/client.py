"""The agent of one guest: commands and files, from any thread."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from subprocess import PIPE

from ..core.errors import GuestLost
from . import ports
from .completed import Completed, run
from .files import Files
from .link import Connect, deadline_after
from .process import Process
from .protocol import LIMIT

Word = str | bytes


class Agent:
    """`connect` opens a connection to the agent's port, and raises OSError when that cannot be had.

    Raises of all methods: GuestLost when the guest has gone, AgentError when it has not the means, TimedOut.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self.files = Files(connect)

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until the agent answers; raises GuestLost when it does not within `timeout` seconds."""
        deadline = deadline_after(timeout)
        assert deadline is not None
        pause = 0.002
        while True:
            try:
                Files(self._connect, max(0.001, deadline - time.monotonic())).stat("/")
                return
            except GuestLost:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def popen(
        self,
        args: Sequence[Word],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        umask: int = 0o022,
        rlimits: Mapping[int, tuple[int, int]] | None = None,
        tty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> Process:
        """Start a command; `timeout` is for the start alone.

        stdin, stdout, stderr  subprocess.PIPE, or DEVNULL as None; stderr may be STDOUT
        env      variables besides PATH, HOME, USER, LOGNAME, which have defaults
        cwd      working directory, entered with the user's rights; by default /
        user     USER[:GROUP], names or numbers; by default root
        rlimits  resource.RLIMIT_...: (soft, hard)
        tty      (rows, columns) of a terminal that the command has instead of pipes
        Raises CommandError when the command cannot be started, ConfigError for what no command can be.
        """
        return Process(
            self._connect,
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            user=user,
            umask=umask,
            rlimits=rlimits,
            tty=tty,
            timeout=timeout,
        )

    def run(
        self,
        args: Sequence[Word],
        *,
        input: bytes | None = None,
        timeout: float | None = None,
        stderr: int = PIPE,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        umask: int = 0o022,
        rlimits: Mapping[int, tuple[int, int]] | None = None,
        check: bool = False,
        limit: int = LIMIT,
    ) -> Completed:
        """Run a command to its end, with its output kept; options as in `popen`.

        `timeout` seconds later it is killed with all that it has started: TimedOut, with what it has written; as soon
        as stdout or stderr has more than `limit` bytes (64 MiB), too: TooLarge. Raises CommandError; with `check` also
        CommandFailed.
        """
        how = {"stderr": stderr, "env": env, "cwd": cwd, "user": user, "umask": umask, "rlimits": rlimits}
        completed = run(self._connect, args, input, timeout, limit, **how)
        return completed.check() if check else completed

    def dial(self, port: int, timeout: float | None = None) -> socket.socket:
        """A connection to TCP port `port` of the guest's loopback interface; AgentError (stage "port") without it."""
        return ports.dial(self._connect, port, timeout)
