"""What transports owe a driver (VIRTIO 1.2, 2, 3 and 4): what devices get wrong most, points 1 to 9."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import SECTORS, Connect
from nics import FRAME, MAC, PLAIN, Rig, TapNet
from probe import ALL, READY, Echo, Probe

from kvmpy.mainboard import MainBoard
from kvmpy.pci.msix import MESSAGES
from kvmpy.testing import PCI_ECAM, FakeBoard, RingDriver
from kvmpy.virtio import pci
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.console import VirtioConsole
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.spec import INTERRUPT, STATUS, F, Type

BEGUN = STATUS.ACKNOWLEDGE | STATUS.DRIVER


@pytest.fixture
def board(transport: str) -> FakeBoard:
    return FakeBoard(4 << 20, transport)


@pytest.fixture
def device(board: FakeBoard) -> Echo:
    device = Echo()
    device.attach(board)
    return device


@pytest.fixture
def driver(board: FakeBoard, device: Echo) -> RingDriver:
    return RingDriver(board)


@pytest.fixture
def probe(board: FakeBoard) -> Probe:
    """A device with a configuration space and features of its own, alone on its board."""
    probe = Probe()
    probe.attach(board)
    return probe


@pytest.fixture
def probed(board: FakeBoard, probe: Probe) -> RingDriver:
    return RingDriver(board)


@pytest.fixture
def any_driver(each_device: VirtioDevice) -> RingDriver:
    """Of one device of each kind."""
    return RingDriver(each_device.board)


def happen(device: VirtioDevice) -> None:
    """Everything of the host's that a device may want to tell its driver."""
    board = device.board
    with device.lock:
        if isinstance(device, Blk):
            os.truncate(device.path, device.path.stat().st_size + 512)
            device.resize()
        if isinstance(device, TapNet):
            device.tap.incoming.append(PLAIN + FRAME)
        if isinstance(device, Balloon):
            device.target(1 << 20)
        if isinstance(device, VirtioConsole):
            device.receive(b"input")
            device.resize(80, 25)
    for fd in list(board.steps.watched):
        board.steps.ready(fd)
    board.steps.advance(5)
    board.steps.turn()


def give(driver: RingDriver) -> None:
    """A chain that can be read and one that can be written, in each queue."""
    for index in range(len(driver.queues)):
        driver.submit(index, [bytes(16)], [513])
        driver.submit(index, writable=[2000])


def kick_all(driver: RingDriver) -> None:
    for index in range(len(driver.queues)):
        driver.set("QueueNotify", index)
    driver.board.steps.turn()
    driver.board.steps.turn()


def ram(board: FakeBoard) -> bytes:
    (region,) = board.mem.regions
    return bytes(region.buf)


# 1: nothing before DRIVER_OK, nothing after a reset.


@pytest.mark.parametrize("status", [0, STATUS.ACKNOWLEDGE, BEGUN, BEGUN | STATUS.FEATURES_OK])
def test_conformance_01_nothing_is_consumed_before_driver_ok(driver: RingDriver, device: Echo, status: int) -> None:
    """2.1.2, 3.1.1: buffers that are there already wait; the driver hears nothing."""
    driver.prepare(ALL)
    ring = driver.queues[0]
    driver.set("Status", 0)
    driver.set("Status", status & BEGUN)
    driver.accept(ALL if status & STATUS.FEATURES_OK else 0)
    driver.set("QueueSel", 0)
    for name, address in (("Desc", ring.desc), ("Driver", ring.avail), ("Device", ring.used)):
        driver.set(f"Queue{name}Low", address)
    driver.set("QueueReady", 1)
    driver.submit(0, [b"x"], [1])
    before = ram(driver.board)

    driver.kick(0)

    assert ram(driver.board) == before
    assert (device.served, driver.interrupts(), driver.pulses) == (0, 0, 0)


def test_conformance_01_what_waits_is_served_from_driver_ok_on(driver: RingDriver) -> None:
    """3.1.1: a kick that came too early need not come again."""
    driver.prepare(ALL)
    head = driver.submit(0, [b"x"], [1])
    driver.kick(0)
    early = driver.used(0)

    driver.go()

    assert (early, driver.used(0)) == ([], [(head, 1)])


