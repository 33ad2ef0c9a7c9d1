"""The console between a UART, an endpoint, and people who wait for text."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvmpy.console import INPUT_LIMIT, LINGER, OUTPUT_LIMIT, TAIL, Console, ConsoleTimeout
from kvmpy.core.events import EventLoop
from kvmpy.testing import StepLoop

SECONDS = 30.0


class FakeUart:
    """Takes input while it has room for it, as a FIFO does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.listening = True
        self.room = 1 << 20
        self.got = bytearray()
        self.drains = 0
        self.more = threading.Event()

    def receive(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.got += taken
        self.more.set()
        return len(taken)

    def drained(self) -> None:
        self.drains += 1
        self.more.set()

    def send_break(self) -> None:
        self.got += b"<break>"
        self.more.set()


class SlowEndpoint:
    """Keeps what it is given until the test lets it go."""

    def __init__(self) -> None:
        self.held = bytearray()
        self.state = "running"
        self.news = threading.Event()

    def write(self, data: bytes) -> None:
        self.held += data
        self.news.set()

    def pause(self) -> None:
        self.state = "paused"
        self.news.set()

    def resume(self) -> None:
        self.state = "running"
        self.news.set()

    def close(self) -> None:
        self.state = "closed"


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop("test", lambda error: None)
    loop.start()
    yield loop
    loop.stop()


@pytest.fixture
def uart() -> FakeUart:
    return FakeUart()


@pytest.fixture
def console(loop: EventLoop, uart: FakeUart) -> Console:
    console = Console(loop)
    console.connect(uart)
    return console


def settle(loop: EventLoop) -> None:
    """Until the loop has done what is queued and what lingers, and what that has queued."""
    for seconds in (LINGER, 0, 0):
        done = threading.Event()
        loop.after(seconds, done.set)
        assert done.wait(SECONDS)


def put(console: Console, data: bytes) -> list[bool]:
    return [console.put(byte) for byte in data]


def test_output_is_found_and_consumed(console: Console) -> None:
    put(console, b"boot...\r\nlogin: ")

    assert console.wait_for("log[a-z]+:", timeout=SECONDS) == "login:"
    with pytest.raises(ConsoleTimeout, match="login"):
        console.wait_for("login:", timeout=0)


def test_waiting_ends_when_the_machine_stops(console: Console) -> None:
    put(console, b"half a li")
    threading.Timer(0.05, console.finish, ["triple fault"]).start()

    with pytest.raises(ConsoleTimeout, match=r"the machine stopped: triple fault.*half a li"):
        console.wait_for("line", timeout=SECONDS)


def test_text_is_bounded(console: Console, loop: EventLoop) -> None:
    for _ in range(3 * TAIL // 4096):
        put(console, b"x" * 4096)
        settle(loop)
    put(console, b"end")
    settle(loop)

    assert TAIL <= len(console.text) <= 2 * TAIL
    assert console.text.endswith("xend")
    assert console.wait_for("xend", timeout=SECONDS) == "xend"


def test_what_comes_after_a_silence_does_not_linger_and_what_follows_does() -> None:
    loop = StepLoop()
    console = Console(loop)
    seen = []

    for data in (b"e", b"cho"):
        put(console, data)
        loop.turn()
        seen.append(console.text)
    loop.advance(LINGER)

    assert [*seen, console.text] == ["e", "e", "echo"]


def test_end_of_a_line_does_not_linger(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.console.LINGER", SECONDS)

    put(console, b"text\n")

    assert console.wait_for("text\n", timeout=SECONDS / 2) == "text\n"


def test_a_slow_host_stops_the_uart_without_losing_a_byte(console: Console, loop: EventLoop, uart: FakeUart) -> None:
    endpoint = SlowEndpoint()
    console.attach(endpoint)

    room = put(console, b"a" * OUTPUT_LIMIT)
    settle(loop)
    drains_before = uart.drains
    loop.call_soon(lambda: console.sent(OUTPUT_LIMIT))
    settle(loop)

    assert room == [True] * (OUTPUT_LIMIT - 1) + [False]
    assert len(endpoint.held) == OUTPUT_LIMIT
    assert (drains_before, uart.drains) == (0, 1)
    assert put(console, b"b") == [True]


def test_input_goes_in_bites_as_the_uart_takes_it(console: Console, loop: EventLoop, uart: FakeUart) -> None:
    uart.room = 16
    console.send("0123456789abcdefXYZ")
    settle(loop)
    first = bytes(uart.got)
    uart.room = 16
    console.room()
    settle(loop)

    assert first == b"0123456789abcdef"
    assert uart.got == b"0123456789abcdefXYZ"


def test_input_waits_for_a_driver(console: Console, loop: EventLoop, uart: FakeUart) -> None:
    console.patient = True
    uart.listening = False

    console.send("early")
    settle(loop)
    before = bytes(uart.got)
    uart.listening = True
    console.room()
    settle(loop)

    assert (before, bytes(uart.got)) == (b"", b"early")


def test_a_deaf_guest_leaves_input_with_the_host(console: Console, loop: EventLoop, uart: FakeUart) -> None:
    endpoint = SlowEndpoint()
    console.attach(endpoint)
    uart.room = 0

    loop.call_soon(lambda: console.received(b"x" * INPUT_LIMIT))
    settle(loop)
    full = endpoint.state
    uart.room = 16
    console.room()
    settle(loop)

    assert (full, endpoint.state) == ("paused", "running")


def test_break_is_sent_to_the_uart(console: Console, loop: EventLoop, uart: FakeUart) -> None:
    console.send("before")
    console.send_break()
    console.send("after")
    settle(loop)

    assert uart.got == b"before<break>after"


def test_flush_waits_for_the_host(console: Console, loop: EventLoop) -> None:
    endpoint = SlowEndpoint()
    console.attach(endpoint)
    put(console, b"last words")

    blocked = console.flush(0.05)
    loop.call_soon(lambda: console.sent(len(b"last words")))

    assert not blocked
    assert console.flush(SECONDS)
