"""Sandboxes that are ready before they are wanted: `SandboxPool`.

with kvmpy.SandboxPool(size=4, mem="256M") as pool:
    with pool.take() as sandbox:                # one that nobody has used, and nobody will again
        sandbox.run("make", "test")
"""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from .core.board import Reason, Stop
from .core.errors import ConfigError, TimedOut
from .sandbox import Sandbox

MAX_SIZE = 1024
LOOK_SECONDS = 1.0  # from the death of a sandbox that waits to its replacement


class SandboxPool:
    """Keeps `size` sandboxes running that wait for somebody; their options are those of Sandbox.

    Any thread may call its methods. One that was taken belongs to who took it, who closes it.
    """

    def __init__(self, size: int = 4, **options: Any) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ConfigError(f"a pool of {size} sandboxes", f"use 1 to {MAX_SIZE}")
        Sandbox(**options).close()  # raises what is wrong with the options
        self.size = size
        self._options = options
        self._change = threading.Condition()
        self._ready: deque[Sandbox | Exception] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._starting: Sandbox | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """How many are ready."""
        return sum(isinstance(item, Sandbox) and item.stopped is None for item in list(self._ready))

    def start(self) -> Self:
        """Begin to start sandboxes, one after the other."""
        if self._thread is not None:
            raise ConfigError("this pool was started before", "make another one")
        self._thread = threading.Thread(target=self._fill, name="kvmpy-pool", daemon=True)
        self._thread.start()
        return self

    def take(self, timeout: float | None = None) -> Sandbox:
        """A running sandbox; waits for one if none is ready. One that has died meanwhile is left out.

        Raises TimedOut after `timeout` seconds, and what the start of a sandbox raises.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._change:
            while True:
                if self._closing or self._thread is None:
                    raise ConfigError("the pool of sandboxes is closed", "take within its `with` block")
                if not self._ready:
                    left = None if deadline is None else deadline - time.monotonic()
                    if not self._change.wait(left):
                        raise TimedOut(f"no sandbox was ready within {timeout:g} s", "give the pool a larger size")
                    continue
                item = self._ready.popleft()
                self._change.notify_all()
                if isinstance(item, Exception):
                    raise item
                if item.stopped is None:
                    return item
                item.close()

    def close(self) -> None:
        """End the sandboxes that nobody has taken; safe to call twice."""
        with self._change:
            self._closing = True
            self._change.notify_all()
            if self._starting is not None:  # not to be waited for
                self._starting.machine.stop(Stop(Reason.QUIT))
        if self._thread is not None:
            self._thread.join()
        while self._ready:
            item = self._ready.popleft()
            if isinstance(item, Sandbox):
                item.close()

    def _bury(self) -> None:
        """Close the sandboxes that have died while they waited."""
        with self._change:
            dead = [item for item in self._ready if isinstance(item, Sandbox) and item.stopped is not None]
            for item in dead:
                self._ready.remove(item)
        for item in dead:
            item.close()

    def _fill(self) -> None:
        while True:
            self._bury()
            with self._change:
                is_wanted = self._change.wait_for(lambda: self._closing or len(self._ready) < self.size, LOOK_SECONDS)
                if self._closing:
                    return
                if not is_wanted:
                    continue
                self._starting = sandbox = Sandbox(**self._options)
            item: Sandbox | Exception
            try:
                item = sandbox.start()
            except Exception as error:  # the thread's guard, too: who waits for a sandbox would wait for ever
                item = error
            with self._change:
                self._starting = None
                if self._closing and isinstance(item, Exception):
                    return
                if isinstance(item, Exception):  # for who waits now or comes next; no use to fill the pool with it
                    self._ready.append(item)
                    self._change.notify_all()
                    self._change.wait_for(lambda: self._closing or not self._ready)
                else:
                    self._ready.append(item)
                    self._change.notify_all()
