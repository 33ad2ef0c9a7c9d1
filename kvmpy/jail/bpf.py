"""Seccomp filters: a rule for each system call, assembled to classic BPF.

See Documentation/userspace-api/seccomp_filter.rst of the kernel.

A filter begins with the calls that have a condition: a block for each, which other calls jump over. Behind them is one
comparison for each other number, which jumps to the verdicts at the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from ..core.record import Record

Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jt, jf, k

LOAD, RETURN = 0x20, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_RET | BPF_K
JUMP_EQUAL, JUMP_NOT_LESS, JUMP_ANY_BIT = 0x15, 0x35, 0x45  # BPF_JMP | BPF_JEQ, BPF_JGE, BPF_JSET, with BPF_K
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
MAX_JUMP = 255
X86_64 = 0xC000003E  # AUDIT_ARCH_X86_64
X32 = 0x40000000  # __X32_SYSCALL_BIT

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_ALLOW, _KILL_PROCESS, _ERRNO (| errno)


class OneOf(Record, frozen=True):
    """Allowed when the low half of argument `index` is one of `values`: for arguments that are ints."""

    index: int
    values: tuple[int, ...]


class Without(Record, frozen=True):
    """Allowed when argument `index` has none of `bits`, which are in its low half."""

    index: int
    bits: int


class With(Record, frozen=True):
    """Allowed when argument `index` has one of `bits`, which are in its low half."""

    index: int
    bits: int


Condition = OneOf | Without | With


def program(
    conditional: Mapping[int, tuple[Condition, int]],
    plain: Iterable[int],
    refused: Mapping[int, int],
    otherwise: int,
) -> list[Instruction]:
    """A filter: calls by number, those with a condition (and the verdict where it does not hold) first, since the call
    of an exit is one of them; calls that are allowed; calls with verdicts of their own; the verdict on all others.

    Raises ValueError when there are more calls than a jump can pass over.
    """
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, X86_64),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_NOT_LESS, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    for number, (condition, verdict) in conditional.items():
        block = _check(condition, verdict)
        code += [(JUMP_EQUAL, 0, len(block), number), *block]
    answers = [otherwise, *dict.fromkeys((ALLOW, *refused.values()))]  # the verdicts, each once
    numbers = [*((number, ALLOW) for number in plain), *refused.items()]
    if len(numbers) + len(answers) > MAX_JUMP:
        raise ValueError("too many system calls for one jump")
    places = {verdict: place for place, verdict in enumerate(answers) if place}
    last = len(numbers) - 1
    code += [(JUMP_EQUAL, last - at + places[verdict], 0, number) for at, (number, verdict) in enumerate(numbers)]
    return [*code, *((RETURN, 0, 0, verdict) for verdict in answers)]


def _check(condition: Condition, verdict: int) -> list[Instruction]:
    """Returns ALLOW or `verdict`."""
    load = (LOAD, 0, 0, ARGUMENTS + 8 * condition.index)
    ends = [(RETURN, 0, 0, verdict), (RETURN, 0, 0, ALLOW)]
    if isinstance(condition, OneOf):
        left = len(condition.values)
        return [load, *((JUMP_EQUAL, left - at, 0, value) for at, value in enumerate(condition.values)), *ends]
    if isinstance(condition, With):
        return [load, (JUMP_ANY_BIT, 1, 0, condition.bits), *ends]
    return [load, (JUMP_ANY_BIT, 0, 1, condition.bits), *ends]


def assemble(code: Sequence[Instruction]) -> bytes:
    """An array of struct sock_filter."""
    return struct.pack("<" + "HBBI" * len(code), *chain.from_iterable(code))
