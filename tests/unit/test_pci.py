"""Configuration space, MSI-X and the bus, as a guest that scans them would use them (PCI Local Bus 3.0, 6)."""

from __future__ import annotations

import threading

import pytest

from kvmpy.core.bus import Bus
from kvmpy.core.errors import ConfigError
from kvmpy.pci import msix
from kvmpy.pci.bus import ECAM_BUS, ECAM_PAGE, MAX_FUNCTIONS, PciBus
from kvmpy.pci.config import COMMAND, SIZE, ConfigSpace, Header
from kvmpy.pci.msix import CONTROL, MESSAGES, Msix
from kvmpy.testing import MessageRecorder

ECAM, WINDOW = 0xE000_0000, range(0xE100_0000, 0xE200_0000)
BAR = 0xE100_0000
VECTORS = 3
ENTRY = msix.ENTRY.size
MASK_AT = 12  # of the vector control in its entry


@pytest.fixture
def config() -> ConfigSpace:
    config = ConfigSpace(threading.Lock())
    config.add_bar(BAR, 0x8000)
    return config


@pytest.fixture
def messages() -> list[MessageRecorder]:
    return [MessageRecorder() for _ in range(VECTORS)]


@pytest.fixture
def table(messages: list[MessageRecorder]) -> Msix:
    """Enabled, each vector with a message of its own, all masked."""
    table = Msix(messages)
    for vector in range(VECTORS):
        table.write_table(ENTRY * vector, 8, MESSAGES)
        table.write_table(ENTRY * vector + 8, 4, 0x30 + vector)
    table.write_control(table.control | CONTROL.ENABLE)
    return table


@pytest.fixture
def memory() -> Bus:
    return Bus("mmio")


@pytest.fixture
def bus(memory: Bus) -> PciBus:
    return PciBus(memory, ECAM, WINDOW)


class Ram:
    """A BAR that reads as its number."""

    def __init__(self, number: int) -> None:
        self.lock = threading.Lock()
        self.number = number

    def read(self, offset: int, size: int) -> int:
        return self.number

    def write(self, offset: int, size: int, value: int) -> None:
        pass


# Configuration space.


def test_bar_says_its_size_and_takes_an_address(config: ConfigSpace) -> None:
    config.write(Header.BAR_LOW_AT, 4, 0xFFFFFFFF)
    config.write(Header.BAR_HIGH_AT, 4, 0xFFFFFFFF)
    size = config.read(Header.BAR_LOW_AT, 4), config.read(Header.BAR_HIGH_AT, 4)
    config.write(Header.BAR_LOW_AT, 4, 0x2345_FFFF)
    config.write(Header.BAR_HIGH_AT, 4, 1)
    config.write(Header.COMMAND_AT, 2, COMMAND.MEMORY)

    assert size == (0xFFFF_8004, 0xFFFF_FFFF)  # 32 KiB of memory, 64 bits
    assert config.bar == 0x1_2345_8000


def test_bar_answers_nowhere_without_memory_space(config: ConfigSpace) -> None:
    before = config.bar
    config.write(Header.COMMAND_AT, 2, COMMAND.MEMORY)
    on = config.bar
    config.write(Header.COMMAND_AT, 2, COMMAND.MASTER)

    assert (before, on, config.bar) == (None, BAR, None)


def test_what_is_read_only_stays(config: ConfigSpace) -> None:
    config.header.vendor_id, config.header.class_code = 0x1AF4, 0x02000001
    before = bytes(config.data)

    for offset in range(0, ECAM_PAGE, 4):
        config.write(offset, 4, 0xFFFFFFFF)
        config.write(offset, 4, 0)
    config.write(Header.BAR_LOW_AT, 4, BAR)

    assert bytes(config.data) == before


def test_bytes_of_a_register_can_be_written_alone(config: ConfigSpace) -> None:
    config.write(Header.COMMAND_AT, 1, COMMAND.MEMORY)
    config.write(Header.COMMAND_AT + 1, 1, COMMAND.INTX_DISABLE >> 8)

    assert config.read(Header.COMMAND_AT, 2) == COMMAND.MEMORY | COMMAND.INTX_DISABLE


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_behind_the_end_is_nothing(config: ConfigSpace, size: int) -> None:
    config.write(ECAM_PAGE - size, size, (1 << 8 * size) - 1)
    config.write(SIZE - 1, size, 0)

    assert config.read(ECAM_PAGE - size, size) == config.read(SIZE, size) == 0
    assert len(config.data) == SIZE


