"""The way commands lock their process in: what must be loaded before, and the helper that stays outside."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from ..core import progress
from ..core.board import Stop
from ..core.errors import ConfigError
from ..core.log import log
from ..core.pure import PURE
from ..jail.lock import LEVELS, Jail
from ..machine import Machine
from ..steward import Steward
from . import null

# Where a module of ours is loaded: what it loads when it needs that.
LATER = {
    "kvmpy.virtio.balloon": ("ctypes",),
    "kvmpy.cli.relay": ("re", "signal", "termios"),
}
IN_PYTHON = ("BuiltinImporter", "FrozenImporter")  # what finds modules in no files


def check_level(text: str) -> str:
    """A level of --sandbox; raises ConfigError."""
    if text not in LEVELS:
        raise ConfigError(f'invalid sandbox "{text}"', f"use {', '.join(LEVELS[:-1])} or {LEVELS[-1]}")
    return text


class Lock:
    """Make it before the machine, while the process has one thread; `close` it when the machine is closed."""

    locked = False  # whether this process is

    def __init__(self, level: str, *, with_json: bool) -> None:
        self._level = level
        self._with_json = with_json
        self._steward = Steward()

    def lock_down(self, machine: Machine) -> Callable[[str], None]:
        """For Machine.start. Raises HostError or ConfigError where --sandbox strict cannot be had."""
        devices = machine.board.virtio_devices()
        reaching = [device for device in devices if device.reaches]
        if reaching and self._level == "strict":
            raise ConfigError(
                f"a {type(reaching[0]).__name__} opens files or sockets while the guest runs", "use --sandbox default"
            )
        _preload(with_exec=machine.config.exec is not None, with_json=self._with_json)
        progress.hush()
        sockets = sys.modules.get("kvmpy.host.unix_socket")
        self._steward.seal(sockets.NAMES if sockets else ())
        log.need_no_imports()
        jail = Jail(
            self._level,
            reaching=bool(reaching),
            folders=[folder for device in devices for folder in device.folders],
            pairs="kvmpy.virtio.vsock" in sys.modules,
            longest=max((device.longest_file for device in devices), default=0),
        )
        jail.lock()
        Lock.locked = True
        sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") in IN_PYTHON]
        sys.meta_path.append(_NothingLoads)
        sys.excepthook = _fail
        if jail.missing:
            log.warning(f"the sandbox is incomplete: {'; '.join(jail.missing)}")
        log.info("locked in", sandbox=self._level, in_force=", ".join(jail.in_force))
        return jail.enter

    def report(self, machine: Machine, stop: Stop) -> tuple[str, str]:
        """The crash report, and its facts as JSON; empty when they cannot be had."""
        return self._steward.report(machine, stop)

    def close(self) -> None:
        self._steward.close()


class _NothingLoads:
    """In place of the search for files of modules."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        raise ModuleNotFoundError(
            f'"{name}" cannot be loaded: kvmpy is locked in; import it where the file of the device begins, '
            "or use --sandbox off",
            name=name,
        )


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of sys.excepthook."""
    sys.__excepthook__(kind, error, trace)
    leave(1)


def leave(status: int) -> None:
    """The last thing to do: end the process if it is locked in and has threads. Python would end those with a library
    which it loads only then."""
    if Lock.locked and threading.active_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)


def _preload(*, with_exec: bool, with_json: bool) -> None:
    """Load what is loaded when it is needed: nothing can be, soon."""
    null()
    for ours, modules in LATER.items():
        if ours in sys.modules:
            for module in modules:
                __import__(module)
    if with_exec:
        __import__("re")  # for the status of the command
    if with_json:
        __import__("json")
    if "kvmpy.host.syscalls" in sys.modules:
        sys.modules["kvmpy.host.syscalls"].load()
    if not PURE and ("kvmpy.virtio.blk" in sys.modules or "kvmpy.virtio.net" in sys.modules):
        from ..virtio import twin  # noqa: F401
