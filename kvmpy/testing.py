"""Fakes of the machine for tests of devices, your own included: no KVM, no threads, nothing to wait for.

    board = FakeBoard()
    serial = Serial(sink := ByteSink(), port=0x3F8, gsi=4)
    serial.attach(board)
    board.ports.write(0x3F8, 1, ord("x"))         # what a guest's `out` does
    assert sink.data == b"x"
    assert board.lines[4].level == 0              # an IrqRecorder

What a device does on the event loop runs when the test says so: `board.steps.turn()`, see StepLoop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .core.board import Board, Stop
from .core.bus import Bus, BusDevice
from .core.events import READ, EventLoop
from .core.memory import GuestMemory, Region

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

    def cmdline(self, *words: str) -> None:
        self.words += words

    def stop(self, why: Stop) -> None:
        self.stops.append(why)

    def log(self, event: str, **fields: object) -> None:
        self.logs.append((event, fields))


def _call(callback: Callable[[], None], owner: Any) -> None:
    if owner is None:
        callback()
    else:
        with owner.lock:
            callback()


if TYPE_CHECKING:
    _is_a_board: Board = FakeBoard()
