"""kvmpy.faults: what is injected happens, nothing else does, and the same seed does it again."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import CONTENT, FEATURES, SECTORS, Disk
from nics import FRAME, PLAIN, Rig, TapNet, header

from kvmpy import faults
from kvmpy.core.board import Reason
from kvmpy.core.errors import ConfigError
from kvmpy.core.irq import IrqLine
from kvmpy.faults.interrupts import FaultyLine
from kvmpy.faults.plan import Plan
from kvmpy.testing import FakeBoard, IrqRecorder, RingDriver
from kvmpy.virtio.blk import Blk, S, T
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.rng import Rng


class Faulty(Disk):
    """A disk with faults, and a driver that is up."""

    def __init__(self, path: Path, *what: Any, seed: int = 0, **options: Any) -> None:
        self.device = Blk(path=path, **options)
        self.injected = faults.inject(self.device, *what, seed=seed)
        self.board = FakeBoard(16 << 20)
        self.device.attach(self.board)
        self.driver = RingDriver(self.board)
        self.driver.start(FEATURES)

    def statuses(self, count: int, kind: int = T.OUT) -> list[int]:
        """Of so many requests for one sector each."""
        data: tuple[list[bytes], list[int]] = ([], [512]) if kind == T.IN else ([b"x" * 512], [])
        return [self.request(kind, n, *data)[0] for n in range(count)]


# Disks.


def test_nth_request_fails_and_leaves_the_image_alone(path: Path) -> None:
    disk = Faulty(path, faults.Fail("write", nth=3))

    assert disk.statuses(5) == [S.OK, S.OK, S.IOERR, S.OK, S.OK]
    assert path.read_bytes()[2 * 512 : 3 * 512] == CONTENT[2 * 512 : 3 * 512]
    assert [(hit.number, hit.on, hit.at, hit.size) for hit in disk.injected] == [(2, "write", 2, 1)]
    assert disk.works


def test_sectors_fail(path: Path) -> None:
    disk = Faulty(path, faults.Fail(sectors=range(10, 12)))

    outcomes = [disk.request(T.IN, at, room=[1024])[0] for at in (8, 9, 10, 11, 12)]

    assert outcomes == [S.OK, S.IOERR, S.IOERR, S.IOERR, S.OK]
    assert disk.request(T.FLUSH)[0] == S.OK


@pytest.mark.parametrize("operation", ["read", "write", "flush", "discard", "zero"])
def test_one_kind_of_request_fails(path: Path, operation: str) -> None:
    disk = Faulty(path, faults.Fail(operation))

    outcomes = {
        "read": disk.request(T.IN, 0, room=[512])[0],
        "write": disk.write(0, bytes(512)),
        "flush": disk.request(T.FLUSH)[0],
        "discard": disk.segments(T.DISCARD, (8, 8, 0)),
        "zero": disk.segments(T.WRITE_ZEROES, (8, 8, 0)),
    }

    assert [name for name, status in outcomes.items() if status == S.IOERR] == [operation]


def test_share_of_requests_fails_and_the_same_ones_again(path: Path) -> None:
    fault = faults.Fail("write", probability=0.3)

    first, again, other = (Faulty(path, fault, seed=seed, snapshot=True).statuses(200) for seed in (1, 1, 2))

    assert 40 <= first.count(S.IOERR) <= 80
    assert first == again != other


def test_fault_is_not_changed_by_another_one_behind_it(path: Path) -> None:
    fault = faults.Fail("write", probability=0.3)

    alone = Faulty(path, fault, snapshot=True).statuses(100)
    both = Faulty(path, fault, faults.Fail("read", probability=0.5), snapshot=True).statuses(100)

    assert alone == both


def test_error_of_choice(path: Path) -> None:
    disk = Faulty(path, faults.Fail("write", error=errno.ENOSPC))

    assert disk.write(0, bytes(512)) == S.IOERR
    assert [fields["why"] for _, fields in disk.board.logs] == [os.strerror(errno.ENOSPC)]


def test_flush_that_failed_once_fails_ever_after(path: Path) -> None:
    disk = Faulty(path, faults.Fail("flush", nth=2))

    assert [disk.request(T.FLUSH)[0] for _ in range(4)] == [S.OK, S.IOERR, S.IOERR, S.IOERR]
    assert len(disk.injected) == 1
    assert disk.works


def kept(path: Path) -> list[bool]:
    """Of each sector of the image, whether the x has come."""
    data = path.read_bytes()
    return [data[at : at + 512] == b"x" * 512 for at in range(0, len(data), 512)]


@pytest.mark.parametrize(("error", "status"), [(errno.EIO, S.IOERR), (0, S.OK)])
def test_short_write(path: Path, error: int, status: int) -> None:
    disk = Faulty(path, faults.Short("write", error=error), seed=3)

    assert disk.write(0, b"x" * 512 * SECTORS) == status
    done = kept(path)
    assert 0 < done.count(True) < SECTORS
    assert done == sorted(done, reverse=True)
    assert path.read_bytes()[512 * done.count(True) :] == CONTENT[512 * done.count(True) :]


@pytest.mark.parametrize(("error", "status"), [(errno.EIO, S.IOERR), (0, S.OK)])
def test_torn_write(path: Path, error: int, status: int) -> None:
    disk = Faulty(path, faults.Torn("write", error=error))

    assert disk.write(0, b"x" * 512 * SECTORS) == status
    done = kept(path)
    assert SECTORS // 4 < done.count(True) < SECTORS
    assert done != sorted(done, reverse=True)


def test_torn_write_is_never_whole(path: Path) -> None:
    disk = Faulty(path, faults.Torn("write", error=0))

    for n in range(50):
        disk.write(4 * n, b"x" * 512 * 4)
        assert not all(kept(path)[4 * n : 4 * n + 4])


def test_short_read(path: Path) -> None:
    disk = Faulty(path, faults.Short("read", nth=1), seed=5)

    status, data, _ = disk.request(T.IN, 0, room=[512 * SECTORS])

    came = next(n for n in range(len(data)) if data[n] != CONTENT[n])
    assert (status, came % 512, data[came:]) == (S.IOERR, 0, bytes(len(data) - came))
    assert disk.read(0, SECTORS) == CONTENT


@pytest.mark.parametrize("operation", ["write", "discard", "zero"])
def test_ignored(path: Path, operation: str) -> None:
    disk = Faulty(path, faults.Ignore(operation))

    outcome = {
        "write": lambda: disk.write(0, bytes(4096)),
        "discard": lambda: disk.segments(T.DISCARD, (0, 8, 0)),
        "zero": lambda: disk.segments(T.WRITE_ZEROES, (0, 8, 0)),
    }[operation]()

    assert outcome == S.OK
    assert path.read_bytes() == CONTENT


def test_ignored_flush(path: Path, syncs: list[int]) -> None:
    disk = Faulty(path, faults.Ignore("flush", nth=1))

    assert [disk.request(T.FLUSH)[0] for _ in range(2)] == [S.OK, S.OK]
    assert len(syncs) == 1


def test_delays_add_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    disk = Faulty(path, faults.Delay("read", seconds=0.5), faults.Delay(seconds=0.25), faults.Fail("write"))

    assert disk.statuses(1, T.IN) + disk.statuses(1) == [S.OK, S.IOERR]
    assert slept == [0.5, 0.25, 0.25]


def test_no_twin_goes_round_the_faults(path: Path) -> None:
    disk = Faulty(path, faults.Fail(probability=0))

    assert disk.works
    assert not disk.device._twins
    disk.device.close()
    assert Disk(path).device._twins  # as it is without


def test_discards_of_a_disk_with_faults_are_done(path: Path) -> None:
    disk = Faulty(path, faults.Fail(probability=0))

    assert disk.segments(T.WRITE_ZEROES, (3, 5, 0)) == S.OK
    assert path.read_bytes() == CONTENT[: 3 * 512] + bytes(5 * 512) + CONTENT[8 * 512 :]


# Power cuts as they happen.


def test_power_cut_keeps_what_was_flushed(path: Path) -> None:
    disk = Faulty(path, faults.PowerCut(nth=3))

    assert disk.write(0, b"a" * 4096) == S.OK
    assert disk.request(T.FLUSH)[0] == S.OK
    assert [disk.write(8, b"b" * 4096), disk.write(16, b"c" * 4096)] == [S.OK, S.IOERR]

    assert [stop.reason for stop in disk.board.stops] == [Reason.QUIT]
    assert disk.request(T.IN, 0, room=[512])[0] == disk.request(T.FLUSH)[0] == disk.write(0, bytes(512)) == S.IOERR
    after = path.read_bytes()
    assert after[:4096] == b"a" * 4096
    assert after[4096:8192] in (CONTENT[4096:8192], b"b" * 4096)
    assert after[8192:12288] in (CONTENT[8192:12288], b"c" * 4096)
    assert after[12288:] == CONTENT[12288:]


def test_every_outcome_of_a_power_cut_is_met(path: Path) -> None:
    outcomes = set()
    for seed in range(60):
        path.write_bytes(CONTENT)
        disk = Faulty(path, faults.PowerCut(nth=3), seed=seed)
        for at in (0, 8, 16):
            disk.write(at, b"x" * 4096)
        disk.device.close()
        outcomes.add(tuple(kept(path)[:24:8]))

    assert len(outcomes) == 8


def test_disk_without_its_power_cut_is_like_any(path: Path) -> None:
    disk = Faulty(path, faults.PowerCut(nth=1000))

    disk.write(3, b"x" * 1024)
    disk.segments(T.WRITE_ZEROES, (4, 2, 0))
    expected = CONTENT[: 3 * 512] + b"x" * 512 + bytes(1024) + CONTENT[6 * 512 :]

    assert disk.read(0, SECTORS) == expected
    assert path.read_bytes() == CONTENT
    disk.device.close()
    assert path.read_bytes() == expected


# Network cards.


Card = Callable[..., tuple[Rig, list[faults.Injected]]]


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Card:
    """Makes a card with faults, and a driver that is up."""

    def card(*what: Any) -> tuple[Rig, list[faults.Injected]]:
        net = TapNet("tap", mac="02:00:00:00:00:01")
        injected = faults.inject(net, *what)
        rig = Rig(net, None)
        request.addfinalizer(net.close)
        rig.start()
        return rig, injected

    return card


def sent(rig: Rig, count: int) -> list[int]:
    """Frames that arrive when the guest sends frames 0, 1, 2, ..., by their numbers."""
    for n in range(count):
        rig.send(PLAIN, FRAME + bytes([n]))
    return [frame[-1] for frame in rig.net.tap.sent]  # type: ignore[attr-defined]


def received(rig: Rig, count: int) -> list[bytes]:
    rig.offer(*[2048] * (2 * count))
    rig.net.tap.incoming += [header() + FRAME + bytes([n]) for n in range(count)]  # type: ignore[attr-defined]
    rig.turn()
    return rig.received()


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [
        (faults.Drop("send", nth=2), [0, 2, 3]),
        (faults.Duplicate("send", nth=2), [0, 1, 1, 2, 3]),
        (faults.Reorder("send", nth=2), [0, 2, 1, 3]),
        (faults.Drop("receive"), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_frames_from_the_guest(card: Card, fault: faults.Fault, arrives: list[int]) -> None:
    rig, _ = card(fault)

    assert sent(rig, 4) == arrives


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [
        (faults.Drop("receive", nth=2), [0, 2, 3]),
        (faults.Duplicate("receive", nth=2), [0, 1, 1, 2, 3]),
        (faults.Reorder("receive", nth=2), [0, 2, 1, 3]),
        (faults.Drop("send"), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_frames_to_the_guest(card: Card, fault: faults.Fault, arrives: list[int]) -> None:
    rig, _ = card(fault)

    assert [frame[-1] for frame in received(rig, 4)] == arrives


def test_corrupt_frame_differs_in_a_bit_of_its_content(card: Card) -> None:
    rig, injected = card(faults.Corrupt("receive"))

    (frame, *_) = received(rig, 1)

    difference = int.from_bytes(frame) ^ int.from_bytes(header() + FRAME + b"\0")
    assert difference.bit_count() == 1
    assert frame[:26] == (header() + FRAME)[:26]
    assert len(injected) == 1


def test_frames_get_lost_at_their_rate(card: Card) -> None:
    rig, injected = card(faults.Drop(probability=0.3))

    arrived = len(sent(rig, 200))

    assert 120 <= arrived <= 160
    assert len(injected) == 200 - arrived


def test_late_frames(card: Card) -> None:
    rig, _ = card(faults.Late("send", nth=1, seconds=2), faults.Late("receive", nth=1, seconds=3))

    outgoing, incoming = sent(rig, 2), [frame[-1] for frame in received(rig, 2)]
    rig.steps.advance(2)
    late = [frame[-1] for frame in rig.net.tap.sent]  # type: ignore[attr-defined]
    rig.steps.advance(1)
    rig.steps.turn()

    assert (outgoing, late) == ([1], [1, 0])
    assert (incoming, [frame[-1] for frame in rig.received()]) == ([1], [0])


def test_frame_that_is_too_late(card: Card) -> None:
    late, _ = card(faults.Late("send", seconds=2))
    sent(late, 1)
    late.net.close()

    late.steps.advance(3)

    assert late.net.tap.sent == []  # type: ignore[attr-defined]


def test_hangup_takes_the_link_down(card: Card) -> None:
    rig, _ = card(faults.Hangup("send", nth=2))

    arrived = sent(rig, 3)

    assert arrived == [0]
    assert not rig.net.link
    assert not rig.driver.needs_reset


# Interrupts.


def test_lost_interrupt(transport: str) -> None:
    device, board = Rng(), FakeBoard(transport=transport)
    injected = faults.inject(device, faults.LostInterrupt(nth=2))
    device.attach(board)
    driver = RingDriver(board)
    driver.start()

    interrupts = []
    for _ in range(3):
        driver.request(0, writable=[16])
        interrupts.append(driver.interrupts())

    assert [bool(given) for given in interrupts] == [True, False, True]
    assert [hit.number for hit in injected] == [1]


def test_interrupts_are_lost_after_a_reset_too(path: Path) -> None:
    disk = Faulty(path, faults.LostInterrupt())
    disk.driver.start(FEATURES)

    assert disk.works
    assert disk.driver.interrupts() == 0
    assert len(disk.injected) == 1


class Bell:
    """Any device that is not virtio's."""

    def attach(self, board: Any) -> None:
        self.line: IrqLine = board.irq(5)
        self.message = board.msi()


