"""The network device (VIRTIO 1.2, 5.1): frames both ways, both sides slow, and drivers that break the rules."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Callable
from itertools import dropwhile, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nics import FRAME, MAC, MERGE, PLAIN, Rig, TapNet, Wire, header

from kvmpy.core.errors import ConfigError, HostError, NotFoundError
from kvmpy.core.events import WRITE, EventLoop
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio.net import NET_F, RX, TX, Net, parse_mac
from kvmpy.virtio.spec import INTERRUPT

# What the driver sees.


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({}, NET_F.MAC | NET_F.STATUS | NET_F.MRG_RXBUF),
        ({"mtu": 68}, NET_F.MAC | NET_F.STATUS | NET_F.MRG_RXBUF | NET_F.MTU),
        ({"backend": "tap"}, NET_F.MAC | NET_F.STATUS | NET_F.MRG_RXBUF | NET_F.OFFLOADS),
    ],
)
def test_features(options: dict[str, object], features: int) -> None:
    assert Net(**options).features == features  # type: ignore[arg-type]


def test_default_addresses() -> None:
    board, again = FakeBoard(), FakeBoard()
    nets = [Net("none") for _ in range(3)]
    for net, on in zip(nets, (board, board, again), strict=True):
        net.attach(on)

    first, second, rerun = (net.mac for net in nets)
    assert first != second
    assert first == rerun
    assert first[0] == 2  # locally administered, not multicast


# Frames.


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("cuts", [[], [12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 5, 40], [71]])
def test_from_the_guest_in_any_layout(rig: Rig, cuts: list[int], indirect: bool) -> None:
    data = PLAIN + FRAME
    edges = [0, *cuts, len(data)]
    head = rig.driver.submit(TX, [data[a:b] for a, b in pairwise(edges)], indirect=indirect)

    rig.driver.kick(TX)

    assert rig.wire.frames() == [FRAME]
    assert rig.driver.used(TX) == [(head, 0)]
    assert rig.net.tx_dropped == 0


def test_one_interrupt_for_a_batch(rig: Rig) -> None:
    rig.offer(*[100] * 10)
    rig.driver.board.mem.write(rig.driver.queues[RX].avail + 4 + 2 * 256, struct.pack("<H", 0))
    before = rig.driver.pulses

    rig.wire.send(*[FRAME] * 10)
    rig.turn()

    assert (rig.driver.pulses - before, len(rig.received())) == (1, 10)


@given(
    sizes=st.lists(st.integers(14, 3000), min_size=1, max_size=12),
    buffers=st.lists(st.integers(0, 700), min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_any_buffers_and_any_frames(sizes: list[int], buffers: list[int]) -> None:
    """Frames that fit come whole and in order."""
    tap = Rig(TapNet("tap", mac=MAC), None)
    tap.start(MERGE)
    frames = [bytes([n]) * size for n, size in enumerate(sizes)]
    tap.net.tap.incoming = [PLAIN + frame for frame in frames]
    got: list[bytes] = []

    for _ in range(40):
        tap.offer(*buffers, 512)
        tap.turn()
        got += tap.received()

    tap.net.close()
    found = []
    while got := list(dropwhile(lambda data: not data, got)):  # too small for a header: came back at once
        (count,) = struct.unpack_from("<H", got[0], 10)
        found.append(b"".join(got[:count])[12:])
        del got[:count]
    assert found == frames[: len(found)]
    wasted = 3000 + (len(sizes) + 1) * (12 + max(*buffers, 512))  # behind each frame, and for one that does not fit
    assert sum(map(len, found)) >= min(sum(sizes), 40 * 512 - wasted)
    assert tap.net.rx_dropped == 0


# Slow sides.


def test_frame_waits_for_more_buffers(rig: Rig) -> None:
    rig.wire.send(FRAME * 5)
    rig.turn()
    rig.offer(100, 100)
    few = rig.received()

    rig.offer(100, 100)

    assert few == []
    assert b"".join(rig.received()) == header(4) + FRAME * 5


# Limits.


def test_limits_of_each_direction(plugged: Callable[..., Rig]) -> None:
    """A tenth of a second's worth and one on credit, then so many a second."""
    rig = plugged(rx_ops=100, tx_ops=200)
    rig.start()
    rig.offer(*[100] * 100)
    rig.wire.send(*[FRAME] * 100)
    for _ in range(100):
        rig.driver.submit(TX, [PLAIN + FRAME])
    rig.driver.kick(TX)
    counts = []

    for _ in range(3):
        rig.turn()
        counts.append((len(rig.received()), len(rig.wire.frames())))
        rig.steps.advance(0.1)

    assert counts == [(11, 21), (10, 20), (10, 20)]


