"""A program that works all devices of a locked-in machine, on the threads that do it in earnest; prints what it saw.

    python working.py LEVEL TRANSPORT FOLDER GUEST    GUEST is the binary of guests/virtio.S or guests/virtio_pci.S

The guest's driver is for the first disk; the other devices are worked from the host's side.
"""

from __future__ import annotations

import ctypes  # noqa: F401 - what disks load, and `kvmpy boot` preloads
import json
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvmpy
from kvmpy.core.board import Board, Reason, Stop
from kvmpy.host import syscalls
from kvmpy.host.disk import SECTOR
from kvmpy.jail.lock import Jail
from kvmpy.remains import gather
from kvmpy.virtio import twin  # noqa: F401
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.net import Net
from kvmpy.virtio.port import PortSocket
from kvmpy.virtio.rng import Rng
from kvmpy.x86 import layout, longmode

SECONDS = 20.0
LEVEL, TRANSPORT = sys.argv[1:3]
FOLDER, GUEST = map(Path, sys.argv[3:5])
FOUND: dict[str, Any] = {}


class Reports(kvmpy.RegisterDevice, span=4):
    """The REPORT port of guests/tiny.inc."""

    VALUE = kvmpy.Reg(0)

    def __init__(self) -> None:
        self.values: list[int] = []

    def attach(self, board: Board) -> None:
        board.pio(0x10, 4, self)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.values.append(value)


class End(Reports):
    """The END port."""

    def attach(self, board: Board) -> None:
        self.board = board
        board.pio(0xF4, 1, self)

    def write(self, offset: int, size: int, value: int) -> None:
        self.board.stop(Stop(Reason.EXIT, status=value))


def on(loop: Any, work: Callable[[], object], owner: Any = None) -> object:
    """The result of `work` on the thread of `loop`, or its exception."""
    results: list[object] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
        done.set()

    loop.call_soon(run, owner=owner)
    done.wait(SECONDS)
    return results[0] if results else "nothing"


def disk_work(disk: Blk) -> Callable[[], object]:
    def work() -> object:
        image: Any = disk._image
        data = memoryview(bytearray(b"k" * SECTOR * 8))
        image.writev(SECTOR * 8, [data])
        image.flush()
        image.write_zeroes(SECTOR * 8, SECTOR * 2, True)
        image.write_zeroes(SECTOR * 10, SECTOR, False)
        image.discard(SECTOR * 1024, SECTOR * 512)
        back = bytearray(SECTOR * 8)
        image.readv(SECTOR * 8, [memoryview(back)])
        return back.count(b"k") // SECTOR

    return work


def lock_down() -> Callable[[str], None]:
    """As `kvmpy boot` does; and the guest to where its entry is."""
    vcpu = MACHINE.vcpus[0].vcpu
    MACHINE.memory.write(layout.BOOT_SECTOR, GUEST.read_bytes())
    sregs, regs = vcpu.sregs(), vcpu.regs()
    longmode.long_mode(sregs, MACHINE.memory)
    vcpu.set_sregs(sregs)
    regs.rip = regs.rsp = layout.BOOT_SECTOR
    vcpu.set_regs(regs)
    syscalls.load()
    jail = Jail(LEVEL)
    if LEVEL == "off":
        return lambda role: None
    jail.lock()
    return jail.enter


(FOLDER / "sector").write_bytes(b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa")
LISTENER = socket.socket(socket.AF_UNIX)
LISTENER.bind(str(FOLDER / "net"))
LISTENER.listen(1)
DISKS = {
    "raw": Blk(path=FOLDER / "raw"),
    "qcow2": Blk(path=FOLDER / "qcow2", format="qcow2"),
    "snapshot": Blk(path=FOLDER / "other", snapshot=True),
}
NET, BALLOON = Net(backend="socket", path=FOLDER / "net", pcap=FOLDER / "pcap"), Balloon()
MACHINE = kvmpy.Machine(kernel=FOLDER / "sector", mem="4M", transport=TRANSPORT)
REPORTS = Reports()
for device in (*DISKS.values(), NET, BALLOON, Rng(), PortSocket(port="agent", path=FOLDER / "agent"), REPORTS, End()):
    MACHINE.add(device)
MACHINE.start(lock_down)
STOP = MACHINE.wait(SECONDS)
FOUND["stop"] = STOP.reason.name
FOUND["reports"] = REPORTS.values
FOUND["report"] = bool(gather(MACHINE, STOP)["vcpus"][0]["state"])
FOUND["states"] = len([MACHINE.serial.state(), MACHINE.acpi_ged.state()])
for name, disk in DISKS.items():
    FOUND[name] = on(disk.loop, disk_work(disk), disk)
FOUND["discard"] = on(MACHINE.loop, lambda: MACHINE.memory.discard(0x200000, 0x10000))
FOUND["random"] = on(MACHINE.loop, lambda: len(__import__("os").urandom(64)))
MACHINE.close()
print(json.dumps(FOUND))
