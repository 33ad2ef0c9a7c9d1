"""Virtio over PCI (VIRTIO 1.2, 4.1): what a driver finds on the bus, and what it must not do with it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe import Turnstile

from kvmpy.pci import msix
from kvmpy.pci.config import COMMAND, Header
from kvmpy.testing import PCI_ECAM, PCI_WINDOW, FakeBoard, RingDriver
from kvmpy.virtio import pci
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.queue import VirtQueue
from kvmpy.virtio.spec import STATUS, F, Type

READY = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK | STATUS.DRIVER_OK
FUNCTION = PCI_ECAM + (8 << 12)  # configuration space of 00:01.0
NONE = pci.NO_VECTOR


class Probe(VirtioDevice):
    """Remembers what the transport told it; pushes what it is given."""

    type_id = Type.BLOCK
    queue_sizes = (256, 4)
    features = 1 << 9 | 1 << 40
    config = bytes(range(1, 13))

    def __init__(self) -> None:
        self.told: list[object] = []

    def notify(self, index: int, queue: VirtQueue) -> None:
        self.told.append(index)
        for chain in queue.available():
            queue.push(chain)

    def write_config(self, offset: int, data: bytes) -> None:
        self.told.append((offset, data))


@pytest.fixture
def board() -> FakeBoard:
    return FakeBoard(transport="pci")


@pytest.fixture
def device(board: FakeBoard) -> Probe:
    device = Probe()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Probe) -> RingDriver:
    return RingDriver(board)


def read(driver: RingDriver, offset: int, size: int) -> int:
    """Of the BAR."""
    return driver.board.memory_bus.read(driver.base + offset, size)


def write(driver: RingDriver, offset: int, size: int, value: int) -> None:
    driver.board.memory_bus.write(driver.base + offset, size, value)


def register(name: str) -> tuple[int, int]:
    reg = pci.VirtioPci.REGISTERS[name]
    return int(reg.offset or 0), reg.width


def get(driver: RingDriver, name: str) -> int:
    return read(driver, *register(name))


def put(driver: RingDriver, name: str, value: int) -> None:
    write(driver, *register(name), value)


def capabilities(board: FakeBoard) -> list[tuple[int, bytes]]:
    """(offset, bytes) of each capability, as found by walking the list."""
    bus = board.memory_bus
    data = bytes(bus.read(FUNCTION + offset, 1) for offset in range(256))
    found, at = [], data[0x34]
    while at:
        length = data[at + 2] if data[at] == pci.CAPABILITY else 12
        found.append((at, data[at : at + length]))
        at = data[at + 1]
    return found


# What a scan finds.


def test_identity(board: FakeBoard, device: Probe) -> None:
    bus = board.memory_bus

    assert bus.read(FUNCTION, 4) == (0x1040 + Type.BLOCK) << 16 | 0x1AF4
    assert bus.read(FUNCTION + 8, 4) == 0x018000_01  # mass storage, revision 1
    assert bus.read(FUNCTION + 0x2C, 4) == (0x1040 + Type.BLOCK) << 16 | 0x1AF4
    assert bus.read(FUNCTION + 0x3D, 1) == 0  # no interrupt pin
    assert bus.read(FUNCTION + 0x04, 2) == 0
    assert bus.read(FUNCTION + 0x100, 4) == 0  # no extended capabilities


def test_capabilities(board: FakeBoard, device: Probe) -> None:
    found = [entry for _, entry in capabilities(board)]
    virtio = [struct.unpack_from("<BBBxxxII", entry, 2) for entry in found if entry[0] == pci.CAPABILITY]

    assert virtio == [
        (16, 1, 0, 0x0000, 0x38),  # length, type, bar, offset, length
        (20, 2, 0, 0x3000, 8),
        (16, 3, 0, 0x1000, 1),
        (16, 4, 0, 0x2000, 0x1000),
        (20, 5, 0, 0, 0),
    ]
    assert found[1][16:] == struct.pack("<I", 4)  # notify_off_multiplier
    assert found[-1] == struct.pack("<BBHII", 0x11, 0, 2, 0x4000, 0x5000)  # MSI-X with three vectors
    assert all(at % 4 == 0 for at, _ in capabilities(board))


def test_configuration_that_comes_late_is_found(board: FakeBoard) -> None:
    """A device may learn it from the host after it has its transport."""
    device = Probe()
    device.config = b""
    device.attach(board)
    device.config = b"late"

    (found,) = [entry for _, entry in capabilities(board)[:-1] if entry[3] == pci.DEVICE_CFG]

    assert struct.unpack_from("<II", found, 8) == (pci.CONFIG, 0x1000)
    assert RingDriver(board).config(0, 4) == int.from_bytes(b"late", "little")


def test_devices_are_found_in_the_order_they_were_attached_in(board: FakeBoard) -> None:
    types = [Type.NET, Type.BLOCK, *[Type.ENTROPY] * 38]
    for kind in types:
        device = Probe()
        device.type_id = kind  # type: ignore[misc]
        device.attach(board)

    found = [board.memory_bus.read(FUNCTION + (n << 12) + 2, 2) - 0x1040 for n in range(41)]

    assert found == [*types, 0xFFFF - 0x1040]


# The BAR.


def test_bar_answers_when_memory_space_is_on(board: FakeBoard, device: Probe) -> None:
    base = board.memory_bus.read(FUNCTION + Header.BAR_LOW_AT, 4) & ~0xF
    before = board.memory_bus.read(base + 0x12, 2)
    board.memory_bus.write(FUNCTION + Header.COMMAND_AT, 2, COMMAND.MEMORY)
    on = board.memory_bus.read(base + 0x12, 2)
    board.memory_bus.write(FUNCTION + Header.COMMAND_AT, 2, 0)

    assert (before, on, board.memory_bus.read(base + 0x12, 2)) == (0xFFFF, 2, 0xFFFF)


def test_bar_and_doorbells_move_together(driver: RingDriver) -> None:
    driver.start()
    new = PCI_WINDOW.start + 0x100000
    driver.board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, new)

    assert driver.board.memory_bus.read(driver.base, 4) == 0xFFFFFFFF
    assert driver.board.memory_bus.read(new + 0x14, 1) == READY
    assert [bell.address for bell in driver.board.doorbells] == [new + 0x3000, new + 0x3004]


def test_kick_on_the_way_is_not_lost(driver: RingDriver, device: Probe) -> None:
    driver.start()
    device.told.clear()

    driver.board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, PCI_WINDOW.start + 0x100000)
    driver.board.steps.turn()

    assert device.told == [0, 1]


@pytest.mark.parametrize("base", [0, 0x10000, PCI_ECAM, 0xD0000000, 0xFEE00000, 0xFFFF8000])
def test_bar_over_something_else_answers_nowhere(driver: RingDriver, base: int) -> None:
    driver.board.memory_bus.add(0xD0000000, 0x1000, Stranger())

    driver.board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, base)
    driver.board.memory_bus.write(FUNCTION + Header.BAR_HIGH_AT, 4, 0)

    assert driver.transport.base is None
    assert [bell.address for bell in driver.board.doorbells] == [None, None]
    assert driver.board.memory_bus.read(0xD0000000, 1) == 0x77
    driver.board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, driver.base)
    assert read(driver, 0x12, 2) == 2


def test_bar_over_another_devices(board: FakeBoard, device: Probe) -> None:
    Probe().attach(board)
    first, second = RingDriver(board, 0), RingDriver(board, 1)
    second.set("Status", STATUS.ACKNOWLEDGE)

    board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, second.base)

    assert (first.transport.base, second.get("Status")) == (None, STATUS.ACKNOWLEDGE)


class Stranger(VirtioDevice):
    """Another device on the bus."""

    def read(self, offset: int, size: int) -> int:
        return 0x77

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 0x0F, 0x16, 0x38, 0x1000, 0x2000, 0x2FFF, 0x3FFC, 0x4FF8, 0x5000, 0x7FF8])
def test_any_access_is_harmless(driver: RingDriver, offset: int, size: int) -> None:
    for value in (0xFFFFFFFF_FFFFFFFF, 0x80000000_80000000, 1, 0):
        write(driver, offset, size, value & (1 << 8 * size) - 1)
        read(driver, offset, size)
        driver.board.steps.turn()

    driver.start()
    assert driver.get("Status") == READY


offsets = (
    st.integers(0, 0xFF)
    | st.sampled_from([0x1000, 0x2000, 0x3000, 0x3004, 0x4000, 0x400C, 0x5000])
    | st.integers(0, 0x7FFF)
)
values = st.sampled_from([0, 1, 0xFFFF, PCI_WINDOW.start, 2**32 - 1, 2**64 - 1]) | st.integers(0, 2**64 - 1)


@settings(max_examples=200, deadline=None)
@given(
    accesses=st.lists(st.tuples(st.booleans(), offsets, st.sampled_from([1, 2, 4, 8]), values), max_size=60),
)
def test_any_accesses_are_survived(accesses: list[tuple[bool, int, int, int]]) -> None:
    board = FakeBoard(transport="pci")
    Probe().attach(board)
    base = RingDriver(board).base
    for in_config, offset, size, value in accesses:
        address = FUNCTION + offset if in_config else base + offset
        board.memory_bus.write(address, size, value)
        board.memory_bus.read(address, size)
        board.steps.turn()

    board.memory_bus.write(FUNCTION + Header.BAR_LOW_AT, 4, base)
    board.memory_bus.write(FUNCTION + Header.BAR_HIGH_AT, 4, 0)
    driver = RingDriver(board)
    driver.start()

    assert driver.get("Status") == READY


# The access through the configuration space.


def through(driver: RingDriver, bar: int, offset: int, size: int) -> int:
    """Set up the window of the PCI_CFG capability; returns where its data is."""
    at = next(at for at, entry in capabilities(driver.board) if entry[3] == pci.PCI_CFG)
    bus = driver.board.memory_bus
    bus.write(FUNCTION + at + 4, 1, bar)
    bus.write(FUNCTION + at + 8, 4, offset)
    bus.write(FUNCTION + at + 12, 4, size)
    return FUNCTION + at + 16


def test_registers_through_the_configuration_space(driver: RingDriver) -> None:
    bus = driver.board.memory_bus
    bus.write(FUNCTION + Header.COMMAND_AT, 2, 0)  # it works without the BAR

    bus.write(through(driver, 0, 0x14, 1), 1, STATUS.ACKNOWLEDGE)

    assert bus.read(through(driver, 0, 0x14, 1), 1) == STATUS.ACKNOWLEDGE
    assert bus.read(through(driver, 0, 0x12, 2), 4) == 2
    assert bus.read(through(driver, 0, 0x2004, 4), 4) == 0x08070605


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [
        (1, 0x14, 1), (0xFF, 0x14, 1), (0, 0x8000, 4), (0, 0xFFFFFFFC, 4), (0, 0x7FFE, 4), (0, 0x14, 0), (0, 0x10, 3),
        (0, 0x10, 8), (0, 0x15, 2), (0, 0, 0xFFFFFFFF),
    ],
)  # fmt: skip
def test_windows_that_cannot_be(driver: RingDriver, bar: int, offset: int, size: int) -> None:
    data = through(driver, bar, offset, size)

    driver.board.memory_bus.write(data, 4, 0xFFFFFFFF)

    assert driver.board.memory_bus.read(data, 4) == 0
    assert driver.get("Status") == 0


# Vectors and interrupts.


def test_vectors_begin_as_none_and_read_back(driver: RingDriver) -> None:
    before = get(driver, "config_msix_vector"), get(driver, "queue_msix_vector")
    put(driver, "config_msix_vector", 2)
    put(driver, "queue_msix_vector", 1)

    assert before == (NONE, NONE)
    assert (get(driver, "config_msix_vector"), get(driver, "queue_msix_vector")) == (2, 1)


@pytest.mark.parametrize("vector", [3, 0x7FF, 0xFFFE, NONE])
def test_vector_that_is_not_there_reads_back_as_none(driver: RingDriver, vector: int) -> None:
    for name in ("config_msix_vector", "queue_msix_vector"):
        put(driver, name, 1)
        put(driver, name, vector)

    assert (get(driver, "config_msix_vector"), get(driver, "queue_msix_vector")) == (NONE, NONE)


def test_each_queue_has_its_vector(driver: RingDriver) -> None:
    driver.start()
    driver.submit(1, [b"x"])

    driver.kick(1)

    assert [message.pulses for message in driver.board.messages] == [0, 0, 1]
    assert driver.get("InterruptStatus", 1) == 0


def test_queue_without_a_vector_is_silent(driver: RingDriver) -> None:
    driver.start()
    put(driver, "queue_select", 1)
    put(driver, "queue_msix_vector", NONE)
    driver.submit(1, [b"x"])

    driver.kick(1)

    assert driver.pulses == 0
    assert len(driver.used(1)) == 1


def test_masked_queue_interrupts_when_it_is_unmasked(driver: RingDriver) -> None:
    driver.start()
    mask = pci.TABLE + msix.ENTRY.size + 12
    write(driver, mask, 4, 1)
    driver.submit(0, [b"x"])
    driver.kick(0)
    silent = driver.pulses, read(driver, pci.PBA, 8)

    write(driver, mask, 4, 0)

    assert silent == (0, 1 << 1)
    assert (driver.pulses, read(driver, pci.PBA, 8)) == (1, 0)


def test_vectors_and_isr_status_do_not_wait_for_the_device(driver: RingDriver, device: Probe) -> None:
    driver.start()
    device.lock = turnstile = Turnstile()
    driver.board.memory_bus.slots.clear()

    driver.get("InterruptStatus", 1)
    write(driver, pci.TABLE + msix.ENTRY.size + 12, 4, 1)
    read(driver, pci.TABLE, 4)
    read(driver, pci.PBA, 8)

    assert turnstile.taken == 0


def test_pending_bits_are_the_devices(driver: RingDriver) -> None:
    for size in (1, 2, 4, 8):
        write(driver, pci.PBA, size, (1 << 8 * size) - 1)

    assert read(driver, pci.PBA, 8) == 0


# Queues.


@pytest.mark.parametrize("number", [2, 0x7FFF, 0xFFFF])
def test_queue_that_is_not_there(driver: RingDriver, device: Probe, number: int) -> None:
    driver.start()
    device.told.clear()
    driver.set("QueueSel", number)
    before = driver.transport.core.state()
    for name in ("queue_size", "queue_enable", "queue_msix_vector", "queue_desc_low", "queue_desc_high"):
        put(driver, name, 1)
    write(driver, pci.NOTIFY + 4 * (number & 0x3FF), 2, number)
    driver.board.steps.turn()

    names = ("queue_size", "queue_enable", "queue_notify_off", "queue_desc_low", "queue_desc_high")
    assert [get(driver, name) for name in names] == [0] * 5
    assert get(driver, "queue_msix_vector") == NONE
    assert (driver.transport.core.state(), device.told) == (before, [])


def test_queues_are_fixed_while_the_driver_is_up(driver: RingDriver) -> None:
    driver.start()
    queue = driver.transport.core.queues[0]
    before = queue.state()

    driver.set("QueueSel", 0)
    for name in ("queue_size", "queue_desc_low", "queue_driver_high", "queue_device_low"):
        put(driver, name, 0x1234)
    for value in (0, 2, 0xFFFF):
        put(driver, "queue_enable", value)

    assert queue.state() == before


def test_addresses_read_back(driver: RingDriver) -> None:
    for n, name in enumerate(("desc", "driver", "device")):
        put(driver, f"queue_{name}_low", 0x1000 << n)
        put(driver, f"queue_{name}_high", 7 + n)

    seen = [
        get(driver, f"queue_{name}_high") << 32 | get(driver, f"queue_{name}_low")
        for name in ("desc", "driver", "device")
    ]
    assert seen == [7 << 32 | 0x1000, 8 << 32 | 0x2000, 9 << 32 | 0x4000]


def test_accepted_features_read_back(driver: RingDriver) -> None:
    driver.accept(F.VERSION_1 | 1 << 9)

    halves = []
    for half in (0, 1, 2, 0xFFFFFFFF):
        put(driver, "driver_feature_select", half)
        halves.append(get(driver, "driver_feature"))

    assert halves == [1 << 9, F.VERSION_1 >> 32, 0, 0]


@pytest.mark.parametrize(("size", "value"), [(1, 0xFF), (2, 1), (2, 0xFFFF), (4, 1), (8, 0)])
def test_notification_is_told_by_its_address(driver: RingDriver, device: Probe, size: int, value: int) -> None:
    driver.start()
    device.told.clear()

    write(driver, pci.NOTIFY + 4, size, value)
    driver.board.steps.turn()

    assert device.told == [1]


# The device's configuration.


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0xFF8, 0xFFF])
def test_configuration_ends(driver: RingDriver, device: Probe, offset: int, size: int) -> None:
    write(driver, pci.CONFIG + offset, size, 0)

    assert driver.config(offset, size) == 0
    assert device.told == []


def test_configuration(driver: RingDriver, device: Probe) -> None:
    write(driver, pci.CONFIG + 2, 2, 0xABCD)

    assert driver.config(2, 2) == 0x0403
    assert device.told == [(2, b"\xcd\xab")]


# State.


def test_state_brings_the_function_back(driver: RingDriver, device: Probe) -> None:
    driver.start()
    state = driver.transport.state()
    board = FakeBoard(transport="pci")
    board.mem.write(0, driver.board.mem.read(0, 1 << 20))
    Probe().attach(board)
    (fresh,) = board.transports

    fresh.restore(state)

    assert fresh.state() == state
    assert board.memory_bus.read(driver.base + 0x14, 1) == READY
    assert board.messages[1].message == (msix.MESSAGES, 0x31)
    assert [bell.address for bell in board.doorbells] == [driver.base + 0x3000, driver.base + 0x3004]


def test_state_of_another_function(driver: RingDriver) -> None:
    state = driver.transport.state()

    with pytest.raises(ValueError, match="not of this function"):
        driver.transport.restore(state | {"vectors": [0]})