def test_bytes_per_second(plugged: Callable[..., Rig]) -> None:
    rig = plugged(tx_bandwidth="10K")
    rig.start()
    for _ in range(100):
        rig.driver.submit(TX, [PLAIN, bytes(1024)])
    rig.driver.kick(TX)
    first = len(rig.wire.frames())

    for _ in range(200):
        rig.steps.advance(0.01)
        rig.steps.turn()

    assert first == 2
    assert len(rig.wire.frames()) == pytest.approx(20, abs=1)


def test_burst(plugged: Callable[..., Rig]) -> None:
    rig = plugged(rx_ops=10, burst=5)
    rig.start()
    rig.offer(*[100] * 100)
    rig.wire.send(*[FRAME] * 100)

    rig.turn()

    assert len(rig.received()) == 51


def test_throttled_device_does_nothing_meanwhile(plugged: Callable[..., Rig]) -> None:
    """Hostile: row 45. Neither the frames that wait with the host nor those in the ring wake the loop."""
    rig = plugged(rx_ops=1, tx_ops=1)
    rig.start()
    rig.offer(*[100] * 4)
    rig.wire.send(*[FRAME] * 4)
    rig.turn()
    for _ in range(4):
        rig.send(PLAIN + FRAME)

    rig.turn()

    assert rig.waits_for == 0
    assert rig.steps._queue == []
    assert len(rig.steps._due) == 2


def test_throttled_device_leaves_the_processor_alone(tmp_path: Path) -> None:
    """Hostile: row 45, on the real loop: less than 2 % of a processor while both sides want more."""
    failures: list[BaseException] = []
    wire, board, loop = Wire(tmp_path / "wire"), FakeBoard(8 << 20), EventLoop("io", failures.append)
    board.loop = loop
    net = Net("socket", path=tmp_path / "wire", rx_ops=10, tx_ops=10)
    net.attach(board)
    loop.start()
    assert loop._thread is not None
    assert loop._thread.ident is not None
    clock = time.pthread_getcpuclockid(loop._thread.ident)
    driver = RingDriver(board)
    driver.start(MERGE)
    for _ in range(200):
        driver.submit(RX, writable=[2000])
        driver.submit(TX, [PLAIN + FRAME])
    wire.send(*[bytes(1500)] * 150)  # more than is read ahead
    driver.kick(RX)
    driver.kick(TX)
    time.sleep(0.2)  # the first batch has gone

    begin = time.clock_gettime(clock)
    time.sleep(1)
    busy = time.clock_gettime(clock) - begin
    loop.stop()
    counts = (len(driver.used(RX)), len(wire.frames()))
    net.close()
    wire.close()

    assert busy < 0.02
    assert counts == (pytest.approx(13, abs=3), pytest.approx(13, abs=3))
    assert failures == []


def test_limit_and_no_buffers(plugged: Callable[..., Rig]) -> None:
    """Hostile: row 44. Throttled and out of buffers, in any order: all frames arrive."""
    rig = plugged(rx_ops=1)
    rig.start()
    rig.wire.send(*[FRAME] * 6)
    found = []

    rig.offer(100)  # the limit has room, the ring then is empty
    rig.turn()
    rig.steps.advance(5)  # the timer finds no buffer
    rig.offer(100, 100)  # buffers come while there is a limit to wait for
    found.append(len(rig.received()))
    for _ in range(6):
        rig.steps.advance(1)
        rig.turn()
        rig.offer(100)
    found.append(len(rig.received()))

    assert found == [3, 3]