def test_lines_and_messages_of_other_devices() -> None:
    board, bell = FakeBoard(), Bell()
    faults.inject(bell, faults.LostInterrupt(nth=1))
    bell.attach(board)

    bell.line.pulse()
    bell.line.pulse()
    bell.message.pulse()

    assert board.lines[5].pulses == 1
    assert board.messages[0].pulses == 1


def test_level_that_does_not_rise() -> None:
    real = IrqRecorder()
    line = FaultyLine(real, Plan([faults.LostInterrupt(nth=2)], "0", []))

    levels = []
    for level in (True, False, True, True, False, True):
        line.set(level)
        levels.append(real.level)

    assert levels == [True, False, False, True, False, True]


# What cannot be.


BAD: list[tuple[type[VirtioDevice], faults.Fault, str]] = [
    (Rng, faults.Fail(), "it is for Blk"),
    (Rng, faults.Fault(), "no fault that a device can have"),
    (Blk, faults.Drop(), "it is for Net"),
    (Blk, faults.Fail("send"), "use any, read, write"),
    (Blk, faults.Fail(nth=-1), "nth=-1"),
    (Blk, faults.Fail(probability=2), "0 to 1"),
    (Blk, faults.PowerCut("read"), "use any, write, flush"),
]


@pytest.mark.parametrize(("kind", "fault", "why"), BAD, ids=lambda value: str(value))
def test_faults_that_cannot_be(path: Path, kind: type[VirtioDevice], fault: faults.Fault, why: str) -> None:
    device = Blk(path=path) if kind is Blk else kind()

    with pytest.raises(ConfigError, match=re.escape(why)):
        faults.inject(device, fault)


def test_write_log_of_two_disks(path: Path) -> None:
    log = faults.WriteLog()
    Faulty(path, log, snapshot=True)

    with pytest.raises(ConfigError, match="two disks"):
        Faulty(path, log, snapshot=True)


def test_too_late(path: Path) -> None:
    disk = Faulty(path)

    with pytest.raises(ConfigError, match="inject them before"):
        faults.inject(disk.device, faults.Fail())