def test_capabilities_are_linked(config: ConfigSpace) -> None:
    first = config.add_capability(0x09, bytes([5, 0xAB, 0]), bytes([0, 0xFF]))
    second = config.add_capability(0x11, bytes(10))
    config.write(first + 2, 4, 0x1234)

    assert config.read(0x06, 2) & 1 << 4
    assert config.read(0x34, 1) == first
    assert config.read(first, 2) == second << 8 | 0x09
    assert config.read(second, 2) == 0x11
    assert config.read(first + 2, 2) == 0x1205
    assert first % 4 == second % 4 == 0


def test_handlers_hear_of_accesses_that_touch_their_register(config: ConfigSpace) -> None:
    heard: list[str] = []
    config.on_read[0x40] = lambda: heard.append("read")
    config.on_write[0x40] = lambda: heard.append("write")

    config.read(0x43, 1)
    config.read(0x3C, 8)
    config.write(0x42, 2, 0)
    config.write(0x44, 4, 0)

    assert heard == ["read", "read", "write"]


# MSI-X.


def unmask(table: Msix, vector: int) -> None:
    table.write_table(ENTRY * vector + MASK_AT, 4, 0)


def test_message_is_sent_once_it_is_unmasked(table: Msix, messages: list[MessageRecorder]) -> None:
    unmask(table, 1)

    table.signal(1)

    assert messages[1].message == (MESSAGES, 0x31)
    assert [message.pulses for message in messages] == [0, 1, 0]
    assert table.pending == 0


def test_nothing_is_routed_before_the_unmasking(table: Msix, messages: list[MessageRecorder]) -> None:
    assert [message.routes for message in messages] == [0, 0, 0]


def test_nothing_is_routed_while_msi_x_is_off(table: Msix, messages: list[MessageRecorder]) -> None:
    table.write_control(table.control & ~CONTROL.ENABLE)
    unmask(table, 1)
    off = messages[1].routes
    table.write_control(table.control | CONTROL.ENABLE)

    assert (off, messages[1].routes) == (0, 1)


def test_masked_vector_waits(table: Msix, messages: list[MessageRecorder]) -> None:
    table.signal(2)
    table.signal(2)
    pending = table.read_pending(0, 8)
    unmask(table, 2)

    assert pending == 1 << 2
    assert (table.read_pending(0, 8), messages[2].pulses) == (0, 1)


def test_function_mask_holds_all_back(table: Msix, messages: list[MessageRecorder]) -> None:
    unmask(table, 0)
    unmask(table, 1)
    table.write_control(table.control | CONTROL.FUNCTION_MASK)
    table.signal(0)
    table.signal(1)
    held = [message.pulses for message in messages]
    table.write_control(table.control & ~CONTROL.FUNCTION_MASK)

    assert (held, [message.pulses for message in messages]) == ([0, 0, 0], [1, 1, 0])


def test_vector_can_be_masked_again(table: Msix, messages: list[MessageRecorder]) -> None:
    unmask(table, 0)
    table.write_table(MASK_AT, 4, 1)

    table.signal(0)

    assert (messages[0].pulses, table.pending) == (0, 1)


def test_new_message_counts_from_the_unmasking_on(table: Msix, messages: list[MessageRecorder]) -> None:
    unmask(table, 0)
    table.write_table(MASK_AT, 4, 1)
    table.write_table(8, 4, 0x99)
    before = messages[0].message
    unmask(table, 0)

    assert (before, messages[0].message) == ((MESSAGES, 0x30), (MESSAGES, 0x99))


def test_nothing_is_sent_or_kept_while_disabled(table: Msix, messages: list[MessageRecorder]) -> None:
    unmask(table, 0)
    table.signal(1)
    table.write_control(table.control & ~CONTROL.ENABLE)
    table.signal(0)
    table.write_control(table.control | CONTROL.ENABLE)
    unmask(table, 1)

    assert [message.pulses for message in messages] == [0, 0, 0]


def test_quad_words(table: Msix, messages: list[MessageRecorder]) -> None:
    table.write_table(8, 8, 0x77)  # data, and unmasked

    assert messages[0].message == (MESSAGES, 0x77)
    assert table.read_table(0, 8) == MESSAGES


@pytest.mark.parametrize("address", [0, 0x1000, 0xFEC00000, 0xFEDFFFFC, 0xFEF00000, MESSAGES | 1 << 32, 2**64 - 4])
def test_messages_to_anything_but_the_apics_go_nowhere(
    table: Msix, messages: list[MessageRecorder], address: int
) -> None:
    unmask(table, 0)
    table.write_table(MASK_AT, 4, 1)
    table.write_table(0, 8, address)
    unmask(table, 0)

    table.signal(0)

    assert (messages[0].message, messages[0].pulses, table.pending) == ((MESSAGES, 0x30), 0, 0)


