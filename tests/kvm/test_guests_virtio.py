"""A driver in a guest reaches a device through a real ioeventfd, and is answered through a real irqfd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig import Rig

from kvmpy.core.board import Reason, Stop
from kvmpy.core.events import EventLoop
from kvmpy.mainboard import MainBoard
from kvmpy.virtio.mmio import QUEUE_NOTIFY
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.spec import INTERRUPT
from kvmpy.x86 import layout

UP = 0xF  # ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK


@pytest.fixture
def board(vm: Rig) -> Iterator[MainBoard]:
    """A board on the rig's VM, whose devices the guest sees."""
    loop = EventLoop("io", lambda error: vm.stops.put(Stop(Reason.ERROR, cause=error)))
    board = MainBoard(vm.vm, vm.mem, loop, vm.stops.put)
    vm.mmio = board.memory_bus
    loop.start()
    yield board
    vm.finish()
    loop.stop()
    board.close()


def test_one_request(vm: Rig, board: MainBoard) -> None:
    Rng().attach(board)

    stop = vm.run("virtio")

    assert stop == Stop(Reason.EXIT)
    status, interrupt, index, length, _last, data = vm.reports
    assert (status, interrupt, index, length) == (UP, INTERRUPT.USED_BUFFER, 1, 513)
    assert data != 0


def test_kick_is_no_exit(vm: Rig, board: MainBoard) -> None:
    """The write to QueueNotify never reaches the bus."""
    Rng().attach(board)

    vm.run("virtio")

    writes = [fields[1] for fields in vm.thread.recent if fields[0] == 6 and fields[4]]  # KVM_EXIT_MMIO, is_write
    assert layout.MMIO_DEVICES + 0x64 in writes  # InterruptACK
    assert layout.MMIO_DEVICES + QUEUE_NOTIFY not in writes
