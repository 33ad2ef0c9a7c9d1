"""Fakes of the machine and of a virtio driver for tests of devices, your own included: no KVM, nothing to wait for.

    board = FakeBoard()
    serial = Serial(sink := ByteSink(), port=0x3F8, gsi=4)
    serial.attach(board)
    board.ports.write(0x3F8, 1, ord("x"))         # what a guest's `out` does
    assert sink.data == b"x"
    assert board.lines[4].level == 0              # an IrqRecorder

What a device does on the event loop runs when the test says so: `board.steps.turn()`, see StepLoop.

    Rng().attach(board)
    driver = RingDriver(board)
    driver.start()
    request = driver.submit(0, writable=[16])
    driver.kick(0)                                # and what follows on the event loop
    assert driver.used(0) == [(request, 16)]
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .core.board import Board, Stop
from .core.bus import Bus, BusDevice
from .core.cell import Cell
from .core.events import READ, EventLoop
from .core.memory import GuestMemory, Region
from .core.sink import Sink
from .pci import msix
from .pci.bus import PciBus
from .pci.config import COMMAND, Header
from .virtio import pci
from .virtio.device import VirtioDevice
from .virtio.mmio import CONFIG, VirtioMmio
from .virtio.pci import VirtioPci
from .virtio.queue import DESC, DESC_F
from .virtio.spec import INTERRUPT, STATUS, F

MMIO_BASE = 0xD000_0000  # where FakeBoard.mmio begins
FREE_GSIS = 16  # where FakeBoard.irq begins
PCI_ECAM = 0xE000_0000  # of a FakeBoard with PCI
PCI_WINDOW = range(0xE100_0000, 0xE200_0000)


class IrqRecorder:
    """An IrqLine that remembers: `level` is the line's, `edges` how often it has risen, `pulses` counts pulse()."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0
        self.pulses = 0

    def set(self, level: bool) -> None:
        self.edges += level and not self.level
        self.level = level

    def pulse(self) -> None:
        self.edges += 1
        self.pulses += 1


class MessageRecorder:
    """A Message that remembers: `message` is the (address, data) of the last route, `routes` and `pulses` count."""

    def __init__(self) -> None:
        self.message: tuple[int, int] | None = None
        self.routes = 0
        self.pulses = 0

    def route(self, address: int, data: int) -> None:
        self.message = (address, data)
        self.routes += 1

    def pulse(self) -> None:
        self.pulses += 1


class DoorbellRecorder:
    """A Doorbell that never takes a write: the device sees it. `address` is where it listens."""

    def __init__(self, address: int | None) -> None:
        self.address = address

    def place(self, address: int | None) -> None:
        self.address = address


class ByteSink:
    """A Sink with room for `room` bytes (None: for all); to make room, set `room` and call the device's `drained`."""

    def __init__(self, room: int | None = None) -> None:
        self.data = bytearray()
        self.room = room

    def put(self, byte: int) -> bool:
        if self.room == 0:
            raise AssertionError("the device puts a byte into a sink that has said it is full")
        self.data.append(byte)
        if self.room is not None:
            self.room -= 1
        return self.room != 0


