"""Tells people and programs why a machine stopped."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterator
from typing import Any

from .core.board import Stop
from .core.text import printable
from .evidence import Activity, Cpu, Evidence, Instruction, collect
from .hints import hints
from .kvm.state import DescriptorTable, Regs
from .machine import Machine
from .x86.flags import CR0, CR4, EFER, RFLAGS

CONSOLE_LINES = 20
TRACE_LINES = 12  # of the exception that a device raised
EXIT_LINES = 5
CPU_LINES = 3  # CPUs besides the one that is shown in full
WIDTH = 120  # columns; of longer lines the rest is left out
HINT_WIDTH = 96
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
CODE_BYTES = 8  # of an instruction that are shown
GENERAL = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
SIZES = {1: "byte", 2: "word", 4: "dword", 8: "qword"}
RESTING = (Activity.IDLE, Activity.WAITING)


def crash_report(machine: Machine, stop: Stop) -> str:
    """A page of text for a terminal on a machine whose `wait` has returned `stop` and that is not closed yet."""
    return render(collect(machine, stop))


def crash_facts(machine: Machine, stop: Stop) -> dict[str, Any]:
    """The same for programs: plain JSON-able values, addresses and registers as text in hexadecimal."""
    return facts(collect(machine, stop))


def facts(evidence: Evidence) -> dict[str, Any]:
    """What crash_facts returns, made from the evidence."""
    return {
        "reason": evidence.stop.reason.name.lower(),
        "detail": evidence.stop.detail,
        "hints": [vars(hint) for hint in hints(evidence)],
        "vcpus": [_cpu_facts(cpu) for cpu in evidence.cpus],
        "console": _last_lines(evidence),
    }


def render(evidence: Evidence) -> str:
    """What crash_report returns, made from the evidence."""
    lines = [f"kvmpy: {printable(str(evidence.stop))}"]
    if evidence.raised or evidence.stop.cause is not None:
        lines += ["", *_section("raised by", _trace(evidence))]
    lines += ["", *_cpu(evidence.culprit, evidence.stop), *_other_cpus(evidence)]
    if last := _last_lines(evidence):
        lines += ["", *_section("last output", [f"| {line}" for line in last])]
    if found := hints(evidence):
        lines.append("")
        for hint in found:
            lines += textwrap.wrap(hint.cause, HINT_WIDTH, initial_indent="-> ", subsequent_indent="   ")
            lines += textwrap.wrap(hint.remedy, HINT_WIDTH, initial_indent="   ", subsequent_indent="   ")
    return "\n".join(lines)


def _section(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {_cut(line)}" for line in lines)]


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _last_lines(evidence: Evidence) -> list[str]:
    return evidence.console.rstrip().split("\n")[-CONSOLE_LINES:] if evidence.console.strip() else []


def _trace(evidence: Evidence) -> list[str]:
    text = evidence.raised or "".join(traceback.format_exception(evidence.stop.cause))
    return printable(text).rstrip().split("\n")[-TRACE_LINES:]


# One CPU in full.


def _cpu(cpu: Cpu, stop: Stop) -> list[str]:
    title = f"vcpu {cpu.index}: {cpu.activity.value}" + (f"; {cpu.mode}" if cpu.mode else "")
    lines = [f"exit   {cpu.fatal}"] if cpu.fatal and cpu.fatal not in stop.detail else []
    if cpu.problem:
        lines.append(f"error  {cpu.problem}")
    if cpu.was_reset:
        lines.append("its state is lost: AMD processors reset it in a triple fault")
    elif cpu.activity not in RESTING:  # in its idle loop there is nothing to see
        lines += [*_registers(cpu), *_code(cpu)]
    lines += _exits(cpu)
    return _section(title, lines)


def _registers(cpu: Cpu) -> Iterator[str]:
    regs, sregs = cpu.regs, cpu.sregs
    if regs is None or sregs is None:
        return
    yield from _general(regs, cpu.bits)
    digits = _digits(cpu)
    yield f"cr2    {sregs.cr2:0{digits}x}  cr3    {sregs.cr3:0{digits}x}"
    yield f"rflags {RFLAGS.describe(regs.rflags)}  efer {EFER.describe(sregs.efer)}"
    yield f"cr0    {CR0.describe(sregs.cr0)}"
    yield f"cr4    {CR4.describe(sregs.cr4)}"
    yield "       " + "  ".join(f"{name} {getattr(sregs, name).selector:04x}" for name in SEGMENTS)
    bases = "  ".join(f"{name} {getattr(sregs, name).base:x}" for name in ("cs", "ss", "fs", "gs"))
    yield f"bases  {bases}  gdt {_table(sregs.gdt)}  idt {_table(sregs.idt)}"


def _table(table: DescriptorTable) -> str:
    return f"{table.base:x}+{table.limit:x}"


def _general(regs: Regs, bits: int) -> Iterator[str]:
    """The general registers: all in 64-bit mode, else those that there are, by their 32-bit names."""
    values = vars(regs)
    if bits == 64:
        shown, digits, columns = [(name, values[name]) for name in GENERAL], 16, 3
    else:
        names = [name for name in GENERAL if not name[1:].isdigit()]
        shown, digits, columns = [("e" + name[1:], values[name] & 0xFFFFFFFF) for name in names], 8, 5
    for at in range(0, len(shown), columns):
        yield "  ".join(f"{name:<6} {value:0{digits}x}" for name, value in shown[at : at + columns])


def _digits(cpu: Cpu) -> int:
    return cpu.bits // 4 if cpu.bits == 64 else 8


def _code(cpu: Cpu) -> Iterator[str]:
    if cpu.regs is None:
        return
    for instruction in cpu.before:
        yield f"   {_instruction(instruction, _digits(cpu))}"
    for index, instruction in enumerate(cpu.code):
        yield f"{'   ' if index else '=> '}{_instruction(instruction, _digits(cpu))}"
    if not cpu.code:
        yield "=> no code: nothing is mapped at this address, or no instruction"
    words = "  ".join(f"{word:0{cpu.bits // 4}x}" for word in cpu.stack[: 3 if cpu.bits == 64 else None])
    yield f"stack  {words or 'not mapped'}"
    if cpu.bits == 64 and len(cpu.stack) > 3:
        yield "       " + "  ".join(f"{word:016x}" for word in cpu.stack[3:])


def _instruction(instruction: Instruction, digits: int) -> str:
    data = instruction.data[:CODE_BYTES].hex(" ") + (".." if len(instruction.data) > CODE_BYTES else "")
    return f"{instruction.address:0{digits}x}  {data:<{3 * CODE_BYTES + 1}}  {instruction.text}"


def _exits(cpu: Cpu) -> Iterator[str]:
    if not cpu.exits:
        return
    yield "last exits, the latest first"
    for kind in cpu.exits[:EXIT_LINES]:
        space = "port " if kind.what in ("in", "out") else ""
        size = SIZES.get(kind.size, f"{kind.size} bytes")
        yield f"  {kind.count:>2} x {kind.what} {space}{kind.address:#x} ({size}): {kind.device or 'nothing there'}"
    if len(cpu.exits) > EXIT_LINES:
        yield f"  and {len(cpu.exits) - EXIT_LINES} other kinds"


# The other CPUs, in a line each, or fewer.


def _other_cpus(evidence: Evidence) -> Iterator[str]:
    others = [cpu for cpu in evidence.cpus if cpu is not evidence.culprit]
    busy = [cpu for cpu in others if cpu.activity not in RESTING]
    for cpu in busy[:CPU_LINES]:
        line = f"vcpu {cpu.index}: {cpu.activity.value}"
        if cpu.regs is not None:
            line += f"; {cpu.mode}, rip {cpu.regs.rip:0{_digits(cpu)}x}"
            line += f": {cpu.code[0].text}" if cpu.code else ""
        yield _cut(line)
    for activity in Activity:
        rest = [cpu.index for cpu in [*busy[CPU_LINES:], *others] if cpu.activity is activity]
        rest = sorted(set(rest) - {cpu.index for cpu in busy[:CPU_LINES]})
        if rest:
            yield f"vcpu {numbers(rest)}: {activity.value}"


def numbers(indices: list[int]) -> str:
    """Ascending numbers as people write them: `1-3, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# For programs.


def _cpu_facts(cpu: Cpu) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": cpu.index,
        "activity": cpu.activity.name.lower(),
        "mode": cpu.mode,
        "exit": cpu.fatal,
        "last_exits": [vars(kind) | {"address": hex(kind.address)} for kind in cpu.exits],
    }
    if cpu.problem:
        result["problem"] = cpu.problem
    if cpu.regs is None or cpu.sregs is None:
        return result
    sregs = cpu.sregs
    result["registers"] = {name: hex(value) for name, value in vars(cpu.regs).items()}
    result["registers"] |= {name: hex(getattr(sregs, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}
    result["segments"] = {
        name: {"selector": hex(segment.selector), "base": hex(segment.base), "limit": hex(segment.limit)}
        for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
        if (segment := getattr(sregs, name))
    }
    result["tables"] = {
        name: {"base": hex(table.base), "limit": hex(table.limit)}
        for name, table in (("gdt", sregs.gdt), ("idt", sregs.idt))
    }
    result["code"] = [
        {"address": hex(instruction.address), "bytes": instruction.data.hex(), "text": instruction.text}
        for instruction in cpu.code
    ]
    result["stack"] = [hex(word) for word in cpu.stack]
    return result
