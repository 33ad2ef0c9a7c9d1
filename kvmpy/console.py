"""The serial console: bytes between a guest's UART, an endpoint on the host, and whoever waits for text."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence

from .core.errors import KvmpyError
from .core.events import EventLoop
from .core.outbox import Outbox, PlainOutbox
from .core.typed import Protocol

TAIL = 1 << 20  # bytes of output that are kept for wait_for and for reports
OUTPUT_LIMIT = 1 << 18  # bytes under way to the host; beyond, the UART says it is busy and the guest waits
BREAK = 0x100  # in the queue of input bytes: a break condition
LINGER = 0.01  # seconds that output may wait for more, but the first: a hand-over to the loop costs the guest time
BATCH = 256  # bytes that do not wait, nor does the end of a line
INPUT_LIMIT = 4096  # bytes under way to the guest; beyond, the endpoint is left unread
INPUT_CHUNK = 16  # bytes offered to the UART at a time: what its FIFO holds


class ConsoleTimeout(KvmpyError, TimeoutError):
    """The text that was waited for did not come."""

    status = 124


class Source(Protocol):
    """A device whose output the console takes."""

    lock: threading.Lock

    def drained(self) -> None: ...


class Uart(Source, Protocol):
    """The device that also takes input."""

    @property
    def listening(self) -> bool: ...
    def receive(self, data: bytes) -> int: ...
    def send_break(self) -> None: ...


class Endpoint(Protocol):
    """Where output goes to and input comes from; all methods run on the console's loop."""

    def write(self, data: bytes) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


class Console:
    """Both directions of the console. The UART calls `put` and `room`; people use `send`, `wait_for` and `text`.

    With `patient`, input waits until a driver has opened the port: drivers throw away what came before.
    """

    def __init__(self, loop: EventLoop, outbox: Outbox | None = None) -> None:
        """`outbox` must call `look` on the loop when it wants its reader."""
        self.stream = getattr(outbox, "stream", None)  # see core.sink.Sink
        self.patient = False
        self.dead = ""  # why no more output can come, once that is so
        self._loop = loop
        self._uart: Uart | None = None
        self._sources: list[Source] = []
        self._endpoint: Endpoint | None = None
        self._outbox = outbox or PlainOutbox(OUTPUT_LIMIT, BATCH, lambda: loop.call_soon(self.look))
        self._delivered = -LINGER  # when output was handed over last
        self._input: deque[int] = deque()
        self._paused = False
        self._tail = bytearray()
        self._dropped = 0  # bytes that have left the front of the tail
        self._searched = 0  # up to where wait_for has consumed the output, counted from the first byte ever
        self._news = threading.Condition()

    def connect(self, uart: Uart, others: Sequence[Source] = ()) -> None:
        """Take input to `uart`, and output from it and from `others`."""
        self._uart = uart
        self._sources = [uart, *others]

    def attach(self, endpoint: Endpoint | None) -> None:
        """Send output to `endpoint`."""
        self._endpoint = endpoint

    def detach(self) -> None:
        """Close the endpoint; output is only kept from now on."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.close()

    # The guest's side.

    def put(self, byte: int) -> bool:
        """Take a byte from the UART without ever blocking; False when no more fits until `drained`."""
        return self.write(bytes((byte,)))

    def write(self, data: bytes) -> bool:
        """Take all of `data`, as `put` takes a byte."""
        return self._outbox.put(data)

    def room(self) -> None:
        """The UART can take input again."""
        self._loop.call_soon(self._feed)

    # The host's side.

    def send(self, text: str | bytes) -> None:
        """Type at the console; any thread, returns at once."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        self._loop.call_soon(lambda: self.received(data))

    def send_break(self) -> None:
        """A break condition on the line, after what was sent before; any thread."""
        self._loop.call_soon(self.received_break)

    def received_break(self) -> None:
        """A break from the endpoint; on the loop's thread."""
        self._input.append(BREAK)
        self._feed()

    def received(self, data: bytes) -> None:
        """Input from the endpoint; on the loop's thread."""
        self._input.extend(data)
        self._feed()

    def sent(self, count: int) -> None:
        """The endpoint has passed on `count` bytes; on the loop's thread."""
        if self._outbox.sent(count):
            for source in self._sources:
                self._loop.call_soon(source.drained, owner=source)

    @property
    def text(self) -> str:
        """The last MiB of output."""
        with self._news:
            return self._tail.decode(errors="replace")

    def wait_for(self, pattern: str, timeout: float = 60.0) -> str:
        """Wait until the output matches `pattern` (a regular expression) behind the last match; returns the match.

        Raises ConsoleTimeout after `timeout` seconds, or at once when the machine has stopped.
        """
        import re

        expression = re.compile(pattern.encode())
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                start = max(0, self._searched - self._dropped)
                match = expression.search(self._tail, start)
                if match:
                    self._searched = self._dropped + match.end()
                    return match.group().decode(errors="replace")
                left = deadline - time.monotonic()
                if self.dead or left <= 0:
                    why = f"the machine stopped: {self.dead}" if self.dead else f"not in {timeout:g} s"
                    last = self._tail[-400:].decode(errors="replace").strip()
                    raise ConsoleTimeout(f"console: no {pattern!r} ({why})", f"last output: {last!r}")
                self._news.wait(left)

    def finish(self, why: str) -> None:
        """No more output will come: tell everybody who waits."""
        with self._news:
            self.dead = why
            self._news.notify_all()

    def flush(self, timeout: float) -> bool:
        """Give the host up to `timeout` seconds to take what is under way; whether it has."""
        deadline = time.monotonic() + timeout
        while self._outbox.under_way and time.monotonic() < deadline:
            time.sleep(0.002)
        return not self._outbox.under_way

    def look(self) -> None:
        """There is output; on the loop's thread."""
        _, lingers = self._outbox.waiting()
        now = self._loop.time()
        if lingers and now < self._delivered + LINGER:
            self._loop.after(LINGER, self._deliver)
        else:  # what comes after a silence is waited for: the echo of a key
            self._deliver()

    def _deliver(self) -> None:
        self._delivered = self._loop.time()
        data = self._outbox.take()
        if not data:  # it has gone with an earlier call
            return
        with self._news:
            self._tail += data
            excess = len(self._tail) - TAIL
            if excess > TAIL // 4:  # cut rarely: it moves the whole tail
                del self._tail[:excess]
                self._dropped += excess
            self._news.notify_all()
        if self._endpoint is None:
            self.sent(len(data))
        else:
            self._endpoint.write(data)

    def _feed(self) -> None:
        uart = self._uart
        while uart is not None and self._input and (uart.listening or not self.patient):
            data = bytes(itertools.takewhile(lambda byte: byte != BREAK, itertools.islice(self._input, INPUT_CHUNK)))
            with uart.lock:
                if data:
                    taken = uart.receive(data)
                else:
                    uart.send_break()
                    taken = 1
            for _ in range(taken):
                self._input.popleft()
            if taken < len(data):
                break
        pause = len(self._input) >= INPUT_LIMIT
        if self._endpoint is not None and pause != self._paused:
            self._paused = pause
            if pause:
                self._endpoint.pause()
            else:
                self._endpoint.resume()
