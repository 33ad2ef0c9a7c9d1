"""Connections to ports of the guest, when what answers makes no sense."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct

import pytest

from kvmpy.core.errors import AgentError, GuestLost, TimedOut
from kvmpy.guest import ports, protocol
from kvmpy.guest.protocol import HELLO, Kind, Stage, frame

GREETING = frame(Kind.HELLO, HELLO)
REFUSED = frame(Kind.ERROR, struct.pack("<II", Stage.PORT, errno.ECONNREFUSED) + b"80")


def dial(answer: bytes, *, end: bool = True) -> socket.socket:
    """Dial port 80 of a guest that answers so, and then ends the connection, or says no more."""
    ours, theirs = socket.socketpair()
    theirs.sendall(answer)
    if end:
        theirs.shutdown(socket.SHUT_WR)
    try:
        return ports.dial(lambda: ours, 80, 0.2)
    finally:
        theirs.close()


def test_what_follows_the_answer_is_the_stream() -> None:
    with dial(GREETING + frame(Kind.END) + b"raw bytes") as stream:
        assert stream.recv(100) == b"raw bytes"


def test_nobody_listens() -> None:
    with pytest.raises(AgentError, match="port 80 of the guest: Connection refused; a program there must") as caught:
        dial(GREETING + REFUSED)

    assert (caught.value.stage, caught.value.errno) == ("port", errno.ECONNREFUSED)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        GREETING[:5],
        GREETING,
        frame(Kind.END),
        GREETING + GREETING,
        frame(Kind.HELLO, b"XXXX" + HELLO[4:]) + frame(Kind.END),
        frame(Kind.HELLO, b"short") + frame(Kind.END),
        struct.pack("<IBBH", protocol.MAX_DATA + 1, Kind.HELLO, 0, 0),
        struct.pack("<IBBH", 0, 255, 0, 0),
        struct.pack("<IBBH", 0, Kind.END, 0, 1),
        frame(Kind.ERROR, b""),
        random.Random(0).randbytes(64),
    ],
)
def test_answers_that_make_no_sense(answer: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(GuestLost):
        dial(answer)

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_guest_that_is_silent() -> None:
    with pytest.raises(TimedOut, match=r"has not answered in 0\.2 s"):
        dial(GREETING, end=False)


def test_a_guest_that_cannot_be_reached() -> None:
    def connect() -> socket.socket:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")

    with pytest.raises(GuestLost, match=r"cannot reach the guest's agent: .*nobody is there"):
        ports.dial(connect, 80)
