"""Hostile guests: what one is, what they are made from, and how all are assembled at once.

A guest is machine code that KVM runs from its first instruction on a whole Machine, with real devices. What it does is
its own affair; what is checked is the host: see arena.py.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvmpy.core.board import Reason
from kvmpy.x86 import layout

SCALE = int(os.environ.get("KVMPY_HOSTILE", "0"))  # 0: the sample that every run has; N: all, with N times the seeds
RAM = 4 * layout.MIB

REAL, HIGH = layout.BOOT_SECTOR, layout.HIGH_RAM  # where the code of guests is
IDT, STUBS = 0x5000, 0x6000  # of guests in long mode: see STUB_CODE
SECOND = 0x8000  # code of the second CPU, which begins in real mode
RINGS = 0x10000  # what the second CPU reaches: 64 KiB
BUFFERS = 0x200000

# How a machine may end, whatever its guest does; QUIT, SIGNAL and ERROR are not the guest's to have.
ENDINGS = frozenset(
    {
        Reason.POWEROFF,
        Reason.RESET,
        Reason.EXIT,
        Reason.PANIC,
        Reason.TRIPLE_FAULT,
        Reason.TIMEOUT,
        Reason.HALT,
        Reason.CRASH,
    }
)

SERVED = frozenset({Reason.EXIT})  # of a guest that tells by a status of 0 that its device has served it

MACROS = """
        .include "tiny.inc"
        .equ    IDTR, 0x6100
        .equ    COUNT, 0x6200                   # interrupts so far
        .equ    NEXT_PORT, 0x6300               # how far a sweep has come, and what it is to do
        .equ    FIRST, 0x6304
        .equ    LAST, 0x6308
        .equ    STRIDE, 0x630c
.macro  done                                    # the job has ended, status 0
        mov     $0x502, %dx
        xor     %eax, %eax
        out     %al, %dx
        cli
        hlt
.endm
.macro  try     instruction:vararg              # one that may fault; the next one follows all the same
        lea     7777f(%rip), %r15
        \\instruction
7777:
.endm
.macro  w1 address, value
        mov     $\\address, %rax
        movb    $\\value, (%rax)
.endm
.macro  w2 address, value
        mov     $\\address, %rax
        movw    $\\value, (%rax)
.endm
.macro  w4 address, value
        mov     $\\address, %rax
        movl    $\\value, (%rax)
.endm
.macro  long_mode                               # exceptions go to r15, interrupts are counted
        mov     $0x7000, %esp
        lidt    IDTR
        lea     7778f(%rip), %r15
        mov     $LAPIC_SPURIOUS, %eax
        movl    $0x1ff, (%rax)
7778:
.endm
"""

STUB_CODE = """
        .code64
        mov     $0x7000, %esp                   # exceptions: where r15 says
        jmp     *%r15
        .org    0x40
        push    %rax                            # interrupts
        incl    0x6200
        mov     $0xfee000b0, %eax
        movl    $0, (%rax)
        pop     %rax
        iretq
        .org    0x100
        .word   0xfff
        .quad   0x5000
        .org    0x110
        .word   0x2f                            # as longmode.py has it
        .quad   0x500
"""


class Guest(NamedTuple):
    """A program to run: `code` is its assembly. `second` is that of CPU 1, which the guest has to start.

    It is stopped after `seconds`. `ends`: how its machine may end.
    """

    name: str
    code: str
    mode: str = "long"
    second: str = ""
    transport: str = "mmio"
    devices: tuple[str, ...] = ()
    memory: Mapping[int, bytes] = {}
    seconds: float = 0.06
    ends: frozenset[Reason] = ENDINGS

    @property
    def origin(self) -> int:
        return REAL if self.mode == "real" else HIGH


def seeds(count: int) -> range:
    """So many, or as many times that as is asked for."""
    return range(count * max(1, SCALE))


def generator(name: str, seed: int) -> random.Random:
    """Random numbers that are the same in every run."""
    return random.Random(f"{name} {seed}")


def lines(code: Iterable[str]) -> str:
    return "\n".join(code)


@cache
def second(name: str) -> str:
    return f"second CPU of {name}"


def assemble(guests: Iterable[Guest], folder: Path, include: Path) -> dict[str, bytes]:
    """The machine code of all guests, by name; of second CPUs by `second`."""
    bits = {"real": 16, "protected": 32, "long": 64}
    sources = [("stubs", 64, STUB_CODE)]
    for guest in guests:
        sources.append((guest.name, bits[guest.mode], guest.code))
        if guest.second:
            sources.append((second(guest.name), 16, guest.second))
    text = [MACROS]
    for number, (_, width, code) in enumerate(sources):
        text.append(f'.section g{number},"ax",@progbits\n.code{width}\n{code}\n')
    (folder / "guests.S").write_text("\n".join(text))
    subprocess.run(["as", "--64", "-I", include, "-o", folder / "guests.o", folder / "guests.S"], check=True)
    found = dict(_sections((folder / "guests.o").read_bytes()))
    absolute = [name for name in found if name.startswith(".rela.g")]
    assert not absolute, f"not linked, these must do with relative addresses: {absolute}"
    return {name: found[f"g{number}"] for number, (name, *_) in enumerate(sources)}


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The contents of an ELF file's sections, by name (System V ABI, 4)."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        yield data[start : data.index(b"\0", start)].decode(), data[offset : offset + length]


def engines(guests: Iterable[Guest]) -> list[Any]:
    """Parameters of a test: guests by turns with the compiled twins and without; with SCALE, each with both."""
    found = []
    for number, guest in enumerate(guests):
        for pure in (False, True) if SCALE else (bool(number % 2),):
            found.append(pytest.param(guest, pure, id=f"{guest.name}-{'python' if pure else 'compiled'}"))
    return found
