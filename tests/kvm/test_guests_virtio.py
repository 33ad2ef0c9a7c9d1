"""A driver in a guest reaches a device through a real ioeventfd, and is answered through a real irqfd."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rig import SECONDS, Rig

from kvmpy.core.board import Reason, Stop
from kvmpy.core.bus import Bus
from kvmpy.core.errors import ConfigError
from kvmpy.core.events import EventLoop
from kvmpy.kvm import exits
from kvmpy.mainboard import MainBoard
from kvmpy.pci.config import MEMORY_BAR_64
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.mmio import QUEUE_NOTIFY
from kvmpy.virtio.net import Net
from kvmpy.virtio.pci import BAR_SIZE, NOTIFY, TABLE
from kvmpy.virtio.queue import VirtQueue
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.spec import INTERRUPT
from kvmpy.x86 import layout

BAR, VECTOR = 0xE2000000, 0x36  # guests/virtio_pci.S
GUEST, PEER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
ETHERTYPE = bytes.fromhex("88b5")  # for experiments (IEEE 802)
UP = 0xF  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK


def written(vm: Rig) -> list[int]:
    """The addresses of the last MMIO writes that left KVM."""
    return [exit.address for exit in vm.thread.recent() if exit.reason == exits.EXIT_MMIO and exit.is_write]


@pytest.fixture
def make_board(vm: Rig) -> Iterator[Callable[..., MainBoard]]:
    """Makes a board on the rig's VM, whose devices the guest sees."""
    with ExitStack() as stack:

        def make(*, pci: bool) -> MainBoard:
            loop = EventLoop("io", lambda error: vm.stops.put(Stop(Reason.ERROR, cause=error)))
            board = MainBoard(vm.vm, vm.mem, loop, vm.stops.put, pci=pci)
            stack.callback(board.close)
            stack.callback(loop.stop)
            stack.callback(vm.finish)
            vm.mmio = board.memory_bus
            loop.start()
            board.start_loops()
            return board

        yield make


@pytest.fixture
def board(make_board: Callable[..., MainBoard]) -> MainBoard:
    """With virtio-mmio."""
    return make_board(pci=False)


@pytest.fixture
def pci_board(make_board: Callable[..., MainBoard]) -> MainBoard:
    return make_board(pci=True)


def test_one_request(vm: Rig, board: MainBoard) -> None:
    Rng().attach(board)

    stop = vm.run("virtio")

    assert stop == Stop(Reason.EXIT)
    status, interrupt, index, length, _last, data = vm.reports
    assert (status, interrupt, index, length) == (UP, INTERRUPT.USED_BUFFER, 1, 513)
    assert data != 0


def test_sector_of_a_disk(vm: Rig, board: MainBoard, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"boot" * 128)
    disk = Blk(path=tmp_path / "disk.img")
    disk.attach(board)

    vm.run("virtio")

    _, _, _, length, status, data = vm.reports
    assert (length, status, data.to_bytes(4, "little")) == (513, 0, b"boot")


def test_disk_is_served_by_a_thread_of_its_own(vm: Rig, board: MainBoard, tmp_path: Path) -> None:
    """One that waits for the host keeps nobody else waiting; the thread ends with the board."""
    (tmp_path / "disk.img").write_bytes(b"boot" * 128)
    threads: list[str] = []

    class Disk(Blk):
        def notify(self, index: int, queue: VirtQueue) -> None:
            threads.append(threading.current_thread().name)
            super().notify(index, queue)

    Disk(path=tmp_path / "disk.img").attach(board)

    vm.run("virtio")
    board.close()

    assert set(threads) == {"kvmpy-disk0"}
    assert "kvmpy-disk0" not in [thread.name for thread in threading.enumerate()]


def test_kick_is_no_exit(vm: Rig, board: MainBoard) -> None:
    """The write to QueueNotify never reaches the bus."""
    Rng().attach(board)

    vm.run("virtio")

    writes = written(vm)
    assert layout.MMIO_DEVICES + 0x64 in writes  # InterruptACK
    assert layout.MMIO_DEVICES + QUEUE_NOTIFY not in writes


def test_one_request_over_pci(vm: Rig, pci_board: MainBoard) -> None:
    Rng().attach(pci_board)

    stop = vm.run("virtio_pci")

    assert stop == Stop(Reason.EXIT)
    size, status, pending, interrupt, still_pending, index, length, _last, data = vm.reports
    assert (size, status) == (-BAR_SIZE & 0xFFFFFFFF | MEMORY_BAR_64, UP)
    assert (pending, interrupt, still_pending) == (1 << 1, VECTOR, 0)
    assert (index, length) == (1, 513)
    assert data != 0


