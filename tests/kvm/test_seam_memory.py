"""Memory slots, the dirty log, doorbells and coalesced writes."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest
from rig import MMIO, Access, Rig, load, port_read, port_write, store

from kvmpy.core.memory import GuestMemory
from kvmpy.mainboard import EventDoorbell
from kvmpy.x86 import layout, longmode

PORT = 0x500
PAGE = layout.PAGE
SLOT = 1


@pytest.fixture
def doorbell() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def rung(doorbell: int) -> int:
    """How often, since the last look."""
    try:
        return os.eventfd_read(doorbell)
    except BlockingIOError:
        return 0


def dirty_pages(log: bytes) -> list[int]:
    bits = int.from_bytes(log, "little")
    return [page for page in range(len(log) * 8) if bits >> page & 1]


def test_puppet_does_as_told(vm: Rig) -> None:
    value = 0x1122334455667788
    vm.devices.answer = lambda address, size: value
    vm.perform(
        *(store(0x200000 + 8 * size, size, value) for size in (1, 2, 4, 8)),
        *(load(MMIO, size) for size in (1, 2, 4, 8)),
        *(port_write(PORT, size, value) for size in (1, 2, 4)),
        *(port_read(PORT + 2 * size, size) for size in (1, 2, 4)),
    )

    half, other = 0x55667788, 0x11223344
    stored = [vm.mem.read(0x200000 + 8 * size, 8) for size in (1, 2, 4, 8)]
    assert stored == [value.to_bytes(8, "little")[:size].ljust(8, b"\0") for size in (1, 2, 4, 8)]
    assert [a.size for a in vm.devices.log] == [1, 2, 4, 8]
    assert vm.reports[:8] == [0x88, 0, 0x7788, 0, half, 0, half, other]
    assert vm.board.written(PORT) == [0x88, 0x7788, half]
    assert len(vm.reports) == 8 + 3


def test_memory_slot_of_its_own(vm: Rig) -> None:
    extra = GuestMemory.allocate([(0x10000000, 4 * PAGE)], huge=False)
    vm.vm.set_memory(SLOT, 0x10000000, extra.regions[0].buf)
    extra.write(0x10000000, b"\x2a\0\0\0")

    vm.perform(load(0x10000000, 4), store(0x10003FF8, 8, 7))

    assert vm.reports == [0x2A, 0]
    assert extra.read(0x10003FF8, 8) == struct.pack("<Q", 7)
    vm.vm.close()
    extra.close()


def test_memory_above_4_gib(vm: Rig) -> None:
    high = layout.HOLE_END + 0x40000000
    extra = GuestMemory.allocate([(high, PAGE)], huge=False)
    vm.vm.set_memory(SLOT, high, extra.regions[0].buf)
    vm.load("puppet")
    directory = 0x300000  # maps the 2 MiB at `high`
    pdpt = layout.PAGE_TABLES + PAGE
    table = longmode.PRESENT | longmode.WRITABLE
    vm.mem.write(pdpt + 8 * (high >> 30), struct.pack("<Q", directory | table))
    vm.mem.write(directory, struct.pack("<Q", high | table | longmode.LARGE))

    vm.answer([*store(high + 0x10, 8, 0xFEEDFACE12345678).words(), *load(high + 0x10, 4).words(), 0])
    vm.run()

    assert extra.read(high + 0x10, 8) == struct.pack("<Q", 0xFEEDFACE12345678)
    assert vm.reports == [0x12345678, 0]
    vm.vm.close()
    extra.close()


def test_memory_outlives_its_last_python_name(vm: Rig) -> None:
    buf = bytearray(4 * PAGE)
    at = -vm_address(buf) % PAGE
    vm.vm.set_memory(SLOT, 0x10000000, memoryview(buf)[at : at + PAGE])
    with pytest.raises(BufferError):
        buf.clear()  # its address is in KVM's hands

    vm.perform(store(0x10000000, 4, 7))

    assert buf[at : at + 4] == b"\7\0\0\0"


def vm_address(buf: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buf))


def test_dirty_log_marks_exactly_the_pages_written(vm: Rig) -> None:
    pages = 70  # more than one word of the bitmap
    extra = GuestMemory.allocate([(0x10000000, pages * PAGE)], huge=False)
    vm.vm.set_memory(SLOT, 0x10000000, extra.regions[0].buf, log_dirty=True)

    vm.perform(
        store(0x10000000 + 3 * PAGE + 5, 1, 1),
        store(0x10000000 + 65 * PAGE - 4, 8, 1),  # the last bytes of page 64, the first of page 65
    )

    assert dirty_pages(vm.vm.dirty_log(SLOT, pages * PAGE)) == [3, 64, 65]
    assert dirty_pages(vm.vm.dirty_log(SLOT, pages * PAGE)) == []
    vm.vm.close()
    extra.close()


def test_doorbell_at_a_port_rings_without_an_exit(vm: Rig, doorbell: int) -> None:
    vm.vm.ioeventfd(doorbell, PORT, 2, pio=True)

    vm.perform(port_write(PORT, 2, 1), port_write(PORT, 2, 2), port_write(PORT, 4, 3), port_write(PORT + 2, 2, 4))

    assert rung(doorbell) == 2
    assert vm.board.written(PORT) == [3]  # another size is another register
    assert vm.board.written(PORT + 2) == [4]


def test_doorbell_in_memory_rings_without_an_exit(vm: Rig, doorbell: int) -> None:
    vm.vm.ioeventfd(doorbell, MMIO + 0x50, 4)

    vm.perform(store(MMIO + 0x50, 4, 1), store(MMIO + 0x50, 4, 2), store(MMIO + 0x54, 4, 3), load(MMIO + 0x50, 4))

    assert rung(doorbell) == 2
    assert vm.devices.log == [Access("write", MMIO + 0x54, 4, 3), Access("read", MMIO + 0x50, 4, 0)]


@pytest.mark.parametrize("pio", [True, False], ids=["port", "memory"])
def test_doorbell_with_match(vm: Rig, doorbell: int, pio: bool) -> None:
    address = PORT if pio else MMIO
    write = port_write if pio else store
    vm.vm.ioeventfd(doorbell, address, 4, match=7, pio=pio)

    vm.perform(write(address, 4, 6), write(address, 4, 7), write(address, 4, 0x10007))

    assert rung(doorbell) == 1
    assert (vm.board if pio else vm.devices).written(address) == [6, 0x10007]


def test_doorbell_of_any_size(vm: Rig, doorbell: int) -> None:
    vm.vm.ioeventfd(doorbell, MMIO, 0)

    vm.perform(store(MMIO, 1, 1), store(MMIO, 2, 1), store(MMIO, 4, 1), store(MMIO + 1, 1, 1))

    assert rung(doorbell) == 3
    assert vm.devices.log == [Access("write", MMIO + 1, 1, 1)]


def test_doorbell_removed(vm: Rig, doorbell: int) -> None:
    vm.vm.ioeventfd(doorbell, MMIO, 4, match=7)
    vm.vm.ioeventfd(doorbell, MMIO, 4, match=7, remove=True)

    vm.perform(store(MMIO, 4, 7))

    assert rung(doorbell) == 0
    assert vm.devices.written(MMIO) == [7]


def test_doorbell_of_a_board_can_be_moved(vm: Rig) -> None:
    bell = EventDoorbell(vm.vm, 0, None)
    for address in (MMIO, None, MMIO + PAGE):
        bell.place(address)

    vm.perform(store(MMIO, 2, 1), store(MMIO + PAGE, 2, 2), store(MMIO + PAGE, 4, 3))

    assert rung(bell.fd) == 2
    assert vm.devices.log == [Access("write", MMIO, 2, 1)]
    os.close(bell.fd)


def coalesced(rig: Rig) -> list[tuple[int, int, int, int]]:
    """(address, size, is a port, value) of the writes in the ring, oldest first (struct kvm_coalesced_mmio_ring)."""
    start = rig.kvm.check("KVM_CAP_COALESCED_MMIO") * PAGE
    page = rig.vcpu.page[start : start + PAGE]
    entry = struct.Struct("<QIIQ")
    entries = (PAGE - 8) // entry.size
    first, last = struct.unpack_from("<II", page)
    ring = [
        entry.unpack_from(page, 8 + entry.size * (n % entries)) for n in range(first, first + (last - first) % entries)
    ]
    return [(address, size, pio, value & ((1 << 8 * size) - 1)) for address, size, pio, value in ring]


def test_coalesced_port_writes_wait_in_the_ring(vm: Rig) -> None:
    vm.vm.coalesce(PORT, 4, pio=True)

    vm.perform(port_write(PORT, 1, 1), port_write(PORT, 4, 0x22222222), port_write(PORT + 2, 2, 3), port_read(PORT, 1))

    assert coalesced(vm) == [(PORT, 1, 1, 1), (PORT, 4, 1, 0x22222222), (PORT + 2, 2, 1, 3)]
    assert [a for a in vm.board.log if a.address == PORT] == [Access("read", PORT, 1, 0)]


def test_coalesced_mmio_writes_wait_in_the_ring(vm: Rig) -> None:
    vm.vm.coalesce(MMIO, 8)

    vm.perform(store(MMIO, 8, 1), store(MMIO + 4, 4, 2), store(MMIO + 8, 4, 3))

    assert coalesced(vm) == [(MMIO, 8, 0, 1), (MMIO + 4, 4, 0, 2)]
    assert vm.devices.log == [Access("write", MMIO + 8, 4, 3)]


def test_coalescing_removed(vm: Rig) -> None:
    vm.vm.coalesce(PORT, 4, pio=True)
    vm.vm.coalesce(PORT, 4, pio=True, remove=True)

    vm.perform(port_write(PORT, 1, 1))

    assert coalesced(vm) == []
    assert vm.board.written(PORT) == [1]
