"""How a command in a machine has ended, for programs: what `kvmpy run --json FILE` writes."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from ..core.errors import GuestLost, HostError, KvmpyError, TimedOut

if TYPE_CHECKING:
    from ..guest.process import Process
    from ..sandbox import Sandbox


class Outcome:
    """`with Outcome(path) as outcome:` notes what goes on in the block, and writes it at the end.

    Without a path nothing is written. Raises HostError, before the block for a file that cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self.sandbox: Sandbox | None = None
        self.process: Process | None = None
        self.status = 255
        self.error: KvmpyError | None = None
        self._path = path
        self._begin = time.monotonic()
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            import json  # noqa: F401 - now: a process that is locked in loads nothing any more

            try:
                self._file = open(self._path, "w")
            except OSError as error:
                raise self._failed(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if isinstance(error, KvmpyError):
            self.error, self.status = error, error.status
        elif isinstance(error, SystemExit):
            self.status = int(error.code or 0)
        elif isinstance(error, KeyboardInterrupt):
            self.status = 128 + 2
        import json

        try:
            with self._file as file:
                file.write(json.dumps(self.facts()) + "\n")
        except OSError as failure:
            if error is None:
                raise self._failed(failure) from None

    def facts(self) -> dict[str, Any]:
        """reason: "exited", "killed" (by `signal`), "timeout", "lost" (the guest), "stopped" (kvmpy, by a signal), or
        "error" (the command was not started); times in seconds, sizes in bytes."""
        usage = self.process.usage if self.process is not None else None
        return {
            "reason": self._reason(),
            "status": self.status,
            "signal": usage.signal or None if usage is not None else None,
            "error": str(self.error) if self.error is not None else None,
            "seconds": round(time.monotonic() - self._begin, 3),
            "ready_seconds": round(self.sandbox.ready_seconds, 3) if self.sandbox is not None else None,
            "command": None
            if usage is None
            else {
                "seconds": usage.elapsed / 1e9,
                "user_seconds": usage.user / 1e6,
                "system_seconds": usage.system / 1e6,
                "max_rss": usage.maxrss << 10,
            },
        }

    def _reason(self) -> str:
        if isinstance(self.error, TimedOut):
            return "timeout"
        if isinstance(self.error, GuestLost):
            return "lost"
        if self.error is not None:
            return "error"
        code = self.process.returncode if self.process is not None else None
        if code is None:
            return "stopped"
        return "exited" if code >= 0 else "killed"

    def _failed(self, error: OSError) -> HostError:
        return HostError(f'cannot write "{self._path}": {error.strerror}', "name another file for --json")
