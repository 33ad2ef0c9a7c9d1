"""Every error kvmpy raises on purpose, with the exit status that the command line gives it.

An error is one line: what is wrong with which thing, then, after a semicolon, what to do about it.
"""

from __future__ import annotations

import errno
import os

from .typed import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .board import Stop


class KvmpyError(Exception):
    """Base of all errors that users can act on; `status` is the exit status of the command line.

    `stage` is what was being done, where there are steps, `errno` the system's reason, where it gave one, and `log` the
    file with what the guest's console has said, where there is one.
    """

    status: ClassVar[int] = 125
    stage: str = ""
    errno: int | None = None
    log: str = ""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    @property
    def hint(self) -> str:
        """What to do about it."""
        return self.remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class ConfigError(KvmpyError, ValueError):
    """What the user asked for cannot be done as asked."""


class ImageError(ConfigError):
    """A kernel, initrd or other file is not what it should be (truncated, malformed, too large)."""


class NotFoundError(KvmpyError):
    """A file or command that the user named does not exist."""

    status = 127


class HostError(KvmpyError):
    """A resource of the host failed or is missing (file, memory, tool)."""


LIMITS = {  # errnos of what the host has run out of, with what to do about it
    errno.EMFILE: ("file descriptors", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("file descriptors", "raise the host's limit (sysctl fs.file-max)"),
    errno.ENOMEM: ("memory", "end other programs, or raise the limit (ulimit -v)"),
}
NO_THREAD = "can't start new thread"  # what Python says in a RuntimeError


def exhausted(error: BaseException) -> HostError | None:
    """What `error` is, where it tells that a resource of the host has run out, wherever that was; else None."""
    if isinstance(error, KvmpyError):
        return None
    if isinstance(error, OSError) and error.errno in LIMITS:
        what, remedy = LIMITS[error.errno]
    elif isinstance(error, MemoryError):
        what, remedy = LIMITS[errno.ENOMEM]
    elif isinstance(error, RuntimeError) and NO_THREAD in str(error):
        what, remedy = "threads", "raise the limit (ulimit -u, pids.max of the cgroup), or that of memory (ulimit -v)"
    else:
        return None
    return HostError(f"this host has no more {what}", remedy)


class KvmError(KvmpyError):
    """A KVM ioctl failed: `ioctl` is its name, `argument` what it was called with, `errno` why."""

    status = 126
    errno: int

    def __init__(self, ioctl: str, argument: str, errno: int, remedy: str = "") -> None:
        super().__init__(f"{ioctl}({argument}): {os.strerror(errno)}", remedy)
        self.ioctl = ioctl
        self.argument = argument
        self.errno = errno


class CannotRunKernels(KvmpyError):
    """This host's KVM emulates ring 0 instead of running it (kvm/probe.py), which no Linux kernel survives."""

    status = 126

    def __init__(self) -> None:
        super().__init__(
            "this host's KVM emulates kernel code in software, which Linux does not survive",
            "use a machine with VT-x/AMD-V, enable nested virtualisation for this one, or, in a checkout of kvmpy, "
            "run `scripts/linux-host kvmpy boot ...`",
        )


class GuestError(KvmpyError):
    """The guest did something that the specification forbids; the device that sees it must survive it."""


class GuestMemoryError(GuestError):
    """A guest-physical range that is not (wholly) RAM."""


class GuestLost(KvmpyError):
    """The guest, or the agent in it, has gone or makes no sense any more; what was asked of it may be half done.

    Where the machine has stopped, `stop` tells why; `report` is the crash report, where there is something to report.
    """

    status = 255
    stop: Stop | None = None
    report: str = ""


class TimedOut(KvmpyError, TimeoutError):
    """A time limit has passed; `stdout` and `stderr` are what a command had written until then."""

    status = 124

    def __init__(self, what: str, remedy: str = "", stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(what, remedy)
        self.stdout = stdout
        self.stderr = stderr


class TooLarge(KvmpyError):
    """What a guest has for the host is more than the caller has room for; `stdout` and `stderr` are the beginnings of
    a command's output."""

    def __init__(self, what: str, remedy: str = "", stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(what, remedy)
        self.stdout = stdout
        self.stderr = stderr


class AgentError(KvmpyError):
    """The agent in the guest could not do what it was asked for: `stage` is what failed, `errno` why."""

    errno: int

    def __init__(self, stage: str, errno: int, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.stage = stage
        self.errno = errno


class CommandError(AgentError):
    """A command in the guest could not be started."""

    def __init__(self, stage: str, errno: int, what: str, remedy: str = "", status: int = 125) -> None:
        super().__init__(stage, errno, what, remedy)
        self.status = status  # type: ignore[misc]  # a shell's: 127 not found, 126 not executable


class GuestFileError(AgentError):
    """Something that was to be done with a file in the guest failed."""


class CommandFailed(KvmpyError):
    """A command in the guest ended with a `returncode` other than 0 (negative: the signal that ended it)."""

    def __init__(self, command: str, returncode: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        how = f"ended with status {returncode}" if returncode > 0 else f"was ended by signal {-returncode}"
        super().__init__(f"{command} {how}")
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        self.status = returncode if returncode > 0 else 128 - returncode  # type: ignore[misc]
