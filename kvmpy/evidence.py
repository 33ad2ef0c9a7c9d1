"""Collects what is left of a machine that has stopped: the state of its CPUs, their code, their last exits.

All of it is read without running the guest, and whatever the guest left behind: each read is bounded, and goes
through its page tables to RAM or nowhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from enum import Enum

from .core.board import Stop
from .core.bus import Bus
from .core.errors import GuestMemoryError, KvmError
from .core.memory import GuestMemory
from .core.record import Record
from .core.text import printable
from .kvm import exits
from .kvm.handle import Vcpu
from .kvm.probe import runs_ring0_natively
from .kvm.state import Regs, Segment, Sregs
from .machine import Machine
from .vcpu import VcpuThread
from .x86.flags import CR0, EFER, RFLAGS
from .x86.layout import PAGE

MP_STATE_RUNNABLE, MP_STATE_HALTED = 0, 3  # KVM_MP_STATE_*; the others wait for INIT or SIPI

MAX_INSTRUCTION = 15  # bytes (Intel SDM vol. 2A, 2.3.11)
CODE_BEFORE, CODE_AFTER = 24, 64  # bytes that are disassembled
SHOWN_BEFORE, SHOWN_AFTER = 3, 5  # instructions that are kept of them
STACK_WORDS = 6
TIGHT_LOOP = 64  # bytes: a CPU that is found within such a loop waits for something, most likely
RESET_VECTOR = (0xFFFF0000, 0xFFF0)  # CS base and RIP after a reset (Intel SDM vol. 3A, 10.1.4)


class Activity(Enum):
    """What a CPU did when the machine stopped."""

    RUNNING = "running"
    IDLE = "idle, waiting for an interrupt"
    HALTED = "halted with interrupts off"
    WAITING = "not started"
    BUSY = "held by a device, so that its registers cannot be read"
    LOST = "cannot be read"


class Instruction(Record, frozen=True):
    """One disassembled instruction; `address` is an offset in the code segment, as in RIP."""

    address: int
    data: bytes
    text: str

    @property
    def end(self) -> int:
        return self.address + len(self.data)


class Exits(Record, frozen=True):
    """Equal accesses among the last ones of a CPU; `device` is the one that answered, "" when none did."""

    what: str  # "in", "out" (ports), "read", "write" (memory)
    address: int
    size: int
    device: str
    count: int


class Cpu(Record, frozen=True):
    """A virtual CPU as it was left. Without registers when they could not be read; empty code and stack: not mapped."""

    index: int
    activity: Activity
    exits: tuple[Exits, ...] = ()  # the latest first
    fatal: str = ""  # the exit after which it could not go on
    suberror: int = 0  # of KVM_EXIT_INTERNAL_ERROR
    entry_failure: int | None = None  # of KVM_EXIT_FAIL_ENTRY
    regs: Regs | None = None
    sregs: Sregs | None = None
    before: tuple[Instruction, ...] = ()
    code: tuple[Instruction, ...] = ()  # from RIP on
    stack: tuple[int, ...] = ()
    loop: bool = False  # RIP is in a loop of a few instructions
    problem: str = ""  # why registers are missing

    @property
    def bits(self) -> int:
        """The size of an address in the current mode: 16, 32 or 64."""
        return 64 if self.sregs is None else _bits(self.sregs)

    @property
    def was_reset(self) -> bool:
        """Whether the state is that after a reset: AMD processors lose the guest's in a triple fault."""
        if self.regs is None or self.sregs is None:
            return False
        return (self.sregs.cs.base, self.regs.rip) == RESET_VECTOR

    @property
    def mode(self) -> str:
        """In words: operating mode and privilege level."""
        if self.regs is None or self.sregs is None:
            return ""
        if not self.sregs.cr0 & CR0.PE:
            return "real mode"
        if self.regs.rflags & RFLAGS.VM:
            return "virtual-8086 mode, ring 3"
        name = {16: "16-bit protected mode", 32: "32-bit protected mode", 64: "64-bit mode"}[self.bits]
        if self.sregs.efer & EFER.LMA and self.bits < 64:
            name = f"{self.bits}-bit compatibility mode"
        paging = "" if self.sregs.cr0 & CR0.PG else ", paging off"
        return f"{name}, ring {self.sregs.ss.dpl}{paging}"


