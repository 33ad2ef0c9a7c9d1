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
from typing import TYPE_CHECKING, Any

from .core.board import Board, Stop
from .core.bus import Bus, BusDevice
from .core.events import READ, EventLoop
from .core.memory import GuestMemory, Region
from .virtio.device import VirtioDevice
from .virtio.mmio import CONFIG, VirtioMmio
from .virtio.queue import DESC, DESC_F
from .virtio.spec import INTERRUPT, STATUS, F

MMIO_BASE = 0xD000_0000  # where FakeBoard.mmio begins
FREE_GSIS = 16  # where FakeBoard.irq begins


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
    descriptor. An owner's lock is held, as by the real loop.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[Callable[[], None], Any]] = []
        self._due: list[tuple[float, Callable[[], None], Any]] = []
        self._watched: dict[int, tuple[Callable[[], None], Any]] = {}

    def add(self, fd: int, callback: Callable[[], None], *, events: int = READ, owner: Any = None) -> None:
        self._watched[fd] = (callback, owner)

    def remove(self, fd: int) -> None:
        self._watched.pop(fd, None)

    def call_soon(self, callback: Callable[[], None], *, owner: Any = None) -> None:
        self._queue.append((callback, owner))

    def after(self, seconds: float, callback: Callable[[], None], *, owner: Any = None) -> None:
        self._due.append((self.now + seconds, callback, owner))

    def time(self) -> float:
        return self.now

    def start(self) -> None:
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
    IrqRecorders by GSI; `stops`, `words` and `logs` what was asked of stop(), cmdline() and log(); `steps` the loop.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        self.mem = GuestMemory([Region(0, memoryview(bytearray(size)))])
        self.steps = StepLoop()
        self.loop: EventLoop = self.steps
        self.ports = Bus("port")
        self.memory_bus = Bus("mmio")
        self.lines: dict[int, IrqRecorder] = {}
        self.words: list[str] = []
        self.stops: list[Stop] = []
        self.logs: list[tuple[str, dict[str, object]]] = []
        self.transports: list[VirtioMmio] = []
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

    def irq(self, gsi: int | None = None) -> IrqRecorder:
        if gsi is None:
            gsi = self._next_gsi
            self._next_gsi += 1
        return self.lines.setdefault(gsi, IrqRecorder())

    def doorbell(self, address: int, size: int, value: int, ring: Callable[[], None], owner: BusDevice) -> None:
        """None: the write reaches the device."""

    def virtio(self, device: VirtioDevice) -> None:
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
    the queue has.
    """

    def __init__(self, board: FakeBoard, number: int = 0, free: int = 0x10000) -> None:
        self.board = board
        self.transport = board.transports[number]
        self.base = self.transport.base
        self.features = 0
        self.queues: list[_Ring] = []
        self._free = free

    # Registers.

    def get(self, register: str, size: int = 4) -> int:
        return self.board.memory_bus.read(self.base + self._offset(register), size)

    def set(self, register: str, value: int) -> None:
        self.board.memory_bus.write(self.base + self._offset(register), 4, value)

    def config(self, offset: int, size: int) -> int:
        return self.board.memory_bus.read(self.base + CONFIG + offset, size)

    def start(self, features: int = F.VERSION_1, sizes: Sequence[int] | None = None) -> None:
        """Reset, agree on `features`, set up the queues (of `sizes` entries, else as large as they may be), go."""
        self.set("Status", 0)
        self.set("Status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)
        self.accept(features)
        assert self.get("Status") & STATUS.FEATURES_OK, "the device does not take these features"
        self.queues = []
        for index in range(len(self.transport.core.queues)):
            self.set("QueueSel", index)
            self.add_queue(sizes[index] if sizes else self.get("QueueNumMax"))
        self.set("Status", self.get("Status") | STATUS.DRIVER_OK)
        self.board.steps.turn()

    def accept(self, features: int) -> None:
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
        """InterruptStatus, which is acknowledged."""
        status = self.get("InterruptStatus")
        self.set("InterruptACK", status & (INTERRUPT.USED_BUFFER | INTERRUPT.CONFIGURATION))
        return status

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

    def _offset(self, register: str) -> int:
        return int(VirtioMmio.REGISTERS[register].offset or 0)


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