class Tap(Bus):
    """Notes the addresses of all writes on their way to a bus."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus.name)
        self._bus = bus
        self.written: list[int] = []

    def read(self, address: int, size: int) -> int:
        return self._bus.read(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        self.written.append(address)
        self._bus.write(address, size, value)


def test_kick_over_pci_is_no_exit(vm: Rig, pci_board: MainBoard) -> None:
    """The doorbell has moved with the BAR."""
    Rng().attach(pci_board)
    vm.mmio = tap = Tap(pci_board.memory_bus)

    vm.run("virtio_pci")

    assert BAR + TABLE + 0x1C in tap.written  # the unmasking of vector 1
    assert BAR + NOTIFY not in tap.written


@pytest.fixture
def far_end(tmp_path: Path) -> Iterator[socket.socket]:
    """Listens at `wire`, where a network device may connect."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "wire"))
        listener.listen(1)
        listener.settimeout(SECONDS)
        yield listener


def exchange(vm: Rig, guest: str, far_end: socket.socket) -> bytes:
    """Run a network guest to its end: returns the frame that it sends, and answers it."""
    vm.start(guest)
    with far_end.accept()[0] as peer:
        peer.settimeout(SECONDS)
        size = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        frame = peer.recv(size, socket.MSG_WAITALL)
        peer.sendall((60).to_bytes(4, "big") + frame[6:12] + PEER + ETHERTYPE + b"pong".ljust(46, b"\0"))
        assert vm.wait() == Stop(Reason.EXIT)
    vm.finish()
    return frame


def test_frames_both_ways(vm: Rig, board: MainBoard, far_end: socket.socket, tmp_path: Path) -> None:
    net = Net("socket", path=tmp_path / "wire")
    net.attach(board)

    frame = exchange(vm, "virtio_net", far_end)
    net.close()

    assert frame == b"\xff" * 6 + GUEST + ETHERTYPE + b"ping".ljust(46, b"\0")
    status, interrupt, sent, received, length, header, data = vm.reports
    assert (status, interrupt, sent, received, length) == (UP, INTERRUPT.USED_BUFFER, 1, 1, 12 + 60)
    assert (header, data.to_bytes(4, "little")) == (1 << 16, b"pong")  # num_buffers


def test_frames_both_ways_over_pci(vm: Rig, pci_board: MainBoard, far_end: socket.socket, tmp_path: Path) -> None:
    net = Net("socket", path=tmp_path / "wire")
    net.attach(pci_board)

    frame = exchange(vm, "virtio_net_pci", far_end)
    net.close()

    assert frame == b"\xff" * 6 + GUEST + ETHERTYPE + b"ping".ljust(46, b"\0")
    _, status, interrupt, sent, received, length, header, data = vm.reports
    assert (status, interrupt, sent, received, length) == (UP, 1, 1, 1, 12 + 60)
    assert (header, data.to_bytes(4, "little")) == (1 << 16, b"pong")


def test_frames_are_no_exits(vm: Rig, board: MainBoard, far_end: socket.socket, tmp_path: Path) -> None:
    net = Net("socket", path=tmp_path / "wire")
    net.attach(board)

    exchange(vm, "virtio_net", far_end)
    net.close()

    writes = written(vm)
    assert layout.MMIO_DEVICES + 0x64 in writes  # InterruptACK
    assert layout.MMIO_DEVICES + QUEUE_NOTIFY not in writes


def test_more_devices_than_lines(vm: Rig, board: MainBoard) -> None:
    """They share lines; some are left for devices that cannot share."""
    for _ in range(40):
        Rng().attach(board)

    lines = [gsi for _, _, gsi in board.virtio_resources()]
    assert len(lines) == 40
    assert max(map(lines.count, lines)) - min(map(lines.count, lines)) <= 1
    assert board.irq() is not None


def test_no_line_at_all(vm: Rig, board: MainBoard) -> None:
    with pytest.raises(ConfigError, match="no free interrupt line"):
        for _ in range(layout.IOAPIC_PINS):
            board.irq()

    with pytest.raises(ConfigError, match="no free interrupt line"):
        Rng().attach(board)
