"""Streams that never block, over pipes, files, sockets and pseudo-terminals."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.core.events import EventLoop
from kvmpy.host.endpoint import File
from kvmpy.host.stream import Reader, Writer

SECONDS = 30.0


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    failures: list[BaseException] = []
    loop = EventLoop("test", failures.append)
    loop.start()
    yield loop
    loop.stop()
    assert failures == []


class Counter:
    """Adds up what a Writer says has gone."""

    def __init__(self, goal: int) -> None:
        self.total, self._goal, self._done = 0, goal, threading.Event()

    def __call__(self, count: int) -> None:
        self.total += count
        if self.total >= self._goal:
            self._done.set()

    def wait(self) -> None:
        assert self._done.wait(SECONDS), f"only {self.total} bytes have gone"


def write(loop: EventLoop, writer: Writer, data: bytes) -> None:
    done = threading.Event()
    loop.call_soon(lambda: (writer.write(data), done.set()))
    assert done.wait(SECONDS), "write() has blocked"


def test_a_full_pipe_does_not_block_and_loses_nothing(loop: EventLoop) -> None:
    reader, pipe = os.pipe()
    data = os.urandom(1 << 20)
    sent = Counter(len(data))
    writer = Writer(loop, pipe, sent)

    write(loop, writer, data)
    got = bytearray()
    while len(got) < len(data):
        got += os.read(reader, 65536)

    sent.wait()
    assert got == data
    assert not fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_NONBLOCK  # shared with other processes: must stay as it was
    writer.close()
    os.close(reader)
    os.close(pipe)


def test_a_reader_that_has_gone_counts_as_one_that_takes_all(loop: EventLoop) -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    sent = Counter(10)
    writer = Writer(loop, pipe, sent)

    write(loop, writer, b"0123456789")

    sent.wait()
    writer.close()
    os.close(pipe)


def test_a_socket_does_not_block(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    data = os.urandom(1 << 20)
    sent = Counter(len(data))
    writer = Writer(loop, ours.fileno(), sent)

    write(loop, writer, data)
    got = bytearray()
    while len(got) < len(data):
        got += theirs.recv(65536)

    sent.wait()
    assert got == data
    assert ours.getblocking()
    writer.close()
    ours.close()
    theirs.close()


def test_what_is_lost_at_the_end_has_gone_too(loop: EventLoop) -> None:
    """Or its owner waited for ever for a client that has left with some of its output unread."""
    ours, theirs = socket.socketpair()
    sent = Counter(1 << 20)
    writer = Writer(loop, ours.fileno(), sent)

    write(loop, writer, bytes(1 << 20))
    loop.call_soon(writer.close)

    sent.wait()
    assert sent.total == 1 << 20
    ours.close()
    theirs.close()


def test_a_file_keeps_its_shared_offset(loop: EventLoop, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"before ")
    sent = Counter(5)
    writer = Writer(loop, fd, sent)

    write(loop, writer, b"guest")
    sent.wait()
    os.write(fd, b" after")

    assert (tmp_path / "log").read_bytes() == b"before guest after"
    writer.close()
    os.close(fd)


class Collector:
    """Keeps what a Reader delivers until its end."""

    def __init__(self) -> None:
        self.data, self.ended, self.arrived = bytearray(), threading.Event(), threading.Event()

    def __call__(self, data: bytes) -> None:
        self.data += data
        (self.arrived if data else self.ended).set()


def test_reading_a_regular_file_to_its_end(loop: EventLoop, tmp_path: Path) -> None:
    content = os.urandom(20_000)
    (tmp_path / "input").write_bytes(content)
    fd = os.open(tmp_path / "input", os.O_RDONLY)
    got = Collector()

    loop.call_soon(lambda: Reader(loop, fd, got) and None)

    assert got.ended.wait(SECONDS)
    assert got.data == content
    os.close(fd)


def test_a_paused_reader_leaves_data_with_the_host(loop: EventLoop) -> None:
    fd, writer = os.pipe()
    got, readers, ready = Collector(), [], threading.Event()

    def make() -> None:
        readers.append(Reader(loop, fd, got))
        readers[0].pause()
        ready.set()

    loop.call_soon(make)
    assert ready.wait(SECONDS)
    os.write(writer, b"text")
    arrived_while_paused = got.arrived.wait(0.05)
    loop.call_soon(readers[0].resume)

    assert not arrived_while_paused
    assert got.arrived.wait(SECONDS)
    os.close(writer)
    assert got.ended.wait(SECONDS)
    assert got.data == b"text"
    os.close(fd)


def test_a_file_gets_no_larger_than_its_limit(loop: EventLoop, tmp_path: Path) -> None:
    sent: list[int] = []
    file = File(loop, str(tmp_path / "log"), sent.append, limit=10)

    for data in (b"12345678", b"90rest", b"more"):
        file.write(data)
    file.close()

    assert (tmp_path / "log").read_bytes() == b"1234567890"
    assert sum(sent) == 18  # all of it is off the guest's hands