def test_rest_of_a_frame_is_sent_under_a_limit(plugged: Callable[..., Rig]) -> None:
    rig = plugged(tx_bandwidth="1K")
    rig.start()
    rig.wire.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    rig.net.backend._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # type: ignore[union-attr]
    rig.send(PLAIN, bytes(60_000))
    waited = rig.waits_for

    found = []
    for _ in range(60):
        found += rig.wire.frames()
        rig.turn()

    assert (waited, found) == (WRITE, [bytes(60_000)])
    assert rig.net._limits[TX].waiting
    assert rig.waits_for == 0


def test_frames_that_are_dropped_cost_no_bytes(plugged: Callable[..., Rig]) -> None:
    rig = plugged(tx_bandwidth="1K")
    rig.start()

    rig.send(PLAIN, bytes(1 << 20))

    assert not rig.net._limits[TX].waiting


def test_other_end_goes_while_throttled(plugged: Callable[..., Rig]) -> None:
    rig = plugged(rx_ops=1)
    rig.start()
    rig.offer(*[100] * 9)
    rig.wire.send(*[FRAME] * 9)
    rig.turn()
    rig.wire.peer.close()

    rig.turn()

    assert rig.driver.config(6, 2) == 0
    assert rig.steps.watched == {}


def test_limit_outlives_a_reset(plugged: Callable[..., Rig]) -> None:
    rig = plugged(tx_ops=1)
    rig.start()
    for _ in range(3):
        rig.send(PLAIN + FRAME)

    rig.start()
    rig.send(PLAIN + FRAME)
    early = len(rig.wire.frames())
    rig.steps.advance(1)
    rig.steps.turn()

    assert (early, len(rig.wire.frames())) == (2, 1)


# Hostile drivers.


def test_frame_for_which_the_whole_ring_is_too_small(rig: Rig) -> None:
    rig.driver.start(MERGE, [2, 2])
    rig.offer(30, 30)
    rig.wire.send(FRAME, FRAME[:20])

    for _ in range(3):
        rig.turn()

    assert rig.net.rx_dropped == 1
    assert b"".join(rig.received()) == header(2) + FRAME[:20]


def test_driver_that_breaks_the_queue(rig: Rig) -> None:
    """The wire keeps its frames, nothing spins, and after a reset it works again."""
    rig.offer(100)
    rig.driver.publish(RX, 0xFFFF)
    rig.wire.send(FRAME, FRAME)
    rig.turn()
    broken, waits_for = rig.driver.needs_reset, rig.waits_for

    rig.start()
    rig.offer(100, 100)

    assert (broken, waits_for) == (True, 0)
    assert not rig.driver.needs_reset
    assert header() + FRAME in rig.received()


# Offloads.


@pytest.mark.parametrize("kind", [1, 4, 0x81, 0x84])
def test_offloads_go_to_the_tap(tap: Rig, kind: int) -> None:
    said = struct.pack("<BBHHHHH", 0xFF, kind, 54, 1460, 34, 16, 0xFFFF)

    tap.send(said + FRAME)

    assert tap.net.tap.sent == [struct.pack("<BBHHHHH", 1, kind, 54, 1460, 34, 16, 0) + FRAME]


def test_offloads_reach_the_guest(tap: Rig) -> None:
    tap.offer(100)
    tap.net.tap.incoming = [struct.pack("<BBHHHHH", 1, 4, 74, 1440, 54, 16, 0) + FRAME]

    tap.turn()

    assert tap.received() == [struct.pack("<BBHHHHH", 1, 4, 74, 1440, 54, 16, 1) + FRAME]


# The life of the device.


@pytest.mark.parametrize("waiting", ["for frames", "for nothing"])
def test_other_end_goes(rig: Rig, waiting: str) -> None:
    rig.offer(*[100] * (waiting == "for frames"))
    rig.wire.peer.close()

    rig.turn()

    assert rig.driver.config(6, 2) == 0  # no LINK_UP
    assert rig.driver.interrupts() & INTERRUPT.CONFIGURATION
    assert [event for event, _ in rig.board.logs] == ["a network link is down"]
    assert rig.steps.watched == {}


def test_other_end_goes_while_the_guest_sends(rig: Rig) -> None:
    rig.wire.peer.close()

    heads = [rig.send(PLAIN + FRAME), rig.send(PLAIN + FRAME)]

    assert rig.driver.used(TX) == [(head, 0) for head in heads]
    assert rig.driver.config(6, 2) == 0
    assert len(rig.board.logs) == 1