class StepLoop(EventLoop):
    """An EventLoop without a thread, a descriptor or a clock: the test says what happens and when.

    `turn()` runs what call_soon has queued, `advance(seconds)` what is due by then, `ready(fd)` the callback of a
    descriptor. An owner's lock is held, as by the real loop. `watched` has the events of each descriptor.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[Callable[[], None], Any]] = []
        self._due: list[tuple[float, Callable[[], None], Any]] = []
        self._watched: dict[int, tuple[Callable[[], None], Any]] = {}
        self.watched: dict[int, int] = {}

    def add(self, fd: int, callback: Callable[[], None], *, events: int = READ, owner: Any = None) -> None:
        self._watched[fd] = (callback, owner)
        self.watched[fd] = events

    def remove(self, fd: int) -> None:
        self._watched.pop(fd, None)
        self.watched.pop(fd, None)

    def call_soon(self, callback: Callable[[], None], *, owner: Any = None) -> None:
        self._queue.append((callback, owner))

    def after(self, seconds: float, callback: Callable[[], None], *, owner: Any = None) -> None:
        self._due.append((self.now + seconds, callback, owner))

    def time(self) -> float:
        return self.now

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        pass

    def stop(self, timeout: float = 1.0) -> None:
        pass

    def turn(self) -> None:
        queue, self._queue = self._queue, []
        for callback, owner in queue:
            _call(callback, owner)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [entry for entry in self._due if entry[0] <= self.now]
        self._due = [entry for entry in self._due if entry[0] > self.now]
        for _, callback, owner in sorted(due, key=lambda entry: entry[0]):
            _call(callback, owner)

    def ready(self, fd: int) -> None:
        _call(*self._watched[fd])


class FakeBoard:
    """A Board with `size` bytes of RAM from address 0 on, which records what devices do to it.

    `ports` and `memory_bus` are real buses: access a device through them as a guest would. `lines` are the
    IrqRecorders by GSI, `messages` and `doorbells` all that were made, `cells` those by address; `stops`, `words` and
    `logs` what was asked of stop(), cmdline() and log(); `steps` the loop. Virtio devices get the `transport` "mmio"
    or "pci".
    """

    def __init__(self, size: int = 1 << 20, transport: str = "mmio") -> None:
        self.mem = GuestMemory([Region(0, memoryview(bytearray(size)))])
        self.steps = StepLoop()
        self.loop: EventLoop = self.steps
        self.ports = Bus("port")
        self.memory_bus = Bus("mmio")
        self.lines: dict[int, IrqRecorder] = {}
        self.words: list[str] = []
        self.stops: list[Stop] = []
        self.logs: list[tuple[str, dict[str, object]]] = []
        self.pci = PciBus(self.memory_bus, PCI_ECAM, PCI_WINDOW) if transport == "pci" else None
        self.transports: list[Any] = []  # VirtioMmio or VirtioPci
        self.messages: list[MessageRecorder] = []
        self.doorbells: list[DoorbellRecorder] = []
        self.cells: dict[int, Cell] = {}
        self._next_mmio = MMIO_BASE
        self._next_gsi = FREE_GSIS

    def pio(self, base: int, size: int, device: BusDevice) -> None:
        self.ports.add(base, size, device)

    def mmio(self, size: int, device: BusDevice, base: int | None = None) -> int:
        if base is None:
            base = self._next_mmio
            self._next_mmio += (size + 0xFFF) & ~0xFFF
        self.memory_bus.add(base, size, device)
        return base

    def cell(self, address: int, size: int, *, mmio: bool = False, sink: Sink | None = None) -> Cell:
        self.cells[address] = Cell()
        return self.cells[address]

    def irq(self, gsi: int | None = None) -> IrqRecorder:
        if gsi is None:
            gsi = self._next_gsi
            self._next_gsi += 1
        return self.lines.setdefault(gsi, IrqRecorder())

    def msi(self) -> MessageRecorder:
        self.messages.append(MessageRecorder())
        return self.messages[-1]

    def new_loop(self, name: str) -> EventLoop:
        return self.loop

    def doorbell(
        self,
        address: int | None,
        size: int,
        value: int | None,
        ring: Callable[[], None],
        owner: Any,
        loop: EventLoop | None = None,
    ) -> DoorbellRecorder:
        self.doorbells.append(DoorbellRecorder(address))
        return self.doorbells[-1]

    def virtio(self, device: VirtioDevice) -> None:
        if self.pci is not None:
            self.transports.append(VirtioPci(device, self, self.pci))
        else:
            self.transports.append(VirtioMmio(device, self, self.irq()))

    def cmdline(self, *words: str) -> None:
        self.words += words

    def stop(self, why: Stop) -> None:
        self.stops.append(why)

    def log(self, event: str, **fields: object) -> None:
        self.logs.append((event, fields))


class RingDriver:
    """The guest's half of a virtio device on a FakeBoard: speaks to the registers of transport `number` and builds
    split rings in the board's RAM, from `free` on. Descriptors are handed out round robin: keep fewer under way than
    the queue has. Registers have the names of the MMIO transport on both.
    """

    def __init__(self, board: FakeBoard, number: int = 0, free: int = 0x10000) -> None:
        self.board = board
        self.transport = board.transports[number]
        self._registers = (
            _MmioRegisters(board, self.transport) if board.pci is None else _PciRegisters(board, self.transport)
        )
        self.base = self._registers.base
        self.features = 0
        self.queues: list[_Ring] = []
        self._free = free

    # Registers.

    def get(self, register: str, size: int = 4) -> int:
        return self._registers.get(register, size)

    def set(self, register: str, value: int) -> None:
        self._registers.set(register, value)

    def config(self, offset: int, size: int) -> int:
        return self._registers.config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self._registers.write_config(offset, size, value)

    def start(self, features: int = F.VERSION_1, sizes: Sequence[int] | None = None) -> None:
        """Reset, agree on `features`, set up the queues (of `sizes` entries, else as large as they may be), go."""
        self.prepare(features, sizes)
        self.go()

    def prepare(self, features: int = F.VERSION_1, sizes: Sequence[int] | None = None) -> None:
        """All of `start` that comes before DRIVER_OK."""
        self.set("Status", 0)
        self.set("Status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)
        self.accept(features)
        assert self.get("Status") & STATUS.FEATURES_OK, "the device does not take these features"
        self.queues = []
        for index in range(len(self.transport.core.queues)):
            self.set("QueueSel", index)
            self.add_queue(sizes[index] if sizes else self.get("QueueNumMax"))

    def go(self) -> None:
        """The driver is up; the event loop takes a turn."""
        self.set("Status", self.get("Status") | STATUS.DRIVER_OK)
        self.board.steps.turn()

    def accept(self, features: int) -> None:
        """Agree on `features`, as far as the device does; from here on its interrupts count."""
        self._registers.connect()
        self.features = features
        for half in (0, 1):
            self.set("DriverFeaturesSel", half)
            self.set("DriverFeatures", features >> 32 * half & 0xFFFFFFFF)
        self.set("Status", self.get("Status") | STATUS.FEATURES_OK)

    def add_queue(self, size: int) -> None:
        """Rings for the queue that QueueSel names."""
        ring = _Ring(size, self.allocate(16 * size, 16), self.allocate(6 + 2 * size, 2), self.allocate(6 + 8 * size, 4))
        self.queues.append(ring)
        self.set("QueueNum", size)
        for name, address in (("Desc", ring.desc), ("Driver", ring.avail), ("Device", ring.used)):
            self.set(f"Queue{name}Low", address & 0xFFFFFFFF)
            self.set(f"Queue{name}High", address >> 32)
        self.set("QueueReady", 1)

    # Requests.

    def submit(
        self, index: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool = False
    ) -> int:
        """Make a chain available: copies of `readable`, then room of the `writable` sizes. Returns its head."""
        ring = self.queues[index]
        buffers = [(self._place(data), len(data), 0) for data in readable]
        buffers += [(self.allocate(size, 1), size, int(DESC_F.WRITE)) for size in writable]
        table, first, count = ring.desc, ring.next_desc, ring.size
        if indirect:
            table, first, count = self.allocate(16 * len(buffers), 16), 0, len(buffers)
        for n, (address, size, flags) in enumerate(buffers):
            following = (first + n + 1) % count
            flags |= DESC_F.NEXT if n + 1 < len(buffers) else 0
            self.descriptor(table, (first + n) % count, address, size, flags, following)
        head = ring.next_desc
        if indirect:
            self.descriptor(ring.desc, head, table, 16 * len(buffers), DESC_F.INDIRECT, 0)
        ring.next_desc = (head + (1 if indirect else len(buffers))) % ring.size
        ring.buffers[head] = [(address, size) for address, size, flags in buffers if flags & DESC_F.WRITE]
        self.publish(index, head)
        return head

    def descriptor(self, table: int, n: int, address: int, size: int, flags: int, following: int) -> None:
        self.board.mem.write(table + 16 * n, DESC.pack(address, size, flags, following))

    def publish(self, index: int, head: int) -> None:
        """Put `head` into the available ring."""
        ring = self.queues[index]
        self.board.mem.write(ring.avail + 4 + 2 * (ring.next_avail % ring.size), struct.pack("<H", head))
        ring.next_avail = ring.next_avail + 1 & 0xFFFF
        self.board.mem.write(ring.avail + 2, struct.pack("<H", ring.next_avail))

    def kick(self, index: int) -> None:
        """Notify the device, and let the event loop take a turn."""
        self.set("QueueNotify", index)
        self.board.steps.turn()

    def used(self, index: int) -> list[tuple[int, int]]:
        """(head, bytes written) of what the device has given back since the last call."""
        ring = self.queues[index]
        (end,) = struct.unpack("<H", self.board.mem.read(ring.used + 2, 2))
        found = []
        while ring.next_used != end:
            entry = self.board.mem.read(ring.used + 4 + 8 * (ring.next_used % ring.size), 8)
            found.append(struct.unpack("<II", entry))
            ring.next_used = ring.next_used + 1 & 0xFFFF
        return found

    def data(self, index: int, head: int) -> bytes:
        """All of the writable bytes of the chain that had this head last."""
        return b"".join(self.board.mem.read(address, size) for address, size in self.queues[index].buffers[head])

    def request(self, index: int, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> bytes:
        """Submit, kick, and return the bytes that the device has written; it must have answered at once."""
        head = self.submit(index, readable, writable)
        self.kick(index)
        ((answered, count),) = self.used(index)
        assert answered == head
        return self.data(index, head)[:count]

    # What the device says.

    @property
    def needs_reset(self) -> bool:
        return bool(self.get("Status") & STATUS.DEVICE_NEEDS_RESET)

    def interrupts(self) -> int:
        """What the device has interrupted for since the last call, as in InterruptStatus, which is acknowledged."""
        return self._registers.interrupts()

    @property
    def pulses(self) -> int:
        """How often the device has interrupted so far."""
        return self._registers.pulses()

    def allocate(self, size: int, alignment: int) -> int:
        """Guest memory that nothing else uses; raises AssertionError at the end of RAM."""
        start = -(-self._free // alignment) * alignment
        self._free = start + size
        assert self._free <= self.board.mem.regions[-1].end, "the FakeBoard needs more RAM"
        return start

    def _place(self, data: bytes) -> int:
        address = self.allocate(len(data), 1)
        self.board.mem.write(address, data)
        return address


class _MmioRegisters:
    """How a RingDriver speaks to a VirtioMmio."""

    def __init__(self, board: FakeBoard, transport: VirtioMmio) -> None:
        self.base = transport.base
        self._board = board
        self._line = board.lines[FREE_GSIS + board.transports.index(transport)]

    def get(self, register: str, size: int) -> int:
        return self._board.memory_bus.read(self.base + self._offset(register), size)

    def set(self, register: str, value: int) -> None:
        self._board.memory_bus.write(self.base + self._offset(register), 4, value)

    def config(self, offset: int, size: int) -> int:
        return self._board.memory_bus.read(self.base + CONFIG + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self._board.memory_bus.write(self.base + CONFIG + offset, size, value)

    def connect(self) -> None:
        """Nothing to do: there is one line."""

    def interrupts(self) -> int:
        status = self.get("InterruptStatus", 4)
        self.set("InterruptACK", status & (INTERRUPT.USED_BUFFER | INTERRUPT.CONFIGURATION))
        return status

    def pulses(self) -> int:
        return self._line.pulses

    def _offset(self, register: str) -> int:
        return int(VirtioMmio.REGISTERS[register].offset or 0)


class _PciRegisters:
    """How a RingDriver speaks to a VirtioPci: vector 0 is for the configuration, 1 + n for queue n."""

    NAMES: ClassVar[dict[str, str]] = {
        "Status": "device_status",
        "DeviceFeaturesSel": "device_feature_select",
        "DeviceFeatures": "device_feature",
        "DriverFeaturesSel": "driver_feature_select",
        "DriverFeatures": "driver_feature",
        "QueueSel": "queue_select",
        "QueueNum": "queue_size",
        "QueueNumMax": "queue_size",
        "QueueReady": "queue_enable",
        "QueueDescLow": "queue_desc_low",
        "QueueDescHigh": "queue_desc_high",
        "QueueDriverLow": "queue_driver_low",
        "QueueDriverHigh": "queue_driver_high",
        "QueueDeviceLow": "queue_device_low",
        "QueueDeviceHigh": "queue_device_high",
        "ConfigGeneration": "config_generation",
        "InterruptStatus": "isr_status",
    }

    def __init__(self, board: FakeBoard, transport: VirtioPci) -> None:
        assert board.pci is not None
        self._board = board
        self._config = board.pci.config_address(board.pci.functions.index(transport.config))
        self._messages: Sequence[Any] = transport.msix.messages
        self._queues = len(transport.core.queues)
        self._seen = [0] * len(self._messages)
        self.base = transport.config.header.bar_high << 32 | transport.config.header.bar_low & ~0xF
        bus = board.memory_bus
        bus.write(self._config + Header.COMMAND_AT, 2, COMMAND.MEMORY | COMMAND.MASTER)
        for vector in range(len(self._messages)):
            entry = self.base + pci.TABLE + msix.ENTRY.size * vector
            bus.write(entry, 4, msix.MESSAGES)
            bus.write(entry + 8, 4, 0x30 + vector)
            bus.write(entry + 12, 4, 0)
        bus.write(self._config + self._find(msix.CAPABILITY) + 2, 2, msix.CONTROL.ENABLE)

    def get(self, register: str, size: int) -> int:
        offset, width = self._place(register)
        return self._board.memory_bus.read(self.base + offset, min(width, size))

    def set(self, register: str, value: int) -> None:
        if register == "QueueNotify":
            place = min(value, pci.PAGE // pci.NOTIFY_MULTIPLIER - 1)  # of a queue that has none: the last one
            self._board.memory_bus.write(self.base + pci.NOTIFY + pci.NOTIFY_MULTIPLIER * place, 2, value)
            return
        offset, width = self._place(register)
        self._board.memory_bus.write(self.base + offset, width, value)

    def config(self, offset: int, size: int) -> int:
        return self._board.memory_bus.read(self.base + pci.CONFIG + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self._board.memory_bus.write(self.base + pci.CONFIG + offset, size, value)

    def connect(self) -> None:
        """A vector for each purpose; what was sent so far is forgotten."""
        self._write("config_msix_vector", 0)
        for queue in range(self._queues):
            self._write("queue_select", queue)
            self._write("queue_msix_vector", 1 + queue)
        self._seen = [message.pulses for message in self._messages]

    def interrupts(self) -> int:
        before, self._seen = self._seen, [message.pulses for message in self._messages]
        fresh = [now != then for now, then in zip(self._seen, before, strict=True)]
        return INTERRUPT.CONFIGURATION * fresh[0] | INTERRUPT.USED_BUFFER * any(fresh[1:])

    def pulses(self) -> int:
        return sum(message.pulses for message in self._messages)

    def _write(self, name: str, value: int) -> None:
        reg = VirtioPci.REGISTERS[name]
        self._board.memory_bus.write(self.base + int(reg.offset or 0), reg.width, value)

    def _place(self, register: str) -> tuple[int, int]:
        reg = VirtioPci.REGISTERS[self.NAMES[register]]
        return int(reg.offset or 0), reg.width

    def _find(self, kind: int) -> int:
        """Where the capability is, as a driver finds it."""
        bus = self._board.memory_bus
        at = bus.read(self._config + 0x34, 1)
        while bus.read(self._config + at, 1) != kind:
            at = bus.read(self._config + at + 1, 1)
        return at


class _Ring:
    """Where a queue is, and how far the driver has come."""

    def __init__(self, size: int, desc: int, avail: int, used: int) -> None:
        self.size, self.desc, self.avail, self.used = size, desc, avail, used
        self.next_desc = self.next_avail = self.next_used = 0
        self.buffers: dict[int, list[tuple[int, int]]] = {}


def _call(callback: Callable[[], None], owner: Any) -> None:
    if owner is None:
        callback()
    else:
        with owner.lock:
            callback()


if TYPE_CHECKING:
    _is_a_board: Board = FakeBoard()
