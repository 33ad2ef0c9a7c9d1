"""The command line: one module for each verb, loaded when that verb is used.

A verb's module has `run(args) -> int`, and `OPTIONS` (see options.py) or `add_arguments(parser)` for argparse. The
first line of its docstring is its help.

Exit statuses:
    0        the guest powered off, asked for a reset, or halted; or it was stopped with Ctrl-a x
    0-255    with --exec, or from `kvmpy run`: the status of the command in the guest (128+n: killed by signal n)
    124      --timeout ran out
    125      an option, a file or a configuration is wrong, or a resource of the host is missing
    126      KVM is missing, not permitted, or cannot run what was asked for
    127      a file that was named, or the command of `kvmpy run`, does not exist; 126: it cannot be executed
    128+n    kvmpy itself was stopped by signal n
    253      the guest's kernel panicked
    254      triple fault
    255      the guest was lost: an exit from KVM that cannot be resumed, or no status from --exec or `kvmpy run`
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

from ..core import progress
from ..core.errors import ConfigError, HostError, KvmpyError, exhausted
from ..core.text import escaped
from ..core.typed import Any
from . import options

VERBS = {
    "run": "run a command in a fresh machine",
    "shell": "open a shell in a fresh machine",
    "exec": "run a command in a machine that has a name",
    "ps": "list the machines that have a name",
    "cp": "copy files to and from a machine",
    "logs": "print what the command of a machine has written",
    "wait": "wait for the end of a machine",
    "stop": "end machines",
    "rm": "forget machines that have ended",
    "boot": "boot a kernel and connect to its console",
    "config": "print the machine that options describe, as YAML",
    "doctor": "tell what this host can do, and the remedy for what it cannot",
    "inspect": "tell how a kernel image can be booted",
    "initrd": "make an initramfs",
    "completion": "print what a shell needs to complete kvmpy's words",
}


OUTPUT_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: list[str]) -> int:
    """Run the verb that `argv` begins with; errors become one line on standard error and their status."""
    status = 1
    try:
        status = _run(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        locked = sys.modules.get("kvmpy.cli.locked")
        if locked is not None and not isinstance(sys.exc_info()[1], Exception):  # those have sys.excepthook
            locked.leave(status)
    return status


def _run(argv: list[str]) -> int:
    _open_missing_standard_streams()
    try:
        try:
            if "_ARGCOMPLETE" in os.environ:
                from .completion import complete

                complete(VERBS, load)
            return _dispatch(argv)
        finally:
            sys.stdout.flush()  # here, where an error can still be told; argparse leaves its help unflushed
    except KvmpyError as error:
        _complain(f"kvmpy: {error}")
        return error.status
    except BrokenPipeError:
        _abandon(1)
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + 2
    except (OSError, MemoryError, RuntimeError) as error:
        if (lacking := exhausted(error)) is not None:
            _complain(f"kvmpy: {lacking}")
            return lacking.status
        if not isinstance(error, OSError) or error.errno not in OUTPUT_FAILURES:
            raise
        _abandon(1)
        _complain(f"kvmpy: cannot write to standard output: {error.strerror}; make room, or send it elsewhere")
        return HostError.status


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else ConfigError.status
    if argv[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"kvmpy {version('kvmpy')}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        raise ConfigError(f'no command "{verb}"', f"use one of {', '.join(VERBS)}")
    module = load(verb)
    args: Any = options.read(argv[1:], module.OPTIONS) if hasattr(module, "OPTIONS") else None
    if args is None:
        from . import parser

        args = parser.make(verb, module).parse_args(argv[1:])
    progress.show()
    status: int = module.run(args)
    return status


def load(name: str) -> ModuleType:
    """A module of this package. Modules leave no garbage: looking for some among them takes a tenth of a start."""
    name = f"{__name__}.{name}"
    gc.disable()
    try:
        __import__(name)  # importlib.import_module takes half a millisecond to load
        return sys.modules[name]
    finally:
        gc.freeze()
        gc.enable()


def _usage() -> str:
    lines = ["usage: kvmpy COMMAND [OPTIONS]", "", "A virtual machine monitor for x86-64 Linux.", "", "commands:"]
    lines += [f"  {verb:<11} {text}" for verb, text in VERBS.items()]
    return "\n".join([*lines, "", "`kvmpy COMMAND --help` tells more. Exit statuses are in the README."])


def _complain(line: str) -> None:
    """One line on standard error, whatever characters were in the user's input."""
    tell(escaped(line.replace("\n", " ")))


def tell(text: str, *, hurry: bool = False) -> None:
    """Lines on standard error. When they cannot be written there is nobody to tell; the exit status does.

    In a `hurry`, nobody who does not read is waited for, as long as the host can tell: what full terminals and pipes
    do not take within a second is dropped.
    """
    if hurry and not _has_room(2):
        _abandon(2)
        return
    try:
        print(text, file=sys.stderr)
    except OSError:
        _abandon(2)


def each(names: Sequence[str], act: Callable[[str], None]) -> int:
    """Do it to all of them, whatever fails; the status of the last failure."""
    status = 0
    for name in names:
        try:
            act(name)
        except KvmpyError as error:
            _complain(f"kvmpy: {error}")
            status = error.status
    return status


def _has_room(fd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(1000))


def _abandon(fd: int) -> None:
    """What could not be written to `fd` must not be tried again at exit."""
    os.dup2(null(), fd)


@cache
def null() -> int:
    """A descriptor of /dev/null; for a process that locks itself in, to be had before."""
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _open_missing_standard_streams() -> None:
    """Put /dev/null where 0, 1 or 2 is closed, or the next file opened would take its place."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - for the life of the process
