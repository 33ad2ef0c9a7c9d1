"""Ethernet frames on a stream socket: framing at every boundary, both directions, and ends of all kinds."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.core.errors import HostError
from kvmpy.host.frames import MAX_FRAME
from kvmpy.host.netsocket import FrameStream, connect

FRAMES = [bytes(range(14)), b"x" * 60, b"y" * 300]
WIRE = b"".join(len(frame).to_bytes(4, "big") + frame for frame in FRAMES)


Pair = tuple[socket.socket, FrameStream]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, peer = socket.socketpair()
    peer.settimeout(10)
    stream = FrameStream(near, "the peer")
    yield peer, stream
    stream.close()
    peer.close()


def received(stream: FrameStream) -> list[bytes]:
    """All frames that are there."""
    found = []
    while (frame := stream.receive()) is not None:
        found.append(bytes(frame))
    return found


@pytest.mark.parametrize("at", range(len(WIRE) + 1))
def test_stream_cut_anywhere(pair: Pair, at: int) -> None:
    peer, stream = pair

    peer.sendall(WIRE[:at])
    first = received(stream)
    peer.sendall(WIRE[at:])

    assert first + received(stream) == FRAMES


def test_byte_for_byte(pair: Pair) -> None:
    peer, stream = pair
    found = []

    for byte in WIRE:
        peer.sendall(bytes([byte]))
        found += received(stream)

    assert found == FRAMES


def test_longest_frames_one_after_the_other(pair: Pair) -> None:
    peer, stream = pair
    frames = [bytes([n]) * MAX_FRAME for n in range(5)]
    found = []

    for frame in frames:
        peer.sendall(MAX_FRAME.to_bytes(4, "big") + frame)
        found += received(stream)

    assert found == frames


@pytest.mark.parametrize("size", [0, MAX_FRAME + 1, 0xFFFFFFFF])
def test_length_that_cannot_be(pair: Pair, size: int) -> None:
    peer, stream = pair
    peer.sendall(size.to_bytes(4, "big"))

    with pytest.raises(HostError, match=f"the peer sent a frame of {size} bytes"):
        stream.receive()


def test_frames_before_the_end_are_not_lost(pair: Pair) -> None:
    peer, stream = pair
    peer.sendall(WIRE[:-1])
    peer.close()

    assert [bytes(stream.receive() or b"") for _ in range(2)] == FRAMES[:2]
    with pytest.raises(HostError, match="the peer has hung up"):
        stream.receive()


def test_sends_pieces_as_one_frame(pair: Pair) -> None:
    peer, stream = pair

    assert stream.send([FRAMES[1][:7], b"", memoryview(FRAMES[1])[7:]])
    assert peer.recv(1000) == (60).to_bytes(4, "big") + FRAMES[1]


def test_full_socket_takes_whole_frames_or_none(pair: Pair) -> None:
    """Whatever part of a frame the socket took, the rest follows before anything else."""
    peer, stream = pair
    sent = 0
    while stream.send([bytes([sent % 251]) * 60_001]):
        sent += 1
    data = b""
    while len(data) < sent * 60_005:
        data += peer.recv(1 << 16)
        stream.flush()

    assert stream.flush()
    assert data == b"".join((60_001).to_bytes(4, "big") + bytes([n % 251]) * 60_001 for n in range(sent))


def test_sending_to_nobody(pair: Pair) -> None:
    peer, stream = pair
    peer.close()

    with pytest.raises(HostError, match="the peer has gone: Broken pipe"):
        stream.send([FRAMES[0]])


def test_connecting_to_nobody(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "none"))

    with pytest.raises(HostError, match=r'cannot connect the network to ".*/none": Connection refused; start what'):
        connect(tmp_path / "none")
