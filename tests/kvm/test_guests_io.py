"""Every port and MMIO access of a guest reaches the buses: once, in order, with its size and value."""

from __future__ import annotations

import itertools
import struct

from rig import ASK, END, MMIO, REPORT, Access, Rig, Shifted

from kvmpy.core.board import Reason, Stop
from kvmpy.core.bus import Bus
from kvmpy.kvm import exits
from kvmpy.x86 import layout, longmode

DONE = Stop(Reason.EXIT)
VALUE = 0x1122334455667788
LOW, HIGH = VALUE & 0xFFFFFFFF, VALUE >> 32


def test_port_io_of_every_size(vm: Rig) -> None:
    answers = iter([0xA1, 0xB2B1, 0xC4C3C2C1, 0xD1, 0xE2E1, 0xF4F3F2F1])
    vm.board.answer = lambda port, size: next(answers)

    stop = vm.run("pio")

    assert stop == DONE
    assert vm.board.log == [
        Access("read", ASK, 1, 0xA1),
        Access("write", REPORT, 1, 0xA1),
        Access("read", ASK, 2, 0xB2B1),
        Access("write", REPORT, 2, 0xB2B1),
        Access("read", ASK, 4, 0xC4C3C2C1),
        Access("write", REPORT, 4, 0xC4C3C2C1),
        Access("read", 0xFFF0, 1, 0xD1),
        Access("write", 0xFFF8, 1, 0xD1),
        Access("read", 0xFFF0, 2, 0xE2E1),
        Access("write", 0xFFF8, 2, 0xE2E1),
        Access("read", 0xFFF0, 4, 0xF4F3F2F1),
        Access("write", 0xFFF8, 4, 0xF4F3F2F1),
    ]


def test_unmapped_ports_float_high(vm: Rig) -> None:
    vm.ports = Bus("port")  # without ASK
    vm.ports.add(REPORT, 4, Shifted(vm.board, REPORT))
    vm.ports.add(END, 1, vm.end_port)

    stop = vm.run("pio")

    assert stop == DONE
    assert vm.reports == [0xFF, 0xFFFF, 0xFFFFFFFF]


def test_string_output_in_order_and_over_pages(vm: Rig) -> None:
    vm.mem.write(0x5FF0, bytes(range(0x40)))

    stop = vm.run("string_io")

    up = bytes(range(8, 0x40))
    assert stop == DONE
    assert [a for a in vm.board.log if a.verb == "write"] == [
        *(Access("write", REPORT, 1, value) for value in up[:16]),
        *(Access("write", REPORT, 2, value) for value in struct.unpack("<8H", up[:16])),
        *(Access("write", REPORT, 4, value) for value in struct.unpack("<4I", up[:16])),
        *(Access("write", REPORT, 1, value) for value in (8, 7, 6, 5)),
    ]


def test_string_input_fills_memory_exactly(vm: Rig) -> None:
    counter = itertools.count(1)
    vm.board.answer = lambda port, size: next(counter) * 0x01030507 & ((1 << 8 * size) - 1)
    vm.mem.write(0x1000, b"\xee" * 0x4000)
    vm.mem.write(0xA000, b"\xee" * 0x2000)

    stop = vm.run("string_io")

    given = [a.value for a in vm.board.log if a.verb == "read"]
    assert stop == DONE
    assert vm.mem.read(0x1FF7, 18) == b"\xee" + bytes(given[:16]) + b"\xee"
    assert vm.mem.read(0x2FF7, 18) == b"\xee" + struct.pack("<8H", *given[16:24]) + b"\xee"
    assert vm.mem.read(0x3FF7, 18) == b"\xee" + struct.pack("<4I", *given[24:28]) + b"\xee"
    assert vm.mem.read(0x4FF7, 6) == b"\xee" + bytes(reversed(given[28:32])) + b"\xee"
    assert vm.mem.read(0xA000, 6001) == bytes(given[32:]) + b"\xee"


def test_string_input_comes_in_batches(vm: Rig) -> None:
    vm.run("string_io")

    counts = [exit.elements for exit in vm.thread.recent() if exit.reason == exits.EXIT_IO and not exit.is_write]
    assert max(counts) > 1


def test_mmio_of_every_size(vm: Rig) -> None:
    answers = iter([0xA1, 0xB2B1, 0xC4C3C2C1, VALUE, 0x11223344, 0x55667788, 41, 1, 2, 3])
    vm.devices.answer = lambda address, size: next(answers)

    stop = vm.run("mmio")

    assert stop == DONE
    assert vm.devices.log == [
        Access("write", MMIO + 8, 8, VALUE),
        Access("write", MMIO + 4, 4, LOW),
        Access("write", MMIO + 2, 2, 0x7788),
        Access("write", MMIO, 1, 0x88),
        Access("read", MMIO + 0x10, 1, 0xA1),
        Access("read", MMIO + 0x12, 2, 0xB2B1),
        Access("read", MMIO + 0x14, 4, 0xC4C3C2C1),
        Access("read", MMIO + 0x18, 8, VALUE),
        # KVM splits what crosses a page
        Access("write", MMIO + 0xFFC, 4, LOW),
        Access("write", MMIO + 0x1000, 4, HIGH),
        Access("read", MMIO + 0xFFC, 4, 0x11223344),
        Access("read", MMIO + 0x1000, 4, 0x55667788),
        Access("read", MMIO + 0x20, 4, 41),
        Access("write", MMIO + 0x20, 4, 42),
        *(Access("write", MMIO + 0x40 + at, 4, LOW) for at in (0, 4, 8)),
        *(Access("read", MMIO + 0x50 + at, 4, value) for at, value in ((0, 1), (4, 2), (8, 3))),
    ]
    assert vm.reports == [0xA1, 0xB2B1, 0xC4C3C2C1, LOW, HIGH, 0x11223344, 0x55667788, 1, 2, 3]


def test_unmapped_mmio_floats_high(vm: Rig) -> None:
    told: list[tuple[int, int, int | None]] = []
    vm.mmio = Bus("mmio", lambda address, size, value: told.append((address, size, value)))

    stop = vm.run("mmio")

    ones = 0xFFFFFFFF
    assert stop == DONE
    assert vm.reports == [0xFF, 0xFFFF, *[ones] * 8]
    assert told[:5] == [
        (MMIO + 8, 8, VALUE), (MMIO + 4, 4, LOW), (MMIO + 2, 2, 0x7788), (MMIO, 1, 0x88), (MMIO + 0x10, 1, None)
    ]  # fmt: skip


def test_entry_in_protected_mode(vm: Rig) -> None:
    stop = vm.run("protected")

    cr0 = longmode.CR0_PE | longmode.CR0_ET
    assert stop == DONE
    assert vm.reports == [4, longmode.BOOT_CS, longmode.BOOT_DS, cr0, 0, 0xCAFEF00D]


def test_entry_in_long_mode(vm: Rig) -> None:
    stop = vm.run("longmode")

    cr0 = longmode.CR0_PE | longmode.CR0_ET | longmode.CR0_PG
    efer = longmode.EFER_LME | longmode.EFER_LMA
    assert stop == DONE
    assert vm.reports == [
        8, longmode.BOOT_CS, longmode.BOOT_DS, cr0, longmode.CR4_PAE, efer, layout.PAGE_TABLES, 0xC0000000
    ]  # fmt: skip


def test_a_guest_can_climb_from_real_to_long_mode(vm: Rig) -> None:
    assert vm.run("modes") == DONE
    assert vm.reports == [16, 32, 64]
