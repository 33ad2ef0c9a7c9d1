"""Virtio over PCI (VIRTIO 1.2, 4.1): one function for each device, modern interface only, MSI-X or polling.

Linux: VIRTIO_PCI; found by scanning the bus that ACPI names (PNP0A08, MCFG). A hostile guest may access structures at
any width and in any order, move the BAR anywhere, and name queues and vectors that are not there: accesses of another
width than the field's read 0 and write nothing, settings that come too late are ignored, a BAR answers only inside the
window of its bus, and what makes no sense ends in DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

import struct
import threading
from functools import partial
from typing import Any, ClassVar

from ..core.board import Board
from ..core.regs import Reg, RegisterDevice
from ..pci import msix
from ..pci.bus import PciBus
from ..pci.config import BAR_INDEX, ConfigSpace, Header
from ..pci.msix import Msix
from .device import VirtioDevice
from .queue import VirtQueue
from .spec import INTERRUPT, STATUS, Type
from .transport import VirtioCore, high, low, usable

VENDOR_ID = 0x1AF4  # 4.1.2
DEVICE_ID = 0x1040  # 4.1.2: plus the device type
REVISION = 1
CLASSES: dict[int, int] = {Type.NET: 0x020000, Type.BLOCK: 0x018000, Type.CONSOLE: 0x078000}  # PCI Code and ID 1.11, 1
CLASS = 0xFF0000  # of all others: in no class
NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR (4.1.5.1.2)

# The BAR: one page for each structure.
COMMON, ISR, CONFIG, NOTIFY, TABLE, PBA = (page << 12 for page in range(6))
PAGE = 0x1000
BAR_SIZE = 8 * PAGE
COMMON_SIZE = 0x38  # 4.1.4.3, up to queue_device: what follows belongs to features that are not offered
NOTIFY_MULTIPLIER = 4  # bytes of BAR for each queue (4.1.4.4)
MAX_VECTORS = PAGE // msix.ENTRY.size

CAPABILITY = 0x09  # vendor-specific
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = range(1, 6)  # 4.1.4: cfg_type
CAP = struct.Struct("<BBBB2xII")  # virtio_pci_cap from cap_len on: cap_len, cfg_type, bar, id, offset, length
CAP_SIZE = 2 + CAP.size


class VirtioPci(RegisterDevice, span=BAR_SIZE):
    """The transport of one device: the structures in its BAR, `config` with the capabilities, `msix` for interrupts.

    Vector numbers are the driver's choice; there is one for each queue and one for the configuration.

    The bus holds no lock: accesses to the BAR take the device's here where they and its own work have to exclude each
    other. Kicks, the ISR status and the vectors must not wait for a device that waits for the host.
    """

    modules: ClassVar[tuple[str, ...]] = ("virtio_pci",)

    # Common configuration structure (4.1.4.3).
    device_feature_select = Reg(0x00, width=4)
    device_feature = Reg(0x04, width=4, write=0)
    driver_feature_select = Reg(0x08, width=4)
    driver_feature = Reg(0x0C, width=4)
    config_msix_vector = Reg(0x10, width=2, reset=NO_VECTOR)
    num_queues = Reg(0x12, width=2, write=0)
    device_status = Reg(0x14, width=1, bits=STATUS)
    config_generation = Reg(0x15, width=1, write=0)
    queue_select = Reg(0x16, width=2)
    queue_size = Reg(0x18, width=2)
    queue_msix_vector = Reg(0x1A, width=2)
    queue_enable = Reg(0x1C, width=2)
    queue_notify_off = Reg(0x1E, width=2, write=0)
    queue_desc_low = Reg(0x20, width=4)
    queue_desc_high = Reg(0x24, width=4)
    queue_driver_low = Reg(0x28, width=4)
    queue_driver_high = Reg(0x2C, width=4)
    queue_device_low = Reg(0x30, width=4)
    queue_device_high = Reg(0x34, width=4)
    # ISR status (4.1.4.5).
    isr_status = Reg(ISR, width=1, write=0, rc=INTERRUPT.USED_BUFFER | INTERRUPT.CONFIGURATION, bits=INTERRUPT)

    def __init__(self, device: VirtioDevice, board: Board, bus: PciBus) -> None:
        self.lock: Any = None
        self._pending = threading.Lock()  # a leaf: held while isr_status changes
        self.core = VirtioCore(device, board, self._used, self._changed)
        queues = len(device.queue_sizes)
        self.vectors = [NO_VECTOR] * queues  # of each queue
        self.msix = Msix([board.msi() for _ in range(min(queues + 1, MAX_VECTORS))])
        self.base: int | None = None  # where the BAR answers
        self._board = board
        self._bus = bus
        self._widths = {reg.offset: reg.width for reg in self.REGISTERS.values()}
        self._bells = [
            board.doorbell(None, 0, None, partial(self.core.notify, n), device, device.loop) for n in range(queues)
        ]
        self._describe(device)
        bus.add(self.config)

    def _describe(self, device: VirtioDevice) -> None:
        """Fill in the configuration space (4.1.2, 4.1.4)."""
        self.config = ConfigSpace(threading.Lock())
        header = self.config.header
        header.vendor_id = header.subsystem_vendor_id = VENDOR_ID
        header.device_id = header.subsystem_id = DEVICE_ID + device.type_id
        header.class_code = CLASSES.get(device.type_id, CLASS) << 8 | REVISION
        self.config.add_bar(self._bus.allocate(BAR_SIZE), BAR_SIZE)
        self._add(COMMON_CFG, COMMON, COMMON_SIZE)
        notify_size = NOTIFY_MULTIPLIER * len(device.queue_sizes)
        self._add(NOTIFY_CFG, NOTIFY, notify_size, struct.pack("<I", NOTIFY_MULTIPLIER))
        self._add(ISR_CFG, ISR, 1)
        self._add(DEVICE_CFG, CONFIG, PAGE)  # some devices know their configuration only after this; the rest reads 0
        # 4.1.4.9: bar, offset, length and data are the driver's, to reach the BAR through the configuration space
        mask = CAP.pack(0, 0, 0xFF, 0, 0xFFFFFFFF, 0xFFFFFFFF) + b"\xff" * 4
        self._window = self._add(PCI_CFG, 0, 0, bytes(4), mask)
        control = self.config.add_capability(msix.CAPABILITY, *self.msix.capability(BAR_INDEX, TABLE, PBA))
        self._control = control + 2
        self.config.on_read[self._window + CAP_SIZE] = self._read_through
        self.config.on_write |= {
            self._window + CAP_SIZE: self._write_through,
            control: self._write_control,
            Header.COMMAND_AT: self._place,
            Header.BAR_LOW_AT: self._place,
            Header.BAR_HIGH_AT: self._place,
        }

    def _add(self, kind: int, offset: int, length: int, rest: bytes = b"", writable: bytes = b"") -> int:
        """A virtio_pci_cap (4.1.4), `rest` behind it."""
        body = CAP.pack(CAP_SIZE + len(rest), kind, BAR_INDEX, 0, offset, length) + rest
        return self.config.add_capability(CAPABILITY, body, writable)

    # What the guest does in the configuration space.

    def _place(self) -> None:
        """Let the BAR answer where the guest wants it, and the doorbells ring there."""
        base = self.config.bar
        if base == self.base:
            return
        if self.base is not None:
            self._bus.unmap(self.base)
            self.base = None
        if base is not None:
            if self._bus.map(base, BAR_SIZE, self):
                self.base = base
            else:
                self._board.log("PCI BAR where it cannot be", device=type(self.core.device).__name__, base=hex(base))
        for index, bell in enumerate(self._bells):
            bell.place(None if self.base is None else self.base + NOTIFY + NOTIFY_MULTIPLIER * index)
            if self.core.running:
                self.core.kick(index)  # a kick between the two places is not lost

    def _write_control(self) -> None:
        self.msix.write_control(int.from_bytes(self.config.data[self._control : self._control + 2], "little"))

    def _through(self) -> tuple[int, int] | None:
        """Offset and size of the access that the PCI_CFG capability describes, None for a bad one (4.1.4.9)."""
        _, _, bar, _, offset, size = CAP.unpack_from(self.config.data, self._window + 2)
        good = bar == BAR_INDEX and size in (1, 2, 4) and offset % size == 0 and offset + size <= BAR_SIZE
        return (offset, size) if good else None

    def _read_through(self) -> None:
        access = self._through()
        value = 0 if access is None else self.read(*access)
        at = self._window + CAP_SIZE
        self.config.data[at : at + 4] = value.to_bytes(4, "little")

    def _write_through(self) -> None:
        if access := self._through():
            at = self._window + CAP_SIZE
            self.write(*access, int.from_bytes(self.config.data[at : at + access[1]], "little"))

    # Interrupts.

    def _used(self, queue: VirtQueue) -> None:
        if not self.msix.signal(self.vectors[queue.index]):
            with self._pending:
                self.isr_status |= INTERRUPT.USED_BUFFER  # 4.1.4.5.1, for those who poll

    def _changed(self) -> None:
        with self._pending:
            self.isr_status |= INTERRUPT.CONFIGURATION
        self.msix.signal(self.config_msix_vector)

    def write_config_msix_vector(self, value: int) -> None:
        self.config_msix_vector = self._vector(value)

    def read_queue_msix_vector(self) -> int:
        queue = self._selected
        return self.vectors[queue.index] if queue is not None else NO_VECTOR

    def write_queue_msix_vector(self, value: int) -> None:
        if queue := self._selected:
            self.vectors[queue.index] = self._vector(value)

    def _vector(self, value: int) -> int:
        """What reads back of a vector that was written (4.1.5.1.2.1): NO_VECTOR where there is none."""
        return value if value < len(self.msix.messages) else NO_VECTOR

    # Status and features.

    def read_device_status(self) -> int:
        return self.core.status

    def write_device_status(self, value: int) -> None:
        self.core.write_status(value)
        if value == 0:
            with self._pending:
                super().reset()
            self.vectors = [NO_VECTOR] * len(self.vectors)

    def read_device_feature(self) -> int:
        return self.core.device_features(self.device_feature_select)

    def read_driver_feature(self) -> int:
        return self.core.accepted_features(self.driver_feature_select)

    def write_driver_feature(self, value: int) -> None:
        self.core.accept_features(self.driver_feature_select, value)

    def read_config_generation(self) -> int:
        return self.core.generation

    # Queues: registers show the one that queue_select names, and take nothing once the driver is up.

    @property
    def _selected(self) -> VirtQueue | None:
        return self.core.queue(self.queue_select)

    @property
    def _settable(self) -> VirtQueue | None:
        return self.core.settable(self.queue_select)

    def read_num_queues(self) -> int:
        return len(self.core.queues)

    def read_queue_size(self) -> int:
        queue = self._selected
        return queue.size if queue is not None else 0

    def write_queue_size(self, value: int) -> None:
        if queue := self._settable:
            queue.size = value

    def read_queue_enable(self) -> int:
        queue = self._selected
        return int(queue is not None and queue.enabled)

    def write_queue_enable(self, value: int) -> None:
        queue = self._selected
        if queue is not None and self.core.configurable and value in (0, 1):
            queue.enabled = bool(value)

    def read_queue_notify_off(self) -> int:
        return self.queue_select if self._selected is not None else 0

    def read_queue_desc_low(self) -> int:
        return self._address("desc") & 0xFFFFFFFF

    def read_queue_desc_high(self) -> int:
        return self._address("desc") >> 32

    def read_queue_driver_low(self) -> int:
        return self._address("avail") & 0xFFFFFFFF

    def read_queue_driver_high(self) -> int:
        return self._address("avail") >> 32

    def read_queue_device_low(self) -> int:
        return self._address("used") & 0xFFFFFFFF

    def read_queue_device_high(self) -> int:
        return self._address("used") >> 32

    def _address(self, ring: str) -> int:
        queue = self._selected
        return getattr(queue, ring) if queue is not None else 0

    def write_queue_desc_low(self, value: int) -> None:
        if queue := self._settable:
            queue.desc = low(queue.desc, value)

    def write_queue_desc_high(self, value: int) -> None:
        if queue := self._settable:
            queue.desc = high(queue.desc, value)

    def write_queue_driver_low(self, value: int) -> None:
        if queue := self._settable:
            queue.avail = low(queue.avail, value)

    def write_queue_driver_high(self, value: int) -> None:
        if queue := self._settable:
            queue.avail = high(queue.avail, value)

    def write_queue_device_low(self, value: int) -> None:
        if queue := self._settable:
            queue.used = low(queue.used, value)

    def write_queue_device_high(self, value: int) -> None:
        if queue := self._settable:
            queue.used = high(queue.used, value)

    # The BAR.

    def read(self, offset: int, size: int) -> int:
        page, within = offset & ~(PAGE - 1), offset & PAGE - 1
        if page == TABLE:
            return self.msix.read_table(within, size)
        if page == PBA:
            return self.msix.read_pending(within, size)
        if page == CONFIG:
            with self.core.device.lock:
                return self.core.read_config(within, size)
        if self._widths.get(offset) != size:
            return 0
        with self._pending if page == ISR else self.core.device.lock:
            return super().read(offset, 1)

    def write(self, offset: int, size: int, value: int) -> None:
        page, within = offset & ~(PAGE - 1), offset & PAGE - 1
        if page == NOTIFY:
            # Only where no doorbell took the write: the queue is served on the loop all the same.
            index, rest = divmod(within, NOTIFY_MULTIPLIER)
            if rest == 0 and index < len(self.core.queues):
                self.core.kick(index)
        elif page == TABLE:
            self.msix.write_table(within, size, value)
        elif page == CONFIG:
            with self.core.device.lock:
                self.core.write_config(within, size, value)
        elif self._widths.get(offset) == size:
            with self.core.device.lock:
                super().write(offset, 1, value)

    # State.

    def reset(self) -> None:
        with self.core.device.lock:
            self.write_device_status(0)

    def state(self) -> dict[str, Any]:
        with self.config.lock, self.core.device.lock:
            own = {"vectors": self.vectors, "config": self.config.data.hex(), "msix": self.msix.state()}
            return super().state() | own | {"core": self.core.state()}

    def restore(self, state: dict[str, Any]) -> None:
        with self.config.lock, self.core.device.lock, usable(self.core.device):
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        config, vectors = bytes.fromhex(state["config"]), [self._vector(int(vector)) for vector in state["vectors"]]
        if len(config) != len(self.config.data) or len(vectors) != len(self.vectors):
            raise ValueError(f"{type(self.core.device).__name__}: state is not of this function")
        self.config.data[:] = config
        self.vectors = vectors
        self.core.restore(state["core"])
        self.msix.restore(state["msix"], int.from_bytes(config[self._control : self._control + 2], "little"))
        self._place()
