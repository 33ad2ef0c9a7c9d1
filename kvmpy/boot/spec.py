"""What a boot protocol is given and what it answers."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.record import Record, fresh
from ..core.typed import Enum
from ..x86.layout import Span


class Mode(Enum):
    """The state of the boot CPU at the kernel's first instruction."""

    REAL = "16-bit real mode"
    PROTECTED = "32-bit protected mode, paging off"
    LONG = "64-bit long mode, identity-mapped"


class BootSpec(Record, frozen=True):
    """Everything besides the image that goes into guest memory."""

    ram_size: int
    e820: Sequence[Span]
    cmdline: str = ""
    initrd: bytes = b""  # all --initrd files, concatenated (boot/initrd.py)
    rsdp: int = 0  # guest address of the ACPI root pointer, 0 for none


class EntryPoint(Record, frozen=True):
    """Where and how the boot CPU starts; `registers` are the general registers that the protocol fixes."""

    protocol: str  # "pvh", "linux64", "decompressor", "multiboot" or "flat"
    mode: Mode
    rip: int
    registers: dict[str, int] = fresh(default_factory=dict)
    why: str = ""  # how the protocol was chosen, for people
