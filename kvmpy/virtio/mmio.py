"""Virtio over MMIO (VIRTIO 1.2, 4.2): the registers of one device, modern interface only.

Linux: VIRTIO_MMIO; found through ACPI (LNRO0005). A hostile guest may access registers at any width and in any order:
accesses other than aligned words read 0 and write nothing, settings that come too late are ignored, and what makes no
sense ends in DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from ..core.board import Board
from ..core.cell import READ_VALUE, WRITE_CLEARS
from ..core.irq import IrqLine
from ..core.regs import Reg, RegisterDevice
from .device import VirtioDevice
from .queue import VirtQueue
from .spec import INTERRUPT, STATUS, VENDOR
from .transport import VirtioCore, high, low, usable

MAGIC = int.from_bytes(b"virt", "little")
QUEUE_NOTIFY = 0x050  # offset of the register behind the doorbells
INTERRUPT_STATUS, INTERRUPT_ACK = 0x060, 0x064
SIZE = 0x1000  # one page for each device
CONFIG = 0x100  # where the device's configuration space begins
NO_REGION = 0xFFFFFFFF  # 4.2.2: the length of a shared memory region that does not exist


class VirtioMmio(RegisterDevice, span=CONFIG, stride=4):
    """The transport of one device: registers at `base`, interrupts as edges on `irq`.

    The bus holds no lock: most accesses take the device's here, so that they and its own work exclude each other. What
    a driver does for each interrupt or kick must not wait for a device that waits for the host; that takes a leaf.
    """

    window: ClassVar[int] = SIZE  # bytes from `base` on
    modules: ClassVar[tuple[str, ...]] = ("virtio_mmio",)

    MagicValue = Reg(0x000, reset=MAGIC, write=0)
    Version = Reg(0x004, reset=2, write=0)
    DeviceID = Reg(0x008, write=0)
    VendorID = Reg(0x00C, reset=VENDOR, write=0)
    DeviceFeatures = Reg(0x010, write=0)
    DeviceFeaturesSel = Reg(0x014, read=False)
    DriverFeatures = Reg(0x020, read=False)
    DriverFeaturesSel = Reg(0x024, read=False)
    QueueSel = Reg(0x030, read=False)
    QueueNumMax = Reg(0x034, write=0)
    QueueNum = Reg(0x038, read=False)
    QueueReady = Reg(0x044)
    QueueNotify = Reg(QUEUE_NOTIFY, read=False)
    InterruptStatus = Reg(INTERRUPT_STATUS, write=0, bits=INTERRUPT)
    InterruptACK = Reg(INTERRUPT_ACK, read=False, bits=INTERRUPT)
    Status = Reg(0x070, bits=STATUS)
    QueueDescLow = Reg(0x080, read=False)
    QueueDescHigh = Reg(0x084, read=False)
    QueueDriverLow = Reg(0x090, read=False)
    QueueDriverHigh = Reg(0x094, read=False)
    QueueDeviceLow = Reg(0x0A0, read=False)
    QueueDeviceHigh = Reg(0x0A4, read=False)
    SHMSel = Reg(0x0AC, read=False)
    SHMLenLow = Reg(0x0B0, reset=NO_REGION, write=0)
    SHMLenHigh = Reg(0x0B4, reset=NO_REGION, write=0)
    SHMBaseLow = Reg(0x0B8, reset=NO_REGION, write=0)
    SHMBaseHigh = Reg(0x0BC, reset=NO_REGION, write=0)
    ConfigGeneration = Reg(0x0FC, write=0)
    AT_ONCE = frozenset({QueueNotify.offset, InterruptStatus.offset, InterruptACK.offset})  # whatever the device does

    def __init__(self, device: VirtioDevice, board: Board, irq: IrqLine) -> None:
        self.lock: Any = None
        self._pending = threading.Lock()  # a leaf: held while InterruptStatus changes
        self.core = VirtioCore(device, board, self._used, self._changed)
        self.DeviceID = int(device.type_id)
        self._irq = irq
        self.base = board.mmio(SIZE, self)
        # What a driver does for each interrupt needs no Python. A bit that it clears while one is being set may come
        # back, and it looks once too often; none that is being set gets lost.
        self._status = board.cell(self.base + INTERRUPT_STATUS, 4, mmio=True)
        self._status.kinds = READ_VALUE
        acknowledge = board.cell(self.base + INTERRUPT_ACK, 4, mmio=True)
        acknowledge.target = self._status
        acknowledge.kinds = WRITE_CLEARS
        for index in range(len(device.queue_sizes)):
            board.doorbell(self.base + QUEUE_NOTIFY, 4, index, self._kick(index), device, device.loop)

    def _kick(self, index: int) -> Any:
        return lambda: self.core.notify(index)

    # Interrupts.

    def _used(self, queue: VirtQueue) -> None:
        self._add(INTERRUPT.USED_BUFFER)

    def _changed(self) -> None:
        self._add(INTERRUPT.CONFIGURATION)

    def _add(self, interrupt: int) -> None:
        with self._pending:
            self._status.value |= interrupt
        self._irq.pulse()

    def read_InterruptStatus(self) -> int:
        return self._status.value

    def write_InterruptACK(self, value: int) -> None:
        with self._pending:
            self._status.value &= ~value

    # Status and features.

    def read_Status(self) -> int:
        return self.core.status

    def write_Status(self, value: int) -> None:
        value &= 0xFF  # 2.1: status is a byte
        self.core.write_status(value)
        if value == 0:
            with self._pending:
                super().reset()
                self._status.value = 0
            self.DeviceID = int(self.core.device.type_id)

    def read_DeviceFeatures(self) -> int:
        return self.core.device_features(self.DeviceFeaturesSel)

    def write_DriverFeatures(self, value: int) -> None:
        self.core.accept_features(self.DriverFeaturesSel, value)

    # Queues: registers show the one that QueueSel names, and take nothing once the driver is up.

    @property
    def _selected(self) -> VirtQueue | None:
        return self.core.queue(self.QueueSel)

    @property
    def _settable(self) -> VirtQueue | None:
        return self.core.settable(self.QueueSel)

    def read_QueueNumMax(self) -> int:
        queue = self._selected
        return queue.max_size if queue is not None else 0

    def write_QueueNum(self, value: int) -> None:
        if queue := self._settable:
            queue.size = value

    def read_QueueReady(self) -> int:
        queue = self._selected
        return int(queue is not None and queue.enabled)

    def write_QueueReady(self, value: int) -> None:
        queue = self._selected
        if queue is None:
            return
        if not value & 1:
            queue.enabled = False
            queue.stop()
        elif self.core.configurable:
            queue.enabled = True

    def write_QueueNotify(self, value: int) -> None:
        """Only where no doorbell took the write: the queue is served on the loop all the same."""
        if value < len(self.core.queues):
            self.core.kick(value)

    def write_QueueDescLow(self, value: int) -> None:
        if queue := self._settable:
            queue.desc = low(queue.desc, value)

    def write_QueueDescHigh(self, value: int) -> None:
        if queue := self._settable:
            queue.desc = high(queue.desc, value)

    def write_QueueDriverLow(self, value: int) -> None:
        if queue := self._settable:
            queue.avail = low(queue.avail, value)

    def write_QueueDriverHigh(self, value: int) -> None:
        if queue := self._settable:
            queue.avail = high(queue.avail, value)

    def write_QueueDeviceLow(self, value: int) -> None:
        if queue := self._settable:
            queue.used = low(queue.used, value)

    def write_QueueDeviceHigh(self, value: int) -> None:
        if queue := self._settable:
            queue.used = high(queue.used, value)

    # The device's configuration space, and the widths of accesses (4.2.2.2).

    def read_ConfigGeneration(self) -> int:
        return self.core.generation

    def resolve(self, offset: int, size: int) -> tuple[Callable[[], int], Callable[[int], None], Any]:
        """As `read` and `write` do it."""
        if size != 4 or offset >= CONFIG:
            return partial(self.read, offset, size), partial(self.write, offset, size), None
        lock = None if offset in self.AT_ONCE else self.core.device.lock
        return *self.handlers(offset), lock

    def read(self, offset: int, size: int) -> int:
        if offset in self.AT_ONCE:
            return super().read(offset, size) if size == 4 else 0
        with self.core.device.lock:
            if offset >= CONFIG:
                return self.core.read_config(offset - CONFIG, size)
            return super().read(offset, size) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset in self.AT_ONCE:
            if size == 4:
                super().write(offset, size, value)
            return
        with self.core.device.lock:
            if offset >= CONFIG:
                self.core.write_config(offset - CONFIG, size, value)
            elif size == 4:
                super().write(offset, size, value)

    # State.

    def reset(self) -> None:
        with self.core.device.lock:
            self.write_Status(0)

    def state(self) -> dict[str, Any]:
        with self.core.device.lock:
            self.InterruptStatus = self._status.value
            return super().state() | {"core": self.core.state()}

    def restore(self, state: dict[str, Any]) -> None:
        with self.core.device.lock, usable(self.core.device):
            super().restore(state)
            self._status.value = self.InterruptStatus
            self.core.restore(state["core"])
