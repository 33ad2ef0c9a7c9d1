"""The devices in examples/: made as the command line makes them, and driven as a guest would."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpy import catalogue
from kvmpy.core.errors import ConfigError, HostError
from kvmpy.testing import MMIO_BASE, FakeBoard, RingDriver
from kvmpy.virtio.blk import HEADER, S, T

EXAMPLES = Path(__file__).parents[2] / "examples"
SECTOR = 512
TX, VNET_HEADER, ETH_HEADER = 1, 12, 14  # VIRTIO 1.2, 5.1.2 and 5.1.6; IEEE 802.3
LENGTH = 4  # bytes in front of each frame on a `socket` line
FRAMES = 200


def example(text: str) -> Any:
    """The device that --device makes of `text`, a file in examples/ with class and options."""
    return catalogue.make(f"{EXAMPLES}/{text}")


# The register bank.


@pytest.fixture
def bank() -> FakeBoard:
    board = FakeBoard()
    example("hello_mmio.py:HelloMmio,greeting=Ahoy").attach(board)
    return board


def test_bank_tells_where_it_is(bank: FakeBoard) -> None:
    assert bank.words == [f"hello_mmio={MMIO_BASE:#x}"]


def test_bank_greets(bank: FakeBoard) -> None:
    bank.memory_bus.write(MMIO_BASE, 4, 0)

    assert bank.memory_bus.read(MMIO_BASE, 4).to_bytes(4, "little") == b"Ahoy"


def test_bank_adds_up(bank: FakeBoard) -> None:
    bank.memory_bus.write(MMIO_BASE + 4, 4, 0xFFFF_FFFF)
    bank.memory_bus.write(MMIO_BASE + 4, 4, 12)

    assert bank.memory_bus.read(MMIO_BASE + 4, 4) == 12
    assert bank.memory_bus.read(MMIO_BASE + 8, 4) == 11
    assert [bank.memory_bus.read(MMIO_BASE + 12, 4) for _ in range(2)] == [2, 0]


def test_greeting_has_four_characters() -> None:
    with pytest.raises(ConfigError, match="greeting"):
        example("hello_mmio.py:HelloMmio,greeting=Good morning")


# The flaky disk.


def statuses(image: Path, options: str, count: int) -> list[int]:
    """Of so many writes to a new FlakyDisk, one after the other."""
    image.write_bytes(bytes(4 * SECTOR))
    board = FakeBoard()
    device = example(f"flaky_disk.py:FlakyDisk,path={image},{options}")
    device.attach(board)
    driver = RingDriver(board)
    driver.start()
    found = [driver.request(0, [HEADER.pack(T.OUT, 0, 1), b"x" * SECTOR], [1])[0] for _ in range(count)]
    assert not driver.needs_reset
    device.close()
    return found


def test_flaky_disk_fails_every_request(tmp_path: Path) -> None:
    assert statuses(tmp_path / "image", "rate=1", 3) == [S.IOERR] * 3
    assert (tmp_path / "image").read_bytes() == bytes(4 * SECTOR)


def test_flaky_disk_that_is_none(tmp_path: Path) -> None:
    assert statuses(tmp_path / "image", "rate=0", 3) == [S.OK] * 3
    assert (tmp_path / "image").read_bytes() == bytes(SECTOR) + b"x" * SECTOR + bytes(2 * SECTOR)


def test_flaky_disk_fails_at_its_rate(tmp_path: Path) -> None:
    first, second = (statuses(tmp_path / "image", "rate=0.3,seed=1", 200) for _ in range(2))

    assert 40 <= first.count(S.IOERR) <= 80
    assert first == second


def test_rate_is_a_share() -> None:
    with pytest.raises(ConfigError, match="rate"):
        example("flaky_disk.py:FlakyDisk,path=image,rate=10")


# The bad line.


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a PacketDropper can be plugged in."""
    pytest.importorskip("kvmpy.virtio.net", reason="there is no network device yet")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "wire"))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize(("share", "least", "most"), [(0, FRAMES, FRAMES), (0.3, 120, 160)])
def test_line_loses_what_the_guest_sends(listener: socket.socket, share: float, least: int, most: int) -> None:
    board = FakeBoard(8 << 20)
    options = f"share={share},seed=1,backend=socket,path={listener.getsockname()}"
    device = example(f"packet_dropper.py:PacketDropper,{options}")
    device.attach(board)
    driver = RingDriver(board)
    driver.start()
    line, _ = listener.accept()

    for _ in range(FRAMES):
        driver.request(TX, [bytes(VNET_HEADER + ETH_HEADER)])
    device.close()

    with line, line.makefile("rb") as stream:
        arrived = len(stream.read()) // (LENGTH + ETH_HEADER)
    assert least <= arrived <= most


@pytest.mark.parametrize(("share", "least", "most"), [(0, FRAMES, FRAMES), (0.3, 120, 160)])
def test_line_loses_what_comes(listener: socket.socket, share: float, least: int, most: int) -> None:
    options = f"share={share},seed=1,backend=socket,path={listener.getsockname()}"
    device = example(f"packet_dropper.py:PacketDropper,{options}")
    wire = device.open()
    line, _ = listener.accept()
    frame = bytes(ETH_HEADER)

    with line:
        line.sendall((len(frame).to_bytes(LENGTH, "big") + frame) * FRAMES)
    arrived = 0
    with pytest.raises(HostError):  # the end of the line
        while wire.receive() is not None:
            arrived += 1
    wire.close()

    assert least <= arrived <= most


@pytest.mark.parametrize("share", ["1", "-0.1"])
def test_share_is_less_than_all(listener: socket.socket, share: str) -> None:
    with pytest.raises(ConfigError, match="share"):
        example(f"packet_dropper.py:PacketDropper,share={share}")


# What the files say of themselves.


def test_every_example_tells_how_to_run_it() -> None:
    for path in EXAMPLES.glob("*.py"):
        (told,) = re.findall(r"kvmpy boot --device \./examples/(\S+?\.py):(\w+)", path.read_text())
        assert told[0] == path.name
        assert f"\nclass {told[1]}(" in path.read_text()
