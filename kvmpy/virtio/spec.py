"""Numbers of the virtio specification that more than one device or transport uses (VIRTIO 1.2)."""

from __future__ import annotations

from enum import IntEnum

from ..core.regs import Bits, bit

VENDOR = 0x4D564B4B  # "KKVM": 4.2.2 leaves the value to us; Linux shows it and nothing more
MAX_QUEUE_SIZE = 1 << 15  # 2.7: split queues have at most this many entries


class Type(IntEnum):
    """Device types (5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    VSOCK = 19
    FS = 26


class STATUS(Bits):
    """Device status (2.1)."""

    ACKNOWLEDGE = bit(0)
    DRIVER = bit(1)
    DRIVER_OK = bit(2)
    FEATURES_OK = bit(3)
    DEVICE_NEEDS_RESET = bit(6)
    FAILED = bit(7)

    WRITABLE = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED


class INTERRUPT(Bits):
    """Why a device interrupts (4.2.2 InterruptStatus, 4.1.4.5 ISR status)."""

    USED_BUFFER = bit(0)
    CONFIGURATION = bit(1)


class F(Bits):
    """Feature bits that belong to no device type (6)."""

    INDIRECT_DESC = bit(28)
    EVENT_IDX = bit(29)
    VERSION_1 = bit(32)


TRANSPORT_FEATURES = F.INDIRECT_DESC | F.EVENT_IDX | F.VERSION_1