def test_other_end_goes_before_the_driver_is_up(plugged: Callable[..., Rig]) -> None:
    rig = plugged()
    rig.wire.peer.close()

    rig.turn()
    rig.start()

    assert rig.driver.config(6, 2) == 0


def test_other_end_sends_nonsense(rig: Rig) -> None:
    rig.offer(100)
    rig.wire.peer.send(b"\xff\xff\xff\xff")

    rig.turn()

    assert rig.driver.config(6, 2) == 0
    assert "sent a frame of 4294967295 bytes" in str(rig.board.logs[0][1]["why"])


def test_plugged_into_nothing(tmp_path: Path) -> None:
    rig = Rig(Net("none", pcap=tmp_path / "capture"), None)
    rig.start()

    head = rig.send(PLAIN + FRAME)

    assert rig.driver.used(TX) == [(head, 0)]
    assert rig.driver.config(6, 2) == 0
    assert (tmp_path / "capture").read_bytes()[40:] == FRAME
    rig.net.close()


def test_cable_is_pulled_out_and_put_in_again(rig: Rig) -> None:
    """What the guest sends meanwhile is lost, what the host sends waits, and nothing is watched."""
    rig.offer(100, 100)
    with rig.net.lock:
        rig.net.set_link(False)
    out = (rig.driver.config(6, 2), rig.driver.interrupts() & INTERRUPT.CONFIGURATION, dict(rig.steps.watched))
    head = rig.send(PLAIN + b"lost" * 15)
    rig.wire.send(FRAME)
    rig.turn()
    meanwhile = (rig.driver.used(TX), rig.received(), rig.wire.frames())

    with rig.net.lock:
        rig.net.set_link(True)
    rig.turn()
    rig.send(PLAIN + FRAME)

    assert out == (0, INTERRUPT.CONFIGURATION, {})
    assert meanwhile == ([(head, 0)], [], [])
    assert (rig.driver.config(6, 2), rig.driver.interrupts() & INTERRUPT.CONFIGURATION) == (1, INTERRUPT.CONFIGURATION)
    assert (rig.received(), rig.wire.frames()) == ([header() + FRAME], [FRAME])


def test_cable_is_pulled_out_before_a_reset(plugged: Callable[..., Rig]) -> None:
    rig = plugged(link=False)
    rig.start()
    without = rig.driver.config(6, 2)
    rig.wire.send(FRAME)
    rig.start()
    rig.offer(100)

    with rig.net.lock:
        rig.net.set_link(True)
    rig.turn()

    assert (without, rig.driver.config(6, 2)) == (0, 1)
    assert rig.received() == [header() + FRAME]


def test_other_end_goes_while_there_is_no_cable(plugged: Callable[..., Rig]) -> None:
    rig = plugged(link=False)
    rig.start()
    rig.wire.peer.close()
    rig.turn()

    with rig.net.lock:
        rig.net.set_link(True)
    rig.turn()

    assert rig.driver.config(6, 2) == 0
    assert [event for event, _ in rig.board.logs] == ["a network link is down"]


def test_reset_and_again(rig: Rig) -> None:
    for _ in range(100):
        rig.offer(100)
        rig.driver.set("Status", 0)
        rig.start()
    rig.offer(100)
    rig.wire.send(FRAME)

    rig.turn()

    assert rig.received() == [header() + FRAME]


def test_nothing_moves_after_a_reset(rig: Rig) -> None:
    rig.offer(100)
    rig.driver.submit(TX, [PLAIN + FRAME])
    rig.driver.set("QueueNotify", TX)
    rig.driver.set("Status", 0)
    rig.wire.send(FRAME)

    rig.turn()

    assert (rig.received(), rig.wire.frames(), rig.waits_for) == ([], [], 0)


def test_state_and_restore(rig: Rig) -> None:
    rig.offer(100, 100)
    rig.driver.submit(TX, [PLAIN + FRAME])
    state = rig.driver.transport.state()

    rig.driver.set("Status", 0)
    rig.net.mac = bytes(6)
    rig.driver.transport.restore(state)
    rig.wire.send(FRAME)
    rig.turn()

    assert rig.received() == [header() + FRAME]
    assert rig.wire.frames() == [FRAME]
    assert rig.net.mac == parse_mac(MAC)


