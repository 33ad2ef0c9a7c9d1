"""Puts the pieces of a boot into guest RAM, or says how much RAM that would take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..core.errors import ConfigError, GuestMemoryError, ImageError
from ..core.memory import GuestMemory
from ..core.record import Record
from ..core.wire import Buffer
from ..x86 import layout
from ..x86.layout import MIB, PAGE
from . import cmdline
from .spec import BootSpec


class Segment(Record, frozen=True):
    """`content` goes to guest address `base`; the `size` bytes from there on are the image's, the rest is zero."""

    base: int
    content: memoryview
    size: int
    virtual: int = 0  # the address that the image's code has for `base`

    @property
    def end(self) -> int:
        return self.base + self.size


def check_segments(segments: Sequence[Segment]) -> None:
    """Raises ImageError when `segments` overlap, or cover the boot's own tables."""
    ordered = sorted(segments, key=lambda segment: segment.base)
    for low, high in itertools.pairwise(ordered):
        if low.end > high.base:
            raise ImageError(
                f"segments [{low.base:#x}, {low.end:#x}) and [{high.base:#x}, {high.end:#x}) overlap",
                "the file is damaged or was linked wrongly: build it again",
            )
    for segment in ordered:
        for start, end in layout.BOOT_TABLES:
            if segment.base < end and start < segment.end:
                raise ImageError(
                    f"segment [{segment.base:#x}, {segment.end:#x}) covers the boot's own tables in "
                    f"[{start:#x}, {end:#x})",
                    "link the kernel at 1 MiB or above",
                )


def put_segments(mem: GuestMemory, segments: Sequence[Segment]) -> None:
    """Write `segments` to `mem`, which must be fresh (all zero)."""
    for segment in segments:
        require_ram(mem, segment.base, segment.size, "the kernel")
        mem.write(segment.base, segment.content)


def require_ram(mem: GuestMemory, base: int, size: int, what: str) -> None:
    """Raises ImageError, with the --mem that it would take, unless [base, base+size) is RAM."""
    try:
        mem.window(base, size).release()
    except GuestMemoryError:
        end = base + size
        where = f"{what} needs guest memory [{base:#x}, {end:#x})"
        if end > layout.HOLE:
            raise ImageError(f"{where}, which is never RAM", "link it to run below 3 GiB") from None
        raise ImageError(f"{where}, which is more than there is", f"give at least --mem {megabytes(end)}M") from None


def put_cmdline(mem: GuestMemory, spec: BootSpec, limit: int) -> int:
    """Write the command line, of at most `limit` bytes, with its NUL; answers its guest address."""
    line = cmdline.encode(spec.cmdline, min(limit, layout.CMDLINE_MAX - 1))
    require_ram(mem, layout.CMDLINE, len(line) + 1, "the command line")
    mem.write(layout.CMDLINE, line + b"\0")
    return layout.CMDLINE


def put_initrd(mem: GuestMemory, spec: BootSpec, floor: int, ceiling: int = layout.HOLE) -> tuple[int, int]:
    """Write the initrd at the top of low RAM, above `floor` and below `ceiling`; (guest address, size), or (0, 0)."""
    size = len(spec.initrd)
    if not size:
        return 0, 0
    top = min(spec.ram_size, ceiling, layout.HOLE)
    base = (top - size) // PAGE * PAGE
    if base < floor:
        what = f"the initrd ({size / MIB:.1f} MiB) does not fit between the kernel's end at {floor / MIB:.1f} MiB and "
        if round_up(floor, PAGE) + round_up(size, PAGE) > min(ceiling, layout.HOLE):
            raise ImageError(what + f"{top / MIB:.0f} MiB, where it must end", "make the initrd smaller")
        need = megabytes(round_up(floor, PAGE) + round_up(size, PAGE))
        raise ImageError(what + f"the end of RAM at {top / MIB:.1f} MiB", f"give at least --mem {need}M")
    mem.write(base, spec.initrd)
    return base, size


def put_table(mem: GuestMemory, gpa: int, data: Buffer) -> None:
    """Write one of the boot's own tables."""
    try:
        mem.write(gpa, data)
    except GuestMemoryError:
        raise ConfigError("too little memory for any kernel", "give at least --mem 2M") from None


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def megabytes(end: int) -> int:
    """The --mem that makes RAM reach `end`, in MiB."""
    return -(-end // MIB)
