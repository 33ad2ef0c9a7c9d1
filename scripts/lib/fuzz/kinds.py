"""Every kind of device that is fuzzed, by name."""

from __future__ import annotations

from .balloons import Inflatable
from .disks import Disk, Qcow2Disk, ReadOnly, Snapshot
from .folders import Folder, ReadOnlyFolder
from .kind import Kind
from .nets import StreamNet, TapNet
from .streams import Console, Entropy, Sockets

ALL: tuple[type[Kind], ...] = (
    *(Disk, ReadOnly, Qcow2Disk, Snapshot, StreamNet, TapNet),
    *(Entropy, Inflatable, Console, Sockets, Folder, ReadOnlyFolder),
)
KINDS = {kind.NAME: kind for kind in ALL}
TRANSPORTS = ("mmio", "pci")
