"""Hostile guests: what one is, how all are assembled at once, and a machine that runs one and looks at what is left.

A guest is machine code that KVM runs from its first instruction on a whole Machine, with real devices. What it does is
its own affair; what is checked is the host: see `Arena.run`.
"""

from __future__ import annotations

import json
import os
import random
import select
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvmpy
from kvmpy.core.board import Attachable, Reason, Stop
from kvmpy.core.log import BURST, log
from kvmpy.evidence import collect
from kvmpy.remains import gather
from kvmpy.report import facts, render
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.console import VirtioConsole
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.net import Net
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.vsock import Vsock
from kvmpy.x86 import layout, longmode

SECONDS = 30.0  # for what must happen; reached only when something hangs
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

LINES = 4 * BURST  # of the log, from one guest: each event has BURST in a period, and few kinds come together
REPORT_BYTES = 16 << 10  # for people
FACTS_BYTES = 16 << 20  # for programs, with lines of the console whole
PEAK = 48 << 20  # bytes of memory beyond those before: RAM, devices, the report
NORMAL = 5  # every so many hostile guests, a normal one is booted behind them
KEPT = 4 << 20  # of them after the machine has gone

POWER_OFF = bytes.fromhex("ba0006 b034 ee fa f4")  # mov dx,600h; mov al,34h (SLP_EN, S5); out dx,al; cli; hlt

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


class Outcome(NamedTuple):
    """What is known of a guest that has run."""

    stop: Stop
    memory: bytes  # the first 64 KiB of its RAM
    lines: list[str]  # of the log
    console: str


class Arena:
    """Runs hostile guests in this process, with devices made afresh for each."""

    def __init__(self, folder: Path, include: Path, guests: Iterable[Guest], peer: Path) -> None:
        self.folder = folder
        self.endings: Counter[str] = Counter()
        self._binaries = assemble(guests, folder, include)
        self._peer = peer
        self._gates = b"".join(_gate(STUBS if vector < 32 else STUBS + 0x40) for vector in range(256))
        for name, code in (("sector", b"\xeb\xfe"), ("normal", POWER_OFF)):
            (folder / name).write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
        (folder / "disk").write_bytes(b"D" * (1 << 20))
        (folder / "share").mkdir()
        (folder / "share" / "file").write_bytes(b"content")
        for transport in ("mmio", "pci"):  # what is loaded lazily is loaded by the first machines
            self.run(Guest("warm", "", transport=transport, devices=tuple(self.makers())), check=False)

    def makers(self) -> dict[str, Callable[[], Attachable]]:
        return {
            "rng": Rng,
            "blk": lambda: Blk(path=self.folder / "disk", queues=2),
            "net": lambda: Net("socket", path=self._peer),
            "balloon": lambda: Balloon(stats=1),
            "console": lambda: VirtioConsole(ports=2),
            "vsock": Vsock,
            "fs": lambda: Fs(path=self.folder / "share", tag="share"),
        }

    def run(self, guest: Guest, *, check: bool = True) -> Outcome:
        """Run `guest` to its end or until its time is over; then see that the host is as it was before."""
        before = _Host()
        told: list[str] = []
        log._windows, log._logger = {}, _Lines(told)
        outcome = self._run(guest)
        self.endings[outcome.stop.reason.name] += 1
        if check:
            self._check(guest, outcome, before)
        return outcome

    def _run(self, guest: Guest) -> Outcome:
        cpus = 2 if guest.second else 1
        vm = kvmpy.Machine(kernel=self.folder / "sector", mem=f"{RAM >> 20}M", cpus=cpus, transport=guest.transport)
        makers = self.makers()
        for kind in guest.devices:
            vm.add(makers[kind]())
        try:
            vm.start(lambda: self._enter(vm, guest))
            select.select([vm._stop_event], [], [], min(guest.seconds / 4, 0.02))
            with vm.paused() as vcpus:
                assert all(vcpu.regs() for vcpu in vcpus)
            stop = vm.wait(guest.seconds)
            assert all(thread.join(0) for thread in vm.vcpus), "a vCPU's thread is still there"
            _report(vm, stop)
            return Outcome(stop, vm.memory.read(0, 1 << 16), log._logger.lines, vm.console.text)
        finally:
            vm.close()

    def _enter(self, vm: kvmpy.Machine, guest: Guest) -> Callable[[str], None]:
        """The program to memory, the first CPU to its entry; called when the machine is built."""
        memory, vcpu = vm.memory, vm.vcpus[0].vcpu
        sregs, regs = vcpu.sregs(), vcpu.regs()
        if guest.mode == "long":
            longmode.long_mode(sregs, memory)
            memory.write(IDT, self._gates)
            memory.write(STUBS, self._binaries["stubs"])
        elif guest.mode == "protected":
            longmode.protected_mode(sregs, memory)
        for address, data in guest.memory.items():
            memory.write(address, data)
        memory.write(guest.origin, self._binaries.get(guest.name, b"\xf4"))
        if guest.second:
            memory.write(SECOND, self._binaries[second(guest.name)])
        vcpu.set_sregs(sregs)
        regs.rip, regs.rsp = guest.origin, REAL
        vcpu.set_regs(regs)
        return lambda role: None

    def _check(self, guest: Guest, outcome: Outcome, before: _Host) -> None:
        assert outcome.stop.reason in guest.ends, str(outcome.stop)
        assert outcome.stop.cause is None
        assert guest.ends != SERVED or outcome.stop.status == 0, "a device has not served what was as it should be"
        after = _Host()
        assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
        assert after.peak - before.rss < PEAK
        assert after.rss - before.rss < KEPT
        assert len(outcome.lines) <= LINES, outcome.lines[-3:]
        assert all(count <= BURST for count in Counter(map(_event, outcome.lines)).values())
        assert all(len(line) < 1000 for line in outcome.lines)
        assert (self.folder / "disk").stat().st_size == 1 << 20
        if SCALE or self.endings.total() % NORMAL == 0:
            self.run_normal()

    def run_normal(self) -> None:
        """Boot a guest that is well-behaved, in the same process."""
        with kvmpy.Machine(kernel=self.folder / "normal", mem="1M") as vm:
            assert vm.wait(SECONDS).reason is Reason.POWEROFF