class Evidence(Record, frozen=True):
    """Everything a report is made from."""

    stop: Stop
    cpus: tuple[Cpu, ...]
    console: str  # fit to be shown
    protocol: str
    cmdline: str
    memory: int  # bytes of RAM
    raised: str = ""  # the trace of what a device raised, where the exception itself is in another process
    native: bool | None = None  # whether this host runs ring 0 by hardware; None when that was of no interest

    @property
    def culprit(self) -> Cpu:
        """The CPU to look at first: the one that could not go on, else one that was running."""
        return min(self.cpus, key=lambda cpu: (not cpu.fatal, cpu.activity is not Activity.RUNNING, cpu.index))


def collect(machine: Machine, stop: Stop, raised: str = "") -> Evidence:
    """The evidence of a machine whose `wait` has returned `stop`, or that is paused, and that is not closed yet."""
    ports, mmio = machine.board.ports, machine.board.memory_bus
    cpus = tuple(examine(thread, machine.memory, ports, mmio) for thread in machine.vcpus)
    native = None
    if any(cpu.suberror == exits.EMULATION for cpu in cpus):
        try:
            native = runs_ring0_natively(machine.kvm)
        except KvmError:  # then it remains unknown
            native = None
    return Evidence(
        stop=stop,
        cpus=cpus,
        console=printable(machine.console.text),
        protocol=machine.entry.protocol,
        cmdline=machine.cmdline,
        memory=machine.config.mem,
        raised=raised,
        native=native,
    )


def examine(thread: VcpuThread, memory: GuestMemory, ports: Bus, mmio: Bus) -> Cpu:
    """The CPU of a thread that was told to end, or to pause; does not wait for one that has not."""
    vcpu, index = thread.vcpu, thread.vcpu.index
    recent = thread.recent()
    reason = recent[-1].reason if recent else exits.EXIT_IO
    fatal = ""
    if reason not in (exits.EXIT_IO, exits.EXIT_MMIO):
        fatal = exits.describe(vcpu.page)
        recent.pop()
    counted = _count(recent, ports, mmio)
    if not thread.join(0) and not thread.wait_paused(0):
        return Cpu(index, Activity.BUSY, counted)
    suberror = exits.suberror(vcpu.page) if reason == exits.EXIT_INTERNAL_ERROR else 0
    failure = exits.entry_failure(vcpu.page) if reason == exits.EXIT_FAIL_ENTRY else None
    try:
        regs, sregs, state = vcpu.regs(), vcpu.sregs(), vcpu.mp_state()
        before, code = _code(vcpu, memory, regs, sregs)
        if not code and suberror == exits.EMULATION:
            code = _disassemble(exits.failed_instruction(vcpu.page), regs.rip, _bits(sregs))[:1]
        return Cpu(
            index,
            _activity(state, regs),
            counted,
            fatal,
            suberror,
            failure,
            regs,
            sregs,
            before,
            code[:SHOWN_AFTER],
            _stack(vcpu, memory, regs, sregs),
            _in_tight_loop(regs.rip, code),
        )
    except KvmError as error:
        return Cpu(index, Activity.LOST, counted, fatal, suberror, failure, problem=str(error))


def _activity(mp_state: int, regs: Regs) -> Activity:
    if mp_state == MP_STATE_RUNNABLE:
        return Activity.RUNNING
    if mp_state == MP_STATE_HALTED:
        return Activity.IDLE if regs.rflags & RFLAGS.IF else Activity.HALTED
    return Activity.WAITING


def _count(recent: Sequence[exits.Exit], ports: Bus, mmio: Bus) -> tuple[Exits, ...]:
    """Equal exits counted together, the latest first."""
    counts: dict[tuple[str, int, int, str], int] = {}
    for reason, is_write, size, address, _ in reversed(recent):
        if reason == exits.EXIT_IO:
            what, bus = "out" if is_write else "in", ports
        else:
            what, bus = "write" if is_write else "read", mmio
        kind = (what, address, size, _device(bus, address, size))
        counts[kind] = counts.get(kind, 0) + 1
    return tuple(Exits(*kind, count) for kind, count in counts.items())