def test_conformance_01_no_device_touches_memory_before_driver_ok(
    any_driver: RingDriver, each_device: VirtioDevice
) -> None:
    """2.1.2, for each kind of device, whatever happens on the host."""
    any_driver.prepare(F.VERSION_1 | each_device.features)
    give(any_driver)
    before = ram(any_driver.board)

    kick_all(any_driver)
    happen(each_device)

    assert ram(any_driver.board) == before
    assert any_driver.pulses == 0


def test_conformance_01_no_device_touches_memory_after_a_reset(
    any_driver: RingDriver, each_device: VirtioDevice
) -> None:
    """2.4.1: neither for what was given before nor for kicks after it, whatever happens on the host."""
    any_driver.start(F.VERSION_1 | each_device.features)
    happen(each_device)
    give(any_driver)
    for index in range(len(any_driver.queues)):
        any_driver.set("QueueNotify", index)
    any_driver.set("Status", 0)
    before, pulses = ram(any_driver.board), any_driver.pulses

    kick_all(any_driver)
    happen(each_device)

    assert ram(any_driver.board) == before
    assert any_driver.pulses == pulses
    assert any_driver.get("Status") == 0


# 2: what a reset leaves.


def test_conformance_02_reset_values(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """2.1.2, 2.4.1, 4.1.4.3.1, 4.2.2.1: status, interrupts, queues and selectors are as after power-on."""
    fresh = registers(any_driver)
    any_driver.start(F.VERSION_1 | each_device.features)
    each_device.config_changed()
    any_driver.set("DriverFeaturesSel", 1)
    any_driver.set("DeviceFeaturesSel", 1)
    any_driver.set("QueueSel", 1)
    used = registers(any_driver)

    any_driver.set("Status", 0)

    assert registers(any_driver) == fresh
    assert used["Status"] == READY
    for index in range(len(each_device.queue_sizes)):
        any_driver.set("QueueSel", index)
        assert any_driver.get("QueueReady") == 0
        assert any_driver.get("QueueNumMax") == each_device.queue_sizes[index]


def registers(driver: RingDriver) -> dict[str, int]:
    """What can be read without a change, of all that a reset brings back."""
    names = ("Status", "InterruptStatus", "DeviceFeatures", "QueueNumMax", "QueueReady")
    return {name: driver.get(name) for name in names}


def test_conformance_02_vectors_after_a_reset() -> None:
    """4.1.5.1.2.1: no interrupt has a vector any more; the table of messages is PCI's and stays."""
    board = FakeBoard(transport="pci")
    Echo().attach(board)
    driver = RingDriver(board)
    driver.start()

    driver.set("Status", 0)

    values = []
    for name in ("config_msix_vector", "queue_msix_vector"):
        reg = pci.VirtioPci.REGISTERS[name]
        values.append(board.memory_bus.read(driver.base + int(reg.offset or 0), reg.width))
    assert values == [pci.NO_VECTOR] * 2
    assert driver.transport.msix.enabled
    assert board.messages[1].message == (MESSAGES, 0x31)


@pytest.mark.parametrize("value", [0x100, 0xFFFFFF00])
def test_conformance_02_only_the_low_byte_of_status_counts(value: int) -> None:
    """2.1: status is a byte; a register of four does no half of a reset."""
    board = FakeBoard()
    device = Echo()
    device.attach(board)
    driver = RingDriver(board)
    driver.start()
    device.config_changed()

    driver.set("Status", value)

    assert (driver.get("Status"), driver.get("InterruptStatus")) == (0, 0)


def test_conformance_02_device_works_again_after_a_reset(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """2.4.2, 3.1.1: with the same features, and no memory of what was before."""
    for _ in range(3):
        any_driver.start(F.VERSION_1 | each_device.features)
        give(any_driver)
        any_driver.set("QueueNotify", 0)
        any_driver.set("Status", 0)
    any_driver.start(F.VERSION_1 | each_device.features)

    assert any_driver.get("Status") == READY
    assert [any_driver.used(index) for index in range(len(any_driver.queues))] == [[]] * len(any_driver.queues)


# 3: features.


def test_conformance_03_version_1_is_offered_and_demanded(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """6.2: offered by each device; 6.2 allows it to refuse a driver that does not take it."""
    any_driver.set("DeviceFeaturesSel", 1)
    offered = any_driver.get("DeviceFeatures") << 32
    any_driver.set("Status", BEGUN)
    any_driver.accept(each_device.features)

    assert offered & F.VERSION_1
    assert any_driver.get("Status") == BEGUN


@pytest.mark.parametrize("features", [0, 1 << 9, F.VERSION_1 | 1 << 10, F.VERSION_1 | 1 << 34, 2**64 - 1], ids=hex)
def test_conformance_03_features_that_are_not_agreed_on(probed: RingDriver, probe: Probe, features: int) -> None:
    """2.2.2, 3.1.1: without VERSION_1, or with a bit that was not offered, FEATURES_OK reads back as 0, and DRIVER_OK
    is not taken; a better choice is."""
    probed.set("Status", BEGUN)

    probed.accept(features)
    refused = probed.get("Status")
    probed.go()

    assert (refused, probed.get("Status"), probe.told) == (BEGUN, BEGUN, [])
    probed.accept(F.VERSION_1)
    assert probed.get("Status") == BEGUN | STATUS.FEATURES_OK


def test_conformance_03_same_features_after_a_reset(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """2.2.2: what was agreed on once is again, all of it and none of it; 3.1.1."""
    offered = each_device.features
    for features in (offered, offered, 0, 0, offered):
        any_driver.set("Status", 0)
        any_driver.set("Status", BEGUN)
        any_driver.accept(F.VERSION_1 | features)
        assert any_driver.get("Status") == BEGUN | STATUS.FEATURES_OK


# 4: errors.


def test_conformance_04_errors_before_driver_ok_are_told_after_it(driver: RingDriver) -> None:
    """2.1.2: DEVICE_NEEDS_RESET and its interrupt, but not before DRIVER_OK."""
    driver.prepare(ALL)
    driver.set("QueueSel", 1)
    driver.set("QueueReady", 0)
    driver.set("QueueDescLow", 8)
    driver.set("QueueReady", 1)
    driver.kick(1)
    before = driver.get("Status"), driver.pulses

    driver.go()

    assert before == (BEGUN | STATUS.FEATURES_OK, 0)
    assert driver.get("Status") == READY | STATUS.DEVICE_NEEDS_RESET
    assert driver.interrupts() == INTERRUPT.CONFIGURATION


def test_conformance_04_error_while_the_driver_is_up(driver: RingDriver) -> None:
    """2.1.2: the same, once; nothing of the queues is touched any more, until a reset."""
    driver.start(ALL)
    driver.publish(0, 99)
    driver.kick(0)
    told = driver.get("Status"), driver.interrupts(), driver.interrupts()
    head = driver.submit(1, [b"x"], [1])
    before = ram(driver.board)

    driver.kick(1)

    assert told == (READY | STATUS.DEVICE_NEEDS_RESET, INTERRUPT.CONFIGURATION, 0)
    assert (ram(driver.board), head) == (before, 0)
    driver.start(ALL)
    assert driver.request(0, [b"hello"], [5]) == b"hello"


@pytest.mark.parametrize("value", [STATUS.DEVICE_NEEDS_RESET, 0x30, 0xFF])
def test_conformance_04_driver_cannot_claim_an_error(driver: RingDriver, value: int) -> None:
    """2.1: DEVICE_NEEDS_RESET is the device's."""
    driver.set("Status", value)

    assert not driver.get("Status") & (STATUS.DEVICE_NEEDS_RESET | 0x30)


@pytest.mark.parametrize("value", [STATUS.ACKNOWLEDGE, READY, 0xFF & ~STATUS.DEVICE_NEEDS_RESET])
def test_conformance_04_driver_cannot_take_an_error_back(driver: RingDriver, value: int) -> None:
    """2.1.1: only a reset clears bits."""
    driver.start(ALL)
    driver.publish(0, 99)
    driver.kick(0)

    driver.set("Status", value)

    assert driver.get("Status") & (READY | STATUS.DEVICE_NEEDS_RESET) == READY | STATUS.DEVICE_NEEDS_RESET


# 5: the configuration space before features are agreed on.


def test_conformance_05_configuration_before_features(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """2.5.2, 3.1.1: all fields can be read from the beginning, those of features that may be refused as well."""
    early = [any_driver.config(offset, 1) for offset in range(0x100)]

    any_driver.start()  # and the driver takes no feature

    assert [any_driver.config(offset, 1) for offset in range(0x100)] == early
    assert bytes(early) == bytes(each_device.config).ljust(0x100, b"\0")
    assert any(early) or each_device.type_id in (Type.ENTROPY, Type.BALLOON)


def test_conformance_05_fields_of_features(connect: Connect, plugged: Callable[..., Rig]) -> None:
    """2.5.2: num_queues (MQ) and mtu (MTU)."""
    disk = connect(F.VERSION_1, queues=3)
    rig = plugged(mtu=1400)

    assert (disk.config.num_queues, disk.config.max_discard_seg) == (3, 32)
    assert (bytes(rig.driver.config(n, 1) for n in range(6)).hex(":"), rig.driver.config(10, 2)) == (MAC, 1400)


# 6: identity, widths of accesses, generation.


def test_conformance_06_identity_over_mmio() -> None:
    """4.2.2: MagicValue, Version, DeviceID."""
    board = FakeBoard()
    Probe().attach(board)
    driver = RingDriver(board)

    assert driver.get("MagicValue") == 0x74726976
    assert (driver.get("Version"), driver.get("DeviceID"), driver.get("Status")) == (2, Type.BLOCK, 0)


def test_conformance_06_identity_over_pci() -> None:
    """4.1.2: vendor 0x1AF4, device 0x1040 and the type, revision 1 or higher."""
    board = FakeBoard(transport="pci")
    Probe().attach(board)
    function = PCI_ECAM + (8 << 12)

    assert board.memory_bus.read(function, 4) == (0x1040 + Type.BLOCK) << 16 | 0x1AF4
    assert board.memory_bus.read(function + 8, 1) >= 1
    assert board.memory_bus.read(function + 0x2E, 2) >= 0x40


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_conformance_06_mmio_registers_are_words(size: int, offset: int) -> None:
    """4.2.2.2: only aligned accesses of 32 bits."""
    board = FakeBoard()
    Probe().attach(board)
    driver = RingDriver(board)

    board.memory_bus.write(driver.base + 0x70 + offset, size, STATUS.ACKNOWLEDGE)

    assert driver.get("Status") == 0
    assert board.memory_bus.read(driver.base + offset, size) == 0


def test_conformance_06_pci_fields_are_accessed_whole() -> None:
    """4.1.3.1: each field with its own width."""
    board = FakeBoard(transport="pci")
    Probe().attach(board)
    base = RingDriver(board).base
    bus = board.memory_bus

    bus.write(base + 0x14, 2, STATUS.ACKNOWLEDGE)
    bus.write(base + 0x16, 4, 0x0001_0001)
    bus.write(base + 0x17, 1, 1)

    assert [bus.read(base + 0x14, size) for size in (1, 2, 4)] == [0, 0, 0]
    assert (bus.read(base + 0x16, 2), bus.read(base + 0x12, 2), bus.read(base + 0x12, 1)) == (0, 2, 0)


def test_conformance_06_configuration_of_any_width(probed: RingDriver) -> None:
    """4.2.2.2, 4.1.3.1: 8, 16 and 32 bits, and 64 bits as two halves; zeros behind the end."""
    assert [probed.config(offset, size) for offset, size in ((0, 1), (1, 1), (2, 2), (4, 4))] == [
        1, 2, 0x0403, 0x08070605,
    ]  # fmt: skip
    assert probed.config(4, 4) << 32 | probed.config(0, 4) == 0x0807060504030201
    assert [probed.config(offset, 4) for offset in (10, 12, 0xEFC)] == [0x0C0B, 0, 0]


def test_conformance_06_generation_tells_of_torn_reads(connect: Connect, path: Path) -> None:
    """2.5.1, 4.2.2.1: a change between the halves of a field shows in the generation, before features are agreed on
    and after."""
    disk = connect()
    for sectors in (1 << 32, (1 << 33) + 5):
        before = disk.driver.get("ConfigGeneration")
        low = disk.driver.config(0, 4)
        os.truncate(path, sectors * 512)
        with disk.device.lock:
            disk.device.resize()
        high = disk.driver.config(4, 4)

        assert high << 32 | low not in (SECTORS, sectors)
        assert disk.driver.get("ConfigGeneration") != before
        disk.driver.set("Status", 0)


def test_conformance_06_generation_is_the_same_while_nothing_changes(
    any_driver: RingDriver, each_device: VirtioDevice
) -> None:
    """4.2.2.1: reading, resets and requests are no changes."""
    before = any_driver.get("ConfigGeneration")

    any_driver.start(F.VERSION_1 | each_device.features)
    give(any_driver)
    kick_all(any_driver)
    for offset in range(0, 64, 4):
        any_driver.config(offset, 4)

    assert any_driver.get("ConfigGeneration") == before


def test_conformance_06_change_is_told_while_the_driver_is_up(probed: RingDriver, probe: Probe) -> None:
    """2.3: a configuration change interrupts; without a driver only the generation tells."""
    probe.config_changed()
    silent = probed.pulses, probed.get("InterruptStatus")
    probed.start()

    probe.config_changed()

    assert silent == (0, 0)
    assert (probed.interrupts(), probed.interrupts(), probed.pulses) == (INTERRUPT.CONFIGURATION, 0, 1)


# 7: interrupts.


def test_conformance_07_bits_stay_until_they_are_acknowledged() -> None:
    """4.2.2: bit 0 for used buffers, bit 1 for the configuration; InterruptACK clears what is written. Our interrupts
    are edges: each event has one of its own, so that none is lost while another waits."""
    board = FakeBoard()
    device = Echo()
    device.attach(board)
    driver = RingDriver(board)
    driver.start()
    driver.submit(0, [b"x"])
    driver.kick(0)
    device.config_changed()
    both = driver.get("InterruptStatus"), driver.get("InterruptStatus")
    driver.set("InterruptACK", INTERRUPT.USED_BUFFER)
    one = driver.get("InterruptStatus")
    driver.submit(0, [b"x"])
    driver.kick(0)
    again = driver.get("InterruptStatus")
    driver.set("InterruptACK", 0xFFFFFFFC)
    ignored = driver.get("InterruptStatus")
    driver.set("InterruptACK", 3)

    assert both == (3, 3)
    assert (one, again, ignored, driver.get("InterruptStatus")) == (INTERRUPT.CONFIGURATION, 3, 3, 0)
    assert driver.pulses == 3


def test_conformance_07_interrupt_that_comes_between_read_and_acknowledgement() -> None:
    """4.2.2: one that is acknowledged with an earlier one has had its own edge."""
    board = FakeBoard()
    Echo().attach(board)
    driver = RingDriver(board)
    driver.start()
    driver.request(0, [b"x"])
    status = driver.get("InterruptStatus")
    driver.request(0, [b"y"])
    driver.set("InterruptACK", status)

    assert (driver.get("InterruptStatus"), driver.pulses) == (0, 2)


def test_conformance_07_isr_status_is_cleared_by_reading() -> None:
    """4.1.4.5: over PCI, for drivers without MSI-X."""
    board = FakeBoard(transport="pci")
    device = Echo()
    device.attach(board)
    driver = RingDriver(board)
    function = PCI_ECAM + (8 << 12)
    at = board.memory_bus.read(function + 0x34, 1)
    while board.memory_bus.read(function + at, 1) != 0x11:
        at = board.memory_bus.read(function + at + 1, 1)
    board.memory_bus.write(function + at + 2, 2, 0)
    driver.start()
    driver.request(0, [b"x"])
    device.config_changed()

    seen = driver.get("InterruptStatus"), driver.get("InterruptStatus")

    assert seen == (INTERRUPT.USED_BUFFER | INTERRUPT.CONFIGURATION, 0)
    assert driver.pulses == 0


def test_conformance_07_each_cause_has_its_message() -> None:
    """4.1.5.1.2, 4.1.4.5.1: with MSI-X, vector 0 for the configuration here and one for each queue."""
    board = FakeBoard(transport="pci")
    device = Echo()
    device.attach(board)
    driver = RingDriver(board)
    driver.start()

    driver.request(1, [b"x"])
    driver.request(1, [b"x"])
    device.config_changed()

    assert [message.pulses for message in board.messages] == [1, 0, 2]


# 8: queues.


def test_conformance_08_queue_stops_at_runtime() -> None:
    """4.2.2.2: QueueReady = 0 stops it, reads back 0, and its rings are left alone; others go on."""
    board = FakeBoard()
    device = Echo()
    device.attach(board)
    driver = RingDriver(board)
    driver.start(ALL)
    driver.set("QueueSel", 0)
    driver.submit(0, [b"x"], [1])

    driver.set("QueueReady", 0)
    stopped = driver.get("QueueReady")
    before = ram(board)
    driver.kick(0)
    driver.set("QueueReady", 1)  # too late
    driver.kick(0)

    assert (stopped, driver.get("QueueReady"), device.served) == (0, 0, 0)
    assert ram(board) == before
    assert driver.request(1, [b"hello"], [5]) == b"hello"


def test_conformance_08_queue_that_is_not_there_has_size_0(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """4.2.2 QueueSizeMax, 4.1.4.3 queue_size."""
    sizes = []
    for index in range(len(each_device.queue_sizes) + 2):
        any_driver.set("QueueSel", index)
        sizes.append(any_driver.get("QueueNumMax"))

    assert sizes == [*each_device.queue_sizes, 0, 0]


def test_conformance_08_queue_that_the_driver_leaves_out(driver: RingDriver, device: Echo) -> None:
    """3.1.1: a driver need not use all queues."""
    driver.prepare(ALL)
    driver.set("QueueSel", 0)
    driver.set("QueueReady", 0)
    driver.go()
    driver.kick(0)

    assert not driver.needs_reset
    assert driver.request(1, [b"hello"], [5]) == b"hello"


@pytest.mark.parametrize("region", [0, 1, 255])
def test_conformance_08_no_shared_memory(region: int) -> None:
    """4.2.2 SHMLen: all ones where there is no region."""
    board = FakeBoard()
    Echo().attach(board)
    driver = RingDriver(board)

    driver.set("SHMSel", region)

    assert [driver.get(f"SHM{name}") for name in ("LenLow", "LenHigh", "BaseLow", "BaseHigh")] == [0xFFFFFFFF] * 4


def test_conformance_08_no_queue_reset(any_driver: RingDriver, each_device: VirtioDevice) -> None:
    """2.6.1, 4.2.2: RING_RESET is not offered, and where its register would be is none."""
    any_driver.set("DeviceFeaturesSel", 1)
    offered = any_driver.get("DeviceFeatures") << 32
    any_driver.start(F.VERSION_1 | each_device.features)
    bus = any_driver.board.memory_bus
    at = any_driver.base + (0xC0 if any_driver.board.pci is None else 0x38 + 2)

    bus.write(at, 4 if any_driver.board.pci is None else 2, 1)

    assert not offered & 1 << 40
    assert (bus.read(at, 4), bus.read(at, 2)) == (0, 0)
    any_driver.set("QueueSel", 0)
    assert any_driver.get("QueueReady") == 1


# 9: selectors of features.


def test_conformance_09_features_come_in_two_halves(probed: RingDriver) -> None:
    """4.2.2, 4.1.4.3: other selectors read 0."""
    halves = []
    for half in (0, 1, 2, 0x80000000, 0xFFFFFFFF):
        probed.set("DeviceFeaturesSel", half)
        halves.append(probed.get("DeviceFeatures"))

    offered = Probe.features | F.VERSION_1 | F.EVENT_IDX | F.INDIRECT_DESC
    assert halves == [offered & 0xFFFFFFFF, offered >> 32, 0, 0, 0]


def test_conformance_09_other_halves_are_not_accepted(probed: RingDriver, probe: Probe) -> None:
    """4.2.2, 4.1.4.3: what is written with another selector means nothing."""
    probed.set("Status", BEGUN)
    for half in (2, 3, 0x80000000, 0xFFFFFFFF):
        probed.set("DriverFeaturesSel", half)
        probed.set("DriverFeatures", 0xFFFFFFFF)
    probed.accept(F.VERSION_1)
    probed.go()

    assert probed.get("Status") == READY
    assert probe.told[0] == F.VERSION_1


def test_conformance_09_devices_are_found_by_bus_and_place() -> None:
    """4.1.1: a function for each device, in the order in which they were attached."""
    board = FakeBoard(transport="pci")
    for _ in range(3):
        Probe().attach(board)

    found = [board.memory_bus.read(PCI_ECAM + ((8 + n) << 12), 4) for n in range(4)]

    assert found == [(0x1040 + Type.BLOCK) << 16 | 0x1AF4] * 3 + [0xFFFFFFFF]


def test_conformance_09_word_on_the_command_line() -> None:
    """4.2.3.2: for kernels that do not find virtio-mmio by ACPI (LNRO0005, see test_acpi.py)."""
    made = FakeBoard()
    for _ in range(2):
        Echo().attach(made)
    board = MainBoard.__new__(MainBoard)
    board.virtio_mmio = [(transport, 5 + n) for n, transport in enumerate(made.transports)]

    assert board.virtio_words() == ["virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio.device=4K@0xd0001000:6"]