@pytest.mark.parametrize(
    ("offset", "size"), [(ENTRY * VECTORS, 4), (ENTRY * VECTORS - 4, 8), (0xFFC, 4), (0, 1), (0, 2), (2, 4), (4, 8)]
)
def test_writes_that_hit_no_entry_change_nothing(table: Msix, offset: int, size: int) -> None:
    before = bytes(table.table)

    table.write_table(offset, size, (1 << 8 * size) - 1)

    assert table.table == before
    assert table.read_table(0xFFC, 4) == table.read_pending(0xFFC, 4) == 0


@pytest.mark.parametrize("vector", [VECTORS, 0xFFFF])
def test_vector_that_is_not_there(table: Msix, vector: int) -> None:
    table.signal(vector)

    assert table.pending == 0


def test_msix_state(table: Msix, messages: list[MessageRecorder]) -> None:
    unmask(table, 0)
    table.signal(1)
    fresh = Msix([again := MessageRecorder(), MessageRecorder(), MessageRecorder()])

    fresh.restore(table.state(), table.control)
    fresh.signal(0)

    assert (again.message, again.pulses) == ((MESSAGES, 0x30), 1)
    assert fresh.state() == table.state()
    with pytest.raises(ValueError, match="48 bytes of table, expected 16"):
        Msix([MessageRecorder()]).restore(table.state(), 0)


@pytest.mark.parametrize("vectors", [0, 2049])
def test_number_of_vectors_that_cannot_be(vectors: int) -> None:
    with pytest.raises(ValueError, match=f"{vectors} MSI-X vectors"):
        Msix([MessageRecorder()] * vectors)


def test_the_most_vectors_of_a_function() -> None:
    assert Msix([MessageRecorder()] * 2048).control == 2047  # Table Size, less one


# The bus.


def functions(memory: Bus) -> list[int]:
    """Device and function numbers of what a scan finds: function 0 of each device, the others where it says so."""
    found = []
    for device in range(32):
        for function in range(8):
            page = ECAM + (device * 8 + function) * ECAM_PAGE
            if memory.read(page, 2) == 0xFFFF:
                break
            found.append(device * 8 + function)
            if function == 0 and not memory.read(page + 0x0E, 1) & 0x80:
                break
    return found


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 40, MAX_FUNCTIONS])
def test_scan_finds_all_functions_in_order(memory: Bus, bus: PciBus, count: int) -> None:
    for _ in range(count):
        bus.add(ConfigSpace(threading.Lock()))

    assert functions(memory) == list(range(8, 8 + count))


def test_bus_can_be_full(memory: Bus, bus: PciBus) -> None:
    for _ in range(MAX_FUNCTIONS):
        bus.add(ConfigSpace(threading.Lock()))

    with pytest.raises(ConfigError, match="attach 248 or fewer"):
        bus.add(ConfigSpace(threading.Lock()))
    assert max(old.end for old in memory.ranges) <= ECAM + ECAM_BUS


def test_addresses_are_aligned_to_the_size(bus: PciBus) -> None:
    assert [bus.allocate(size) for size in (0x1000, 0x8000, 0x1000)] == [0xE1000000, 0xE1008000, 0xE1010000]


def test_window_can_be_full(bus: PciBus) -> None:
    bus.allocate(len(WINDOW))

    with pytest.raises(ConfigError, match="no room for 0x1000 bytes of PCI memory"):
        bus.allocate(0x1000)


def test_bar_can_move(memory: Bus, bus: PciBus) -> None:
    bus.map(BAR, 0x1000, Ram(7))
    first = memory.read(BAR, 1)
    bus.unmap(BAR)
    bus.map(BAR + 0x1000, 0x1000, Ram(7))

    assert (first, memory.read(BAR, 1), memory.read(BAR + 0x1000, 1)) == (7, 0xFF, 7)


@pytest.mark.parametrize(
    "base", [0, 0x1000, ECAM, WINDOW.start - 0x1000, WINDOW.stop, WINDOW.stop - 0x1000, 0xFEE00000, 2**64 - 0x2000]
)
def test_bar_outside_the_window_is_refused(memory: Bus, bus: PciBus, base: int) -> None:
    assert not bus.map(base, 0x2000, Ram(7))
    assert memory.ranges == []


def test_bar_over_another_is_refused(memory: Bus, bus: PciBus) -> None:
    bus.map(BAR, 0x2000, Ram(1))

    assert not bus.map(BAR + 0x1000, 0x2000, Ram(2))
    assert memory.read(BAR + 0x1000, 1) == 1