def _device(bus: Bus, address: int, size: int) -> str:
    for base, end, device in bus.ranges:
        if base <= address and address + size <= end:
            return type(device).__name__
    return ""


# Guest code and stack.


def _bits(sregs: Sregs) -> int:
    if sregs.efer & EFER.LMA and sregs.cs.l:
        return 64
    return 32 if sregs.cr0 & CR0.PE and sregs.cs.db else 16


def _linear(segment: Segment, offset: int, bits: int) -> int:
    """The linear address of an offset in code or stack, whose base counts outside 64-bit mode only."""
    return offset & (1 << 64) - 1 if bits == 64 else segment.base + offset & 0xFFFFFFFF


def _read(vcpu: Vcpu, memory: GuestMemory, address: int, size: int) -> bytes:
    """Up to `size` bytes from linear `address` on; fewer where the guest has nothing mapped, no RAM, or no address."""
    data = b""
    while len(data) < size and address < 1 << 64:
        length = min(size - len(data), PAGE - address % PAGE)
        physical = vcpu.translate(address)
        if physical is None:
            break
        try:
            data += memory.read(physical, length)
        except GuestMemoryError:
            break
        address += length
    return data


def _code(
    vcpu: Vcpu, memory: GuestMemory, regs: Regs, sregs: Sregs
) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
    """The instructions that seem to come before RIP, and those from RIP on."""
    bits = _bits(sregs)
    at = _linear(sregs.cs, regs.rip, bits)
    back = min(CODE_BEFORE, at % PAGE, regs.rip)  # not into the page before: it may be anything
    start = _read(vcpu, memory, at - back, back)
    return _lead_in(start, regs.rip - back, bits), _disassemble(_read(vcpu, memory, at, CODE_AFTER), regs.rip, bits)


def _lead_in(data: bytes, address: int, bits: int) -> tuple[Instruction, ...]:
    """The last instructions of `data`, most likely: x86 code can only be read forwards, and from anywhere.

    Each start that leads exactly to the end votes for what is on its way; wrong starts soon meet the right one.
    """
    end = address + len(data)
    votes: dict[int, Counter[Instruction]] = {}  # by where an instruction ends
    for skip in range(len(data)):
        path = _disassemble(data[skip:], address + skip, bits)
        if path and path[-1].end == end:
            for instruction in path:
                votes.setdefault(instruction.end, Counter())[instruction] += 1
    found: list[Instruction] = []
    while end in votes and len(found) < SHOWN_BEFORE:
        found.insert(
            0, max(votes[end], key=lambda instruction: (votes[instruction.end][instruction], len(instruction.data)))
        )
        end = found[0].address
    return tuple(found)


def _disassemble(data: bytes, address: int, bits: int) -> tuple[Instruction, ...]:
    """As many instructions as `data` holds, up to the first that is none."""
    import capstone  # 30 ms, for reports only

    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    found, at = [], 0
    for _, size, mnemonic, operands in capstone.Cs(capstone.CS_ARCH_X86, mode).disasm_lite(data, address):
        found.append(Instruction(address + at, data[at : at + size], f"{mnemonic} {operands}".strip()))
        at += size
    return tuple(found)


def _stack(vcpu: Vcpu, memory: GuestMemory, regs: Regs, sregs: Sregs) -> tuple[int, ...]:
    bits = _bits(sregs)
    size = bits // 8
    rsp = regs.rsp if bits == 64 or sregs.ss.db else regs.rsp & 0xFFFF
    data = _read(vcpu, memory, _linear(sregs.ss, rsp, bits), STACK_WORDS * size)
    return tuple(int.from_bytes(data[at : at + size], "little") for at in range(0, len(data) - size + 1, size))


def _in_tight_loop(rip: int, code: Sequence[Instruction]) -> bool:
    """Whether a jump soon after RIP leads back to it, or to shortly before it, with no call on the way."""
    for instruction in code:
        name, _, target = instruction.text.partition(" ")
        if name.startswith(("call", "ret", "iret", "sysret")):
            return False
        if name.startswith(("j", "loop")) and re.fullmatch("0x[0-9a-f]+|[0-9]", target):  # neither register nor memory
            if rip - TIGHT_LOOP <= int(target, 0) <= rip:
                return True
            if name == "jmp":
                return False
    return False