def _report(vm: kvmpy.Machine, stop: Stop) -> None:
    """What is told of the machine, in each of the three ways, has an end."""
    evidence = collect(vm, stop)
    assert len(render(evidence)) < REPORT_BYTES
    assert len(json.dumps(facts(evidence))) < FACTS_BYTES
    assert all("state" in cpu for cpu in gather(vm, stop)["vcpus"])


def _event(line: str) -> str:
    return line.partition("{")[0]


class _Host:
    """What this process holds now; makes the kernel begin anew with the peak of its memory."""

    def __init__(self) -> None:
        self.descriptors = sorted(os.listdir("/proc/self/fd"))
        self.threads = sorted(thread.name for thread in threading.enumerate())
        words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.rss, self.peak = (int(words[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")


class _Lines:
    """In the place of a logger: keeps what is logged."""

    def __init__(self, told: list[str]) -> None:
        self.lines = told

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **fields: self.lines.append(f"{level} {event} {fields}")


def _gate(handler: int) -> bytes:
    """A 64-bit interrupt gate (SDM vol. 3A, 6.14.1)."""
    return struct.pack("<HHHHII", handler, longmode.BOOT_CS, 0x8E00, 0, 0, 0)


ECHO = """
import asyncio, sys
async def echo(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def main():
    server = await asyncio.start_unix_server(echo, sys.argv[1])
    print(flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def start_peer(path: Path) -> subprocess.Popen[Any]:
    """A program that sends back what comes through the UNIX socket `path`: the other end of network cards."""
    process = subprocess.Popen([sys.executable, "-c", ECHO, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def engines(guests: Iterable[Guest]) -> list[Any]:
    """Parameters of a test: guests by turns with the compiled twins and without; with SCALE, each with both."""
    found = []
    for number, guest in enumerate(guests):
        for pure in (False, True) if SCALE else (bool(number % 2),):
            found.append(pytest.param(guest, pure, id=f"{guest.name}-{'python' if pure else 'compiled'}"))
    return found
