"""A tap interface of the host: frames with headers both ways, and the errors that users meet."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from kvmpy.core.errors import ConfigError, HostError
from kvmpy.host import tap
from kvmpy.host.tap import Tap, check_name

FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(46)  # of an experimental type (IEEE 802)
HEADER = bytes(12)
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
ETH_P_ALL = 3
SECONDS = 10.0


def why_not() -> str:
    """Why this host lends no tap interface; empty when it does."""
    try:
        Tap().close()
    except HostError as error:
        return str(error)
    return ""


needs_tap = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def new() -> Iterator[Tap]:
    interface = Tap()
    yield interface
    interface.close()


@pytest.fixture
def host(new: Tap) -> Iterator[socket.socket]:
    """The host's side of `new`, which is brought up."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as packets:
        packets.settimeout(SECONDS)
        fcntl.ioctl(packets, SIOCSIFFLAGS, tap.IFREQ.pack(new.name.encode(), IFF_UP))
        packets.bind((new.name, 0))
        yield packets


def next_of_ours(interface: Tap) -> bytes:
    """The next frame of our type; the host says things of its own on a new interface."""
    while (frame := interface.receive()) is not None:
        if bytes(frame[24:26]) == FRAME[12:14]:
            return bytes(frame)
    return b""


@needs_tap
def test_frames_both_ways(new: Tap, host: socket.socket) -> None:
    host.send(FRAME)
    assert next_of_ours(new) == HEADER + FRAME

    assert new.send([HEADER, FRAME[:7], FRAME[7:]])
    while (got := host.recv(2000)) and got[12:14] != FRAME[12:14]:
        pass
    assert got == FRAME


@needs_tap
def test_headers_that_the_kernel_refuses_lose_the_frame(new: Tap, host: socket.socket) -> None:
    new.set_offloads(tap.TUN_F_CSUM | tap.TUN_F_TSO4 | tap.TUN_F_TSO6 | tap.TUN_F_TSO_ECN)

    assert new.send([struct.pack("<BBHHHHH", 1, 99, 0xFFFF, 0, 0xFFFF, 0xFFFF, 0), FRAME])
    assert new.send([HEADER, FRAME[:5]])


@needs_tap
def test_interface_that_is_down_loses_frames(new: Tap) -> None:
    assert new.send([HEADER, FRAME])
    assert new.receive() is None


@needs_tap
def test_interface_goes_with_us(new: Tap) -> None:
    there = new.name in [name for _, name in socket.if_nameindex()]

    new.close()

    assert there
    assert new.name not in [name for _, name in socket.if_nameindex()]


@needs_tap
def test_interface_in_use(new: Tap) -> None:
    with pytest.raises(HostError, match=f"cannot use tap interface {new.name}: Device or resource busy; end the"):
        Tap(new.name)


@needs_tap
def test_interface_of_another_kind() -> None:
    with pytest.raises(
        HostError, match="cannot use tap interface lo: Invalid argument; name a tap interface: this one"
    ):
        Tap("lo")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "x" * 16, "tap%d", "ü"])
def test_names_that_no_interface_has(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a network interface"):
        check_name(name)


def test_host_without_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "DEVICE", "/dev/net/none")

    with pytest.raises(HostError, match=r"cannot use /dev/net/none: No such file .*; load the kernel's module"):
        Tap()


def test_remedies_name_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(tap, "DEVICE", os.devnull)
    monkeypatch.setattr(fcntl, "ioctl", refuse)

    with pytest.raises(HostError, match="cannot use tap interface tap7: Operation not permitted; run as root, or make"):
        Tap("tap7")
