"""The request for a command: the frame that asks the agent for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from subprocess import DEVNULL, PIPE, STDOUT

from ..core.errors import ConfigError
from . import protocol
from .link import fs_bytes
from .protocol import Exec, Kind, Limit, Run


def shown(args: Sequence[str | bytes]) -> str:
    return repr(args[0] if isinstance(args[0], str) else args[0].decode("utf-8", "replace"))


def flags_of(stdin: int | None, stdout: int | None, stderr: int | None, tty: bool) -> Run:
    if tty:
        return Run.TTY
    for name, value, allowed in (
        ("stdin", stdin, (None, PIPE, DEVNULL)),
        ("stdout", stdout, (None, PIPE, DEVNULL)),
        ("stderr", stderr, (None, PIPE, DEVNULL, STDOUT)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} of a command in the guest cannot be {value!r}", "give PIPE, or copy it yourself")
    flags = Run(0)
    for value, flag in ((stdin, Run.STDIN), (stdout, Run.STDOUT), (stderr, Run.STDERR)):
        if value == PIPE:
            flags |= flag
    return flags | Run.MERGE if stderr == STDOUT else flags


def request(
    args: Sequence[str | bytes],
    flags: Run,
    env: Mapping[str, str],
    cwd: str,
    user: str,
    umask: int,
    rlimits: Mapping[int, tuple[int, int]],
    size: tuple[int, int],
) -> bytes:
    """The frame; raises ConfigError when the agent could not take it."""
    if not args:
        raise ConfigError("a command has at least one word")
    unbounded = protocol.EVERYTHING
    limits = b"".join(
        bytes(Limit(resource, 0, soft & unbounded, hard & unbounded)) for resource, (soft, hard) in rlimits.items()
    )
    head = Exec(flags, umask & 0o777, *size, len(args), len(env), len(rlimits))
    words = [*map(fs_bytes, (cwd, user, *args)), *(fs_bytes(f"{name}={value}") for name, value in env.items())]
    payload = bytes(head) + limits + protocol.strings(*words)
    if len(payload) > protocol.MAX_EXEC:
        raise ConfigError(f"{shown(args)}: command and environment have {len(payload)} bytes", "the most is 2 MiB")
    if len(rlimits) > protocol.MAX_LIMITS:
        raise ConfigError(f"{len(rlimits)} resource limits", "the most is 16")
    return protocol.frame(Kind.EXEC, payload)
