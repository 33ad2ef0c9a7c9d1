"""Programs of loads and stores to registers, configuration spaces, BARs and MSI-X tables, sensible and not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.virtio import pci
from kvmpy.virtio.mmio import CONFIG, SIZE, VirtioMmio
from kvmpy.virtio.pci import VirtioPci

if TYPE_CHECKING:
    from .generate import Generator

MMIO = sorted({int(reg.offset or 0) for reg in VirtioMmio.REGISTERS.values()})
COMMON = sorted((int(reg.offset or 0), reg.width) for reg in VirtioPci.REGISTERS.values())
WINDOW = 0x40 + 4 * pci.CAP_SIZE + 4  # the capability through which the BAR can be reached (4.1.4.9)
STATUS = [0, 1, 3, 11, 15, 0x80, 0x8F, 0xFF, 0x40, 4, 8]


def program(make: Generator) -> None:
    """Up to 20 accesses in a row."""
    access = _mmio if make.transport == "mmio" else _pci
    for _ in range(make.random.choice((1, 3, 20))):
        access(make)


def _add(make: Generator, space: str, offset: int, size: int) -> None:
    pick = make.random
    value = None if pick.random() < 0.3 else pick.choice([make.word(8 * size), pick.choice(STATUS), 1])
    make.ops.append(["access", space, offset, size, value])


def _mmio(make: Generator) -> None:
    pick, chance = make.random, make.random.random()
    if chance < 0.6:
        _add(make, "device", pick.choice(MMIO), 4)
    elif chance < 0.8:
        _add(make, "device", CONFIG + pick.randrange(80), pick.choice([1, 2, 4, 8]))
    else:
        _add(make, "device", pick.randrange(SIZE), pick.choice([1, 2, 4, 8, 3]))


def _pci(make: Generator) -> None:
    pick, chance = make.random, make.random.random()
    if chance < 0.4:
        _add(make, "device", *pick.choice(COMMON))
    elif chance < 0.5:
        _add(make, "device", pci.CONFIG + pick.randrange(80), pick.choice([1, 2, 4, 8]))
    elif chance < 0.65:
        _add(make, "device", pci.TABLE + 4 * pick.randrange(64), pick.choice([4, 8, 4, 2, 1]))
    elif chance < 0.7:
        _add(make, "device", pick.choice([pci.NOTIFY, pci.PBA, pci.ISR]) + pick.randrange(64), pick.choice([1, 2, 4]))
    elif chance < 0.73:
        bar, size = pick.choice([0, 0, 0, 1, 6]), pick.choice([1, 2, 4, 4, 8, 0, 3, make.word(32)])
        where = pick.choice([*COMMON, (pci.CONFIG, 4), (pci.TABLE, 4), (pci.BAR_SIZE - 1, 1), (make.word(32), 1)])[0]
        for offset, width, value in (
            (4, 1, bar),
            (8, 4, where),
            (12, 4, size),
            (16, 4, pick.choice([None, 0, 1, 0xFF])),
        ):
            make.ops.append(["access", "config", WINDOW + offset, width, value])
    elif chance < 0.77:
        _add(make, "device", pick.randrange(pci.BAR_SIZE), pick.choice([1, 2, 4, 8]))
    elif chance < 0.95:
        _add(make, "config", pick.choice([4, 0x10, 0x14, 0x34, 4 * pick.randrange(64)]), pick.choice([1, 2, 4]))
    else:
        _add(make, "config", pick.randrange(0x1000), pick.choice([1, 2, 4, 8]))
