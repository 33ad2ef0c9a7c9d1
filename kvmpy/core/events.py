"""File descriptors, timers and calls from other threads, served by one thread."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from .typed import Any

Callback = Callable[[], None]

READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class EventLoop:
    """epoll, a heap of timers and a queue of calls on one thread.

    Use it for device work that waits for the host. Not for: anything a vCPU needs an answer from.
    Callbacks given with an `owner` run with that device's lock held. `add`, `remove`, `call_soon` and `after`
    may be used from any thread; callbacks run on the loop's own. A callback that raises ends the loop, and
    `failed` is told: a device whose work died silently would look like a hung guest.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self.name = name
        self._failed = failed
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, READ)
        self._callbacks: dict[int, tuple[Callback, AbstractContextManager[Any]]] = {}
        self._calls: deque[tuple[Callback, AbstractContextManager[Any]]] = deque()
        self._timers: list[tuple[float, int, Callback, AbstractContextManager[Any]]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def add(self, fd: int, callback: Callback, *, events: int = READ, owner: Any = None) -> None:
        """Call `callback` whenever `fd` is ready (level-triggered); raises OSError when epoll cannot watch it. A no-op
        when the loop has stopped."""
        with self._lock:
            if self._epoll.closed:
                return
            self._callbacks[fd] = (callback, _lock_of(owner))
            try:
                self._epoll.register(fd, events)
            except OSError:
                del self._callbacks[fd]
                raise

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; a no-op when it is not watched. Call it before the descriptor is closed."""
        with self._lock:
            if self._callbacks.pop(fd, None) is not None and not self._epoll.closed:
                self._epoll.unregister(fd)

    def call_soon(self, callback: Callback, *, owner: Any = None) -> None:
        """Run `callback` once, on the loop's thread."""
        self._calls.append((callback, _lock_of(owner)))
        self._kick()

    def after(self, seconds: float, callback: Callback, *, owner: Any = None) -> None:
        """Run `callback` once, `seconds` from now."""
        with self._lock:
            entry = (self.time() + seconds, next(self._order), callback, _lock_of(owner))
            heapq.heappush(self._timers, entry)
        self._kick()

    def time(self) -> float:
        """Seconds on the clock by which `after` counts."""
        return time.monotonic()

    def sibling(self, name: str) -> EventLoop:
        """A loop with a thread of its own, not started yet, whose failures are told to the same."""
        return EventLoop(name, self._failed)

    def start(self, prepare: Callback | None = None) -> None:
        """Begin; the thread calls `prepare` first."""
        thread = threading.Thread(target=self._run, args=(prepare,), name=f"kvmpy-{self.name}", daemon=True)
        thread.start()
        self._thread = thread  # which `stop` may join

    def stop(self, timeout: float = 1.0) -> None:
        """End the thread and close; a callback that is running gets `timeout` seconds to return."""
        self._stopping = True
        self._kick()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            if self._thread.is_alive():  # stuck in a callback: its descriptors go with the process
                return
        self._epoll.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _kick(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _run(self, prepare: Callback | None) -> None:
        try:
            if prepare is not None:
                prepare()
            while not self._stopping:
                self._turn()
        except BaseException as error:  # the thread's last guard: handed on, never dropped
            self._failed(error)

    def _turn(self) -> None:
        for fd, _ in self._epoll.poll(self._timeout()):
            if fd == self._wake:
                os.eventfd_read(fd)
                continue
            entry = self._callbacks.get(fd)
            if entry is not None:
                with entry[1]:
                    entry[0]()
        for _ in range(len(self._calls)):  # what is queued meanwhile waits for the next turn
            callback, lock = self._calls.popleft()
            with lock:
                callback()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            with self._lock:
                _, _, callback, lock = heapq.heappop(self._timers)
            with lock:
                callback()

    def _timeout(self) -> float | None:
        if self._calls:
            return 0
        with self._lock:
            return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None


def _lock_of(owner: Any) -> AbstractContextManager[Any]:
    return nullcontext() if owner is None else owner.lock