def test_restored_without_its_link(rig: Rig) -> None:
    state = rig.driver.transport.state()
    rig.wire.peer.close()
    rig.turn()
    rig.driver.interrupts()

    rig.driver.transport.restore(state)

    assert rig.driver.interrupts() & INTERRUPT.CONFIGURATION


def test_capture(plugged: Callable[..., Rig], tmp_path: Path) -> None:
    rig = plugged(pcap=tmp_path / "capture")
    rig.start()
    rig.offer(40, 40)

    rig.send(PLAIN, b"sent" * 15)
    rig.wire.send(b"received" * 7)
    rig.turn()

    capture = (tmp_path / "capture").read_bytes()
    assert capture[32:40] == struct.pack("<II", 60, 60)
    assert (capture[40:100], capture[116:]) == (b"sent" * 15, b"received" * 7)


def test_capture_that_ends(plugged: Callable[..., Rig], tmp_path: Path) -> None:
    rig = plugged(pcap=tmp_path / "capture")
    rig.start()
    rig.net._pcap._fd, kept = -2, rig.net._pcap._fd  # type: ignore[union-attr]

    for _ in range(3):
        rig.send(PLAIN + FRAME)

    assert rig.wire.frames() == [FRAME] * 3
    assert [event for event, _ in rig.board.logs] == ["a network capture has ended"]
    os.close(kept)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "bridge"}, 'unknown network "bridge"; use user, tap, socket or none'),
        ({"mac": "02:00:00:00:00"}, '"02:00:00:00:00" is no MAC address; use one such as 02:00:00:00:00:01'),
        ({"mac": "0_:00:00:00:00:01"}, "is no MAC address"),
        ({"mac": "01:00:5e:00:00:01"}, "01:00:5e:00:00:01 is a multicast address; use an even first byte"),
        ({"mac": "ff:ff:ff:ff:ff:ff"}, "is a multicast address"),
        ({"mac": "00:00:00:00:00:00"}, "00:00:00:00:00:00 is no address of an interface"),
        ({"mtu": 67}, "a network device cannot have mtu=67; use 68 to 65535"),
        ({"mtu": 65536}, "mtu=65536"),
        ({"backend": "socket"}, 'the network "socket" needs a path'),
        ({"path": Path("x")}, 'path=x means nothing to the network "user"; it is for socket'),
        ({"backend": "none", "publish": "80:80"}, "it is for user"),
        ({"name": "tap0"}, "it is for tap"),
        ({"rx_bandwidth": "fast"}, 'invalid bandwidth "fast"; give bytes per second, e.g. 10M'),
        ({"tx_ops": 0}, "invalid tx_ops 0; give frames per second, 1 or more"),
        ({"burst": 0.0}, "invalid burst 0; give seconds, 0.01 to 3600"),
        ({"burst": float("nan")}, "invalid burst nan"),
        ({"backend": "tap", "name": "a/b"}, '"a/b" is no name for a network interface'),
        ({"backend": "tap", "name": "x" * 16}, "is no name for a network interface"),
        ({"backend": "tap", "name": "tap%d"}, "is no name for a network interface"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Net(**options)  # type: ignore[arg-type]


def test_two_cards_with_one_address() -> None:
    board = FakeBoard()
    Net("none", mac=MAC).attach(board)

    with pytest.raises(ConfigError, match=f"two network devices have mac={MAC}; give each its own"):
        Net("none", mac=MAC).attach(board)


def test_default_address_that_is_taken() -> None:
    board, other = FakeBoard(), FakeBoard()
    first, second = Net("none"), Net("none")
    first.attach(other)

    Net("none", mac=first.mac.hex(":")).attach(board)
    second.attach(board)

    assert second.mac != first.mac


def test_socket_without_a_peer(tmp_path: Path) -> None:
    with pytest.raises(
        NotFoundError, match=r"cannot connect the network to .*none.: no such socket; start what listens"
    ):
        Net("socket", path=tmp_path / "none").attach(FakeBoard())


def test_socket_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(HostError, match=r"cannot connect the network to .*file.: it is no socket; name"):
        Net("socket", path=tmp_path / "file").attach(FakeBoard())
