"""Performs the operations of a case on a device: the driver that they describe, and everything that checks it."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmpy.core.errors import GuestMemoryError
from kvmpy.pci.config import COMMAND, Header
from kvmpy.testing import FakeBoard, RingDriver
from kvmpy.virtio import blk, net
from kvmpy.virtio.spec import STATUS

from .flow import Flow
from .oracle import Oracle, Violation
from .ram import DATA, RINGS, Ram

ROUNDS = 300  # of the event loop, until a device has to come to rest
PATIENCE = 3  # chains that a driver still makes before it sees that the device does not work any more
MAX_LOG_LINE = 500  # characters: a guest may fill no disk with one line
MAX_LOG_LINES = 64  # for one operation

Op = list[Any]  # a name, then arguments that JSON can have


class Rig:
    """`kind` is what there is to know about the device (kinds.py); `engine` "python" or "c"; files go to `folder`."""

    def __init__(self, kind: Any, transport: str, engine: str, ram: Ram, folder: Path) -> None:
        self.engine = engine
        self._pure = blk.PURE, net.PURE
        self.board = FakeBoard(1, transport)
        self.mem = self.board.mem = ram.fresh()
        self.kind = kind
        self.device = kind.open(folder)
        self.device.attach(self.board)
        self.steps = self.board.steps
        self.transport = self.board.transports[0]
        self.core = self.transport.core
        self.oracle = Oracle(self.mem, self.core, kind)
        self._serve, self.core.notify = self.core.notify, self._notify
        self.device._serve = self._notify
        self.driver: RingDriver | None = None
        self.flows: list[Flow] = []
        self.chains = 0  # made available so far
        self._restart: tuple[int, list[int], list[Op]] = (0, [], [])
        self._late = 0  # chains since the device does not work any more
        self._beginning = False
        self._flip: tuple[int, list[bytes]] | None = None
        self._bar = (0, 0)
        if self.board.pci is not None:
            header = self.transport.config.header
            self._bar = header.bar_low, header.bar_high
            self.ecam = self.board.pci.config_address(0)

    def close(self) -> None:
        try:
            with self.device.lock:
                self.core.reset()
            self.device.close()
        finally:
            blk.PURE, net.PURE = self._pure
            self.steps._queue.clear()
            self.kind.close()

    # Operations.

    def perform(self, op: Op) -> None:
        """One of them; raises Violation."""
        name, *arguments = op
        self._choose()
        lines = len(self.board.logs)
        getattr(self, f"op_{name}")(*arguments)
        news = self.board.logs[lines:]
        if len(news) > MAX_LOG_LINES or any(len(str(line)) > MAX_LOG_LINE for line in news):
            raise Violation(
                "log", f"{len(news)} lines, the longest of {max(len(str(line)) for line in news)} characters"
            )
        if self.board.stops:
            raise Violation("stop", f"the machine stops: {self.board.stops}")

    @property
    def view(self) -> tuple[Any, ...]:
        """All that guest, host and people can see now: RAM, status, log lines, what is on the host's side."""
        self.oracle.begin()
        return self.oracle.image, self.core.status, self.board.logs, self.kind.observe()

    def op_start(self, features: int, sizes: list[int], first: list[Op]) -> None:
        """A driver begins anew: reset, features, queues of these sizes, DRIVER_OK, and what it does first."""
        self._restart = (features, sizes, first)
        self._late = 0
        self.mem.race(0, [])
        self._free_bar()
        self.op_write(RINGS, bytes(DATA - RINGS).hex())
        self.driver = driver = RingDriver(self.board, free=RINGS)
        self._guarded(lambda: self._status(0))
        self._settle()
        self._status(STATUS.ACKNOWLEDGE | STATUS.DRIVER)
        driver.accept(features)
        for index, size in enumerate(sizes):
            driver.set("QueueSel", index)
            driver.add_queue(size)
        self.flows = [Flow(self.mem, ring) for ring in driver.queues]
        self.oracle.loose = self.mem.raced = False
        self.oracle.mark()
        self.kind.started(features)
        self._status(driver.get("Status") | STATUS.DRIVER_OK)
        self.oracle.check()
        self._settle()
        self._beginning = True
        for op in first:
            self.perform(op)
        self._beginning = False

    def op_write(self, address: int, data: str) -> None:
        """Any store of the guest's."""
        self.mem.poke(address, bytes.fromhex(data))
        self.oracle.stale = True

    def op_poke(self, index: int, ring: str, offset: int, data: str) -> None:
        """A store into a ring: "desc", "avail" or "used"."""
        if self.driver is not None and index < len(self.driver.queues):
            self.op_write(getattr(self.driver.queues[index], ring) + offset, data)

    def op_chain(self, index: int, segments: list[Any], odd: dict[str, Any]) -> None:
        """Make a chain available: [address, size, writable, data] of each part, `odd` has what is wrong with it."""
        if not self.core.running:
            self._late += not self._beginning
            if self._late == PATIENCE:
                self.op_start(*self._restart)
        if self.driver is not None and index < len(self.driver.queues) and segments:
            self.flows[index].reclaim(self.core.queues[index].positions[1])
            if self.flows[index].submit(self.driver, index, segments, odd):
                self.chains += 1
                self.oracle.stale = True

    def op_kick(self, index: int) -> None:
        if self.driver is None:
            return
        with self._another_cpu():
            self.driver.set("QueueNotify", index)
            self._settle()

    def op_race(self, moment: int, pokes: list[list[Any]]) -> None:
        """In the middle of what the device does next, these stores happen."""
        self.mem.race(moment, [(address, bytes.fromhex(data)) for address, data in pokes])

    def op_flip(self, address: int, *values: str) -> None:
        """During the next kick another CPU writes these values to `address` in turn: real threads, for what is done
        without the GIL. What comes out is not the same each time."""
        if self.engine == "c":
            self._flip = address, [bytes.fromhex(value) for value in values]

    def op_access(self, space: str, offset: int, size: int, value: int | None) -> None:
        """A load, or with `value` a store, in the "device" (MMIO page or BAR) or the "config" space."""
        bus = self.board.memory_bus
        if space == "device":
            base = self.transport.base
            if base is None and self.driver is not None:
                base = self.driver.base  # where it has been
        else:
            base = self.ecam if self.board.pci is not None else None
        if base is None:
            return
        if value is None:
            self._guarded(lambda: bus.read(base + offset, size))
        else:
            self._guarded(lambda: bus.write(base + offset, size, value))
        self._settle()

    def op_interrupts(self) -> None:
        """The driver looks why it was interrupted."""
        if self.driver is not None:
            self.driver.interrupts()

    def op_host(self, name: str, *arguments: Any) -> None:
        """Something that comes from the host's side."""
        self._guarded(lambda: self.kind.host(self, name, *arguments))
        self._settle()

    def op_advance(self, seconds: float) -> None:
        self._guarded(lambda: self.steps.advance(seconds))
        self._settle()

    # The end of a case.

    def recover(self) -> None:
        """After a reset a normal request works."""
        self._choose()
        self.mem.race(0, [])
        self._flip = None
        self.op_start(self.kind.FEATURES, list(self.kind.SIZES), [])
        if not self.core.running:
            raise Violation("recovery", f"the device does not start after a reset: status {self.core.status:#x}")
        self.kind.works(self)
        if not self.core.running:
            raise Violation("recovery", f"a normal request ends in status {self.core.status:#x}")

    def request(self, index: int, readable: list[bytes], writable: list[int]) -> bytes:
        """A normal request after `recover`: what the device has written."""
        assert self.driver is not None
        try:
            head = self.driver.submit(index, readable, writable)
            self.oracle.stale = True
            self.op_kick(index)
            used = self.driver.used(index)
        except GuestMemoryError as error:
            raise Violation("recovery", f"the driver has no memory left: {error}") from None
        if [number for number, _ in used] != [head]:
            raise Violation("recovery", f"a normal request of queue {index}: {used} was given back, not {head}")
        return self.driver.data(index, head)[: used[0][1]]

    # Inside.

    def _choose(self) -> None:
        """Devices look which engine they have when their driver is up."""
        blk.PURE = net.PURE = self.engine == "python"

    def _status(self, value: int) -> None:
        assert self.driver is not None
        self.driver.set("Status", value)

    def _free_bar(self) -> None:
        """What a driver's bus does first: the BAR where it was."""
        if self.board.pci is None:
            return
        for offset, size, value in (
            (Header.COMMAND_AT, 2, 0),
            (Header.BAR_LOW_AT, 4, self._bar[0]),
            (Header.BAR_HIGH_AT, 4, self._bar[1]),
            (Header.COMMAND_AT, 2, COMMAND.MEMORY | COMMAND.MASTER),
        ):
            self.board.memory_bus.write(self.ecam + offset, size, value)

    @contextmanager
    def _another_cpu(self) -> Iterator[None]:
        flip, self._flip = self._flip, None
        if flip is None:
            yield
            return
        address, values = flip
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                for value in values:
                    self.mem.poke(address, value)

        self.oracle.loose = True
        thread = threading.Thread(target=run, name="fuzz-cpu")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _notify(self, index: int) -> None:
        self._guarded(lambda: self._serve(index))

    def _guarded(self, act: Callable[[], object]) -> None:
        self.oracle.begin()
        act()
        if self.mem.raced:
            self.oracle.loose = True
        self.oracle.check()

    def _settle(self) -> None:
        """Let the event loop run until nothing is left to do."""
        for _ in range(ROUNDS):
            self.kind.settle()
            ready = []
            if self.steps.watched:
                poll = select.poll()
                for fd, events in self.steps.watched.items():
                    poll.register(fd, events)
                ready = [fd for fd, _ in poll.poll(0)]
            if not ready and not self.steps._queue:
                self.kind.rested()
                return
            for fd in ready:
                if fd in self.steps.watched:
                    self._guarded(lambda fd=fd: self.steps.ready(fd))
            self.steps.turn()
        raise Violation("rest", f"the device has not come to rest in {ROUNDS} turns of the event loop")
