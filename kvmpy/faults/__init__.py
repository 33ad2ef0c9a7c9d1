"""Faults for tests of what runs in guests, and of devices: chosen, seeded, and logged.

    disk = Blk(path="disk.img")
    injected = faults.inject(disk, faults.Fail("write", nth=3), faults.Delay(seconds=0.01, probability=0.1), seed=7)
    machine.add(disk)
    ...
    print(injected)  # what happened, in its order

Disks (virtio-blk): Fail, Short, Torn, Ignore, Delay, PowerCut; and WriteLog, for images as power cuts leave them.
Network cards (virtio-net): Drop, Duplicate, Reorder, Corrupt, Late, Hangup. Every device: LostInterrupt.

Each has `on` (an operation of the device), `nth`, `probability`, and more where it says so; disks' have `sectors`.
A guest that makes the same requests in the same order meets the same faults. A disk or card with faults is served by
Python alone: the twin in C (virtio/twin.py) does not know them, and is not used. Other devices are not slowed down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..core.board import Attachable, Board, Reason, Stop
from ..core.errors import ConfigError
from ..host.disk import Image
from ..host.frames import NetBackend
from ..virtio.blk import Blk
from ..virtio.device import VirtioDevice
from ..virtio.net import RX, Net
from ..virtio.queue import VirtQueue
from . import disk, interrupts, wire
from .disk import Delay, DiskFault, Fail, FaultyImage, Ignore, Short, Torn
from .interrupts import LostInterrupt
from .plan import Fault, Injected, Plan
from .power import PowerCut, VolatileImage, WriteLog
from .wire import Corrupt, Drop, Duplicate, FaultyWire, Hangup, Late, Reorder, WireFault

__all__ = [
    "Corrupt",
    "Delay",
    "Drop",
    "Duplicate",
    "Fail",
    "Fault",
    "Hangup",
    "Ignore",
    "Injected",
    "Late",
    "LostInterrupt",
    "PowerCut",
    "Reorder",
    "Short",
    "Torn",
    "WriteLog",
    "inject",
]

KINDS: tuple[tuple[type[Fault], type, Sequence[str]], ...] = (  # faults, whose they are, of what operations
    (PowerCut, Blk, (disk.WRITE, disk.FLUSH)),
    (DiskFault, Blk, disk.OPERATIONS),
    (WireFault, Net, wire.OPERATIONS),
    (LostInterrupt, object, (interrupts.INTERRUPT,)),
)


def inject(device: Attachable, *faults: Fault | WriteLog, seed: int = 0) -> list[Injected]:
    """Have `faults` happen to `device`, which is not yet attached; returns the list of those that have happened, which
    grows. Where several happen to one operation, all delays count, and of the others of a disk the first.

    A WriteLog has what reaches the disk behind its faults. Raises ConfigError for what this device cannot have.
    """
    if hasattr(device, "board"):
        raise ConfigError(f"faults for a {type(device).__name__} that is attached already", "inject them before")
    log: list[Injected] = []
    logs = [item for item in faults if isinstance(item, WriteLog)]
    for item in faults:
        if isinstance(item, Fault) and _kind(item) is None:
            raise ConfigError(
                f"{type(item).__name__} is no fault that a device can have", "see kvmpy.faults for those there are"
            )
    plans: dict[type[Fault], Plan] = {}
    for kind, owner, operations in KINDS:
        mine = [item for item in faults if isinstance(item, Fault) and _kind(item) is kind]
        for fault in mine:
            _check_owner(device, owner, type(fault))
            fault.check(operations)
        plans[kind] = Plan(mine, f"{seed} {kind.__name__}", log)
    if logs:
        _check_owner(device, Blk, WriteLog)
    if isinstance(device, Blk) and (logs or plans[DiskFault].faults or plans[PowerCut].faults):
        _replace(device, "open", partial(_open_disk, device, device.open, plans, logs))
    if isinstance(device, Net) and plans[WireFault].faults:
        _replace(device, "open", partial(_open_line, device, device.open, plans[WireFault]))
    if plans[LostInterrupt].faults:
        _lose_interrupts(device, plans[LostInterrupt])
    return log


def _kind(fault: Fault) -> type[Fault] | None:
    """The class of faults with which this one has a plan in common."""
    return next((kind for kind, _, _ in KINDS if isinstance(fault, kind)), None)


def _check_owner(device: Attachable, owner: type, what: type) -> None:
    if not isinstance(device, owner):
        raise ConfigError(f"{what.__name__} for a {type(device).__name__}", f"it is for {owner.__name__}")


def _open_disk(
    device: Blk, really: Callable[[], Image], plans: dict[type[Fault], Plan], logs: Sequence[WriteLog]
) -> Image:
    image = really()
    try:
        for log in logs:
            image = log.over(image)
    except BaseException:
        image.close()
        raise
    if plans[PowerCut].faults:
        image = VolatileImage(image, plans[PowerCut], partial(_power_off, device))
    return FaultyImage(image, plans[DiskFault]) if plans[DiskFault].faults else image


def _power_off(device: Blk) -> None:
    device.board.stop(Stop(Reason.QUIT, f"the power of {device.path} has failed"))


def _open_line(device: Net, really: Callable[[], NetBackend | None], plan: Plan) -> NetBackend | None:
    line = really()
    if line is None:
        return None

    def later(seconds: float, call: Callable[[], None]) -> None:
        device.loop.after(seconds, call, owner=device)

    return FaultyWire(line, plan, later, lambda: device.serve(RX))


def _lose_interrupts(device: Any, plan: Plan) -> None:
    if not isinstance(device, VirtioDevice):
        really_attach = device.attach

        def attach(board: Board) -> None:
            really_attach(interrupts.FaultyBoard(board, plan))

        _replace(device, "attach", attach)
        return
    really_activate = device.activate
    known: set[VirtQueue] = set()

    def activate(features: int, queues: Sequence[VirtQueue]) -> None:
        for queue in set(queues) - known:
            queue.interrupt = interrupts.losing(queue.interrupt, plan)
            known.add(queue)
        really_activate(features, queues)

    _replace(device, "activate", activate)


def _replace(device: Any, name: str, method: Callable[..., Any]) -> None:
    setattr(device, name, method)
