"""What the compiled run loop does by itself: it answers cells, and puts output where the console's thread finds it."""

from __future__ import annotations

import os
from collections.abc import Callable

from .._kvm_ioctls import ffi, lib
from ..core.cell import Cell
from ..core.typed import Any, Final
from .exits import Exit
from .handle import Vcpu

# What kvmpy_run returns, besides -errno: size (bits 0-3) and address (from bit 4 on) of a read or write, and these.
MMIO: Final = 1 << 60
WRITE: Final = 1 << 61
OTHER: Final = 1 << 62
SIZE: Final = 0xF
ADDRESS_SHIFT: Final = 4

RECENT: Final[int] = lib.RECENT  # exits that are remembered, for crash reports


class FastOutbox:
    """The twin of core.outbox.PlainOutbox: `fd` is an eventfd that becomes readable when the reader should look."""

    def __init__(self, limit: int, batch: int) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.stream = ffi.gc(lib.kvmpy_stream_new(limit, batch, self.fd), lib.kvmpy_stream_free)
        self._lingers = ffi.new("int *")

    def put(self, data: bytes) -> bool:
        room = lib.kvmpy_stream_put(self.stream, data, len(data))
        if room < 0:
            raise MemoryError("no memory for console output")
        return bool(room)

    def waiting(self) -> tuple[int, bool]:
        return int(lib.kvmpy_stream_waiting(self.stream, self._lingers)), bool(self._lingers[0])

    def take(self) -> bytes:
        size, _ = self.waiting()
        buf = bytearray(size)
        return bytes(buf[: lib.kvmpy_stream_take(self.stream, ffi.from_buffer(buf), size)])

    def sent(self, count: int) -> bool:
        return bool(lib.kvmpy_stream_sent(self.stream, count))

    @property
    def under_way(self) -> int:
        return int(lib.kvmpy_stream_under_way(self.stream))

    def close(self) -> None:
        """No more wakes; safe to call twice, and `put` may still be called."""
        if self.fd >= 0:
            lib.kvmpy_stream_close(self.stream)
            os.close(self.fd)
            self.fd = -1


class Cells:
    """The cells of one machine."""

    def __init__(self) -> None:
        self.table = ffi.new("struct kvmpy_cells *")
        self._kept: list[Any] = []  # the table has only pointers

    def add(self, address: int, size: int, *, mmio: bool, stream: Any = None) -> Cell:
        """A cell for accesses of `size` bytes at `address`; one that nobody looks at when there is no room."""
        cell = ffi.new("struct kvmpy_cell *")
        if not lib.kvmpy_cell_add(self.table, address << ADDRESS_SHIFT | size | (MMIO if mmio else 0), cell):
            return Cell()
        if stream is not None:
            cell.stream = stream
        self._kept += [cell, stream]
        return cell  # type: ignore[no-any-return]  # it has a Cell's attributes


class Runner:
    """kvmpy_run for one vCPU: `run(fd, cpu, answer)`, where `answer` is for the read that the last call returned.

    What the guest wrote is `cpu.data`. The GIL is dropped until an exit comes that no cell answers.
    """

    def __init__(self, vcpu: Vcpu, cells: Cells) -> None:
        self.run: Callable[[int, Any, int], int] = lib.kvmpy_run
        self.cpu = ffi.new("struct kvmpy_vcpu *")
        self._kept = (cells, ffi.from_buffer(vcpu.page))
        self.cpu.run, self.cpu.cells = self._kept[1], cells.table

    def recent(self) -> list[Exit]:
        """The last exits, the latest last."""
        total = self.cpu.exits
        found = (self.cpu.recent[number % RECENT] for number in range(max(0, total - RECENT), total))
        return [Exit(exit.reason, exit.is_write, exit.size, exit.address, exit.count) for exit in found]

    def close(self) -> None:
        """Let go of the kvm_run page; `run` fails from now on."""
        self.cpu.run = ffi.NULL
        ffi.release(self._kept[1])
