"""Hostile guests that use the board: ports, MMIO, interrupt controllers and timers, and the devices of a PC."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random

from malice import BUFFERS, RAM, Guest, generator, lines, seeds

from kvmpy.core.board import Reason
from kvmpy.x86 import layout

DEVICES = ("rng", "blk", "net", "balloon", "console", "vsock")
NEXT_PORT = 0x6300  # as MACROS has it
SUFFIX = {1: "b", 2: "w", 4: "l", 8: "q"}
AX = {1: "%al", 2: "%ax", 4: "%eax", 8: "%rax"}

# Where devices answer, and where nothing does; (start, end).
WINDOWS = {
    "boot-timer": (layout.BOOT_TIMER, layout.BOOT_TIMER + 0x1000),
    "virtio-mmio": (layout.MMIO_DEVICES, layout.MMIO_DEVICES + 0x6000),
    "behind-virtio-mmio": (layout.MMIO_DEVICES + 0x6000, layout.MMIO_DEVICES + 0x8000),
    "ecam": (layout.PCI_ECAM, layout.PCI_ECAM + layout.PCI_ECAM_SIZE),
    "functions": (layout.PCI_ECAM + 0x8000, layout.PCI_ECAM + 0xF000),
    "bars": (layout.PCI_WINDOW, layout.PCI_WINDOW + 6 * 0x8000),
    "window-end": (layout.PCI_WINDOW_END - 0x1000, layout.PCI_WINDOW_END + 0x1000),
    "ioapic": (layout.IOAPIC - 0x100, layout.IOAPIC + 0x1100),
    "hpet": (0xFED00000, 0xFED01000),
    "lapic": (layout.LAPIC, layout.LAPIC + 0x1000),
    "tss-pages": (layout.KVM_IDENTITY_MAP, layout.KVM_TSS + 0x3000),
    "top": (0xFFFFE000, 0xFFFFFFF8),
    "end-of-ram": (RAM - 0x1000, RAM + 0x1000),
    "hole": (layout.HOLE + 0x1000, layout.MMIO_DEVICES),
}


def access(random: Random, start: int, end: int) -> str:
    """One access of any width in [start, end), often at a page's edge: a move, or one that reads and writes."""
    at = random.randrange(start, end)
    if random.random() < 0.3:
        at = (at & ~0xFFF) + random.choice([0, 0xFFC, 0xFFD, 0xFFE, 0xFFF, 0x1000 - 7])
    elif random.random() < 0.6:
        at &= ~7
    size = random.choice([1, 2, 4, 4, 4, 8])
    value = random.choice([0, 1, 0xFF, 0xFFFFFFFF, random.getrandbits(32)])
    into, out = f"mov (%rdi), {AX[size]}", f"mov {AX[size]}, (%rdi)"
    verb = random.choice([into, into, out, out, out, f"xchg {AX[size]}, (%rdi)", f"or{SUFFIX[size]} $1, (%rdi)", "rep"])
    if verb == "rep":
        other = random.choice(["mov %rdi, %rsi", f"mov ${BUFFERS}, %esi"])
        count = random.choice([0, 1, 3, 64])
        exchange = random.choice(["", "xchg %rsi, %rdi"])
        verb = f"{other}\n{exchange}\nmov ${count}, %ecx\n{random.choice(['cld', 'std'])}\nrep movs{SUFFIX[size]}"
        return f"mov ${at:#x}, %edi\nlea 1f(%rip), %r15\n{verb}\n1: cld"
    return f"mov ${at:#x}, %edi\nmov ${value:#x}, %eax\ntry {verb}"


def windows() -> Iterator[Guest]:
    """Accesses at random, all over one window, and from one to the other."""
    for transport in ("mmio", "pci"):
        for name, (start, end) in WINDOWS.items():
            for seed in seeds(2):
                random = generator(f"{name} {transport}", seed)
                code = "long_mode\n" + lines(access(random, start, end) for _ in range(300)) + "\ndone"
                yield Guest(
                    f"window-{name}-{transport}-{seed}", code, transport=transport, devices=DEVICES, seconds=0.2
                )
        for seed in seeds(4):
            random = generator(f"everywhere {transport}", seed)
            places = list(WINDOWS.values())
            code = "long_mode\n" + lines(access(random, *random.choice(places)) for _ in range(400)) + "\ndone"
            yield Guest(f"everywhere-{transport}-{seed}", code, transport=transport, devices=DEVICES, seconds=0.2)


def registers() -> Iterator[Guest]:
    """Every byte where devices answer is read and written at every width, so that all of what is remembered is."""
    for transport, names in (("mmio", ["boot-timer", "virtio-mmio"]), ("pci", ["functions", "bars"])):
        code = ["long_mode"]
        for start, end in (WINDOWS[name] for name in names):
            end = min(end, start + 0x6000)
            accesses = lines(f"try mov (%rdi), {AX[size]}\ntry mov {AX[size]}, (%rdi)" for size in (1, 2, 4))
            code += [f"mov ${start:#x}, %edi", f"1: {accesses}", "inc %edi", f"cmp ${end:#x}, %edi", "jb 1b"]
        yield Guest(
            f"every-register-{transport}", lines(code) + "\ndone", transport=transport, devices=DEVICES, seconds=90
        )


STRING_PORTS = [0x3F8, 0x402, 0xE9, 0x80, 0x60, 0x71, 0x5E0, 0xCF8, 0xCFC, 0x20, 0x40, 0x43]


def strings() -> Iterator[Guest]:
    """`rep ins` and `rep outs` with hostile counts, backwards, from and to where no RAM is."""
    for seed in seeds(24):
        random = generator("strings", seed)
        code = ["long_mode"]
        for _ in range(6):
            port = random.choice(STRING_PORTS)
            size = random.choice("bwl")
            count = random.choice([0, 1, 4095, 4096, 4097, 0x7FFFFFFF, -1])
            places = [
                BUFFERS,
                BUFFERS - 1,
                RAM - 8,
                RAM,
                layout.MMIO_DEVICES,
                layout.LAPIC,
                layout.HOLE - 2,
                0xFFFFFFFC,
                0,
                0x9000,
            ]
            place = random.choice([*places, 1 << 47, (1 << 64) - 4])
            instruction = random.choice([f"rep ins{size}", f"rep outs{size}"])
            code.append(f"mov ${port}, %dx\nmovabs ${place:#x}, %rdi\nmov %rdi, %rsi\nmov ${count}, %rcx")
            code.append(f"{random.choice(['cld', 'std', 'cld'])}\nlea 1f(%rip), %r15\n{instruction}\n1: cld")
        yield Guest(f"strings-{seed}", lines(code) + "\ndone", devices=("rng",))
    for seed in seeds(4):
        random = generator("real strings", seed)
        count, at = random.choice([0xFFFF, 0x8000, 3]), random.choice([0xFFFF, 0xFFFE, 0])
        size, order = random.choice("bwl"), random.choice(["cld", "std"])
        real = f"mov ${seed}, %bp\nmov $0xf000, %ax\nmov %ax, %es\nmov %ax, %ds\n{order}\nmov ${count}, %cx\nmov ${at}, %di\nmov ${at}, %si\nmov $0x3f8, %dx"
        yield Guest(f"strings-real-{seed}", f"{real}\nrep {('ins', 'outs')[seed % 2]}{size}\n1: jmp 1b", "real")


JUNK_PORTS = {
    "serial": [*range(0x3F8, 0x400)], "i8042": [0x60, 0x61, 0x64], "cmos": [0x70, 0x71], "pic": [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1],
    "pit": [0x40, 0x41, 0x42, 0x43, 0x61], "acpi": [0x600, 0x601, 0x603, 0x604], "pci": [*range(0xCF8, 0xD00)],
}  # fmt: skip


def junk() -> Iterator[Guest]:
    """Any values, widths and order, to one chip of the PC; and output without end."""
    for chip, ports in JUNK_PORTS.items():
        for seed in seeds(4):
            random = generator(chip, seed)
            code = ["long_mode", "sti" if seed % 2 else "cli", "lea 9f(%rip), %r15"]
            for _ in range(600):
                size = random.choice([1, 1, 1, 1, 2, 4])
                code.append(f"mov ${random.choice(ports)}, %dx")
                if random.random() < 0.5:
                    code.append(f"in %dx, {AX[size]}")
                else:
                    code.append(
                        f"mov ${random.choice([random.getrandbits(32), random.getrandbits(4)])}, %eax\nout {AX[size]}, %dx"
                    )
            yield Guest(f"junk-{chip}-{seed}", lines(code) + "\n9: done", seconds=0.2)
    for port in (0x3F8, 0xE9, 0x402):
        loop = f"mov ${port}, %dx\n1: mov $4096, %ecx\nmov ${BUFFERS}, %esi\nrep outsb\njmp 1b"
        yield Guest(
            f"prints-without-end-{port:x}",
            loop,
            memory={BUFFERS: bytes(range(256)) * 16},
            seconds=0.4,
            ends=frozenset({Reason.TIMEOUT}),
        )
        yield Guest(
            f"prints-bytes-{port:x}",
            f"mov ${port}, %dx\n1: inc %al\nout %al, %dx\njmp 1b",
            ends=frozenset({Reason.TIMEOUT}),
        )
    loopback = "mov $0x3fc, %dx\nmov $0x10, %al\nout %al, %dx\nmov $0x3f8, %dx\n1: out %al, %dx\njmp 1b"
    yield Guest("serial-loopback-without-end", loopback, ends=frozenset({Reason.TIMEOUT}))
    yield Guest("panics-again-and-again", "mov $0x505, %dx\n1: mov $3, %al\nout %al, %dx\njmp 1b")
    panic = b"Kernel panic - not syncing: " + b"\x1b[2J\x00\xff%s{}" * 2000
    for reset in ("mov $0xfe, %al\nout %al, $0x64", "mov $6, %al\nmov $0xcf9, %dx\nout %al, %dx"):
        text = f"mov $0x3f8, %dx\nmov ${BUFFERS}, %esi\nmov ${len(panic)}, %ecx\nrep outsb\n{reset}\ncli\nhlt"
        yield Guest(
            f"panic-text-{len(reset)}", text, memory={BUFFERS: panic}, seconds=30, ends=frozenset({Reason.PANIC})
        )


COMMANDS = {"nmi": 0x400, "smi": 0x200, "init": 0x500, "init-level": 0x8500, "sipi-0": 0x600, "sipi-7": 0x607, "sipi-ff": 0x6FF, "lowest": 0x100, "extint": 0x700, "vector-0": 0, "vector-80": 0x80, "reserved": 0x300}  # fmt: skip
TO = {"self": 0x40000, "all": 0x80000, "others": 0xC0000, "nobody": 0}


def interrupts() -> Iterator[Guest]:
    """Interrupts of every kind to every CPU, storms of them, and controllers with junk in them."""
    for command, value in COMMANDS.items():
        for to, shorthand in TO.items():
            send = f"w4 {layout.LAPIC + 0x310:#x}, 0xff000000\nw4 {layout.LAPIC + 0x300:#x}, {value | shorthand:#x}"
            yield Guest(
                f"ipi-{command}-to-{to}",
                f"long_mode\nsti\nmov $200, %ebp\n1: {send}\ndec %ebp\njnz 1b\ndone",
                second=AWAKE,
            )
    yield Guest(
        "lapic-timer-storm",
        f"long_mode\nw4 {layout.LAPIC + 0x3E0:#x}, 0xb\nw4 {layout.LAPIC + 0x320:#x}, 0x20040\nw4 {layout.LAPIC + 0x380:#x}, 1\nsti\n1: hlt\njmp 1b",
    )
    pit = "mov $0x34, %al\nout %al, $0x43\nmov $1, %al\nout %al, $0x40\nmov $0, %al\nout %al, $0x40"
    route = f"w4 {layout.IOAPIC:#x}, 0x14\nw4 {layout.IOAPIC + 0x10:#x}, 0x41\nw4 {layout.IOAPIC:#x}, 0x10\nw4 {layout.IOAPIC + 0x10:#x}, 0x42"
    yield Guest("pit-storm", f"long_mode\n{route}\n{pit}\nsti\n1: jmp 1b")
    uart = "mov $0x3f9, %dx\nmov $2, %al\nout %al, %dx\nmov $0x3fc, %dx\nmov $8, %al\nout %al, %dx"
    level = f"w4 {layout.IOAPIC:#x}, 0x18\nw4 {layout.IOAPIC + 0x10:#x}, 0x8043"
    yield Guest("uart-level-storm", f"long_mode\n{level}\n{uart}\nsti\n1: jmp 1b")
    toggle = f"long_mode\n{level}\n{uart}\nsti\n1: w4 {layout.IOAPIC + 0x10:#x}, 0x18043\nw4 {layout.IOAPIC + 0x10:#x}, 0x8043\njmp 1b"
    yield Guest("masks-and-unmasks", toggle)
    yield Guest("eoi-storm", f"long_mode\n1: w4 {layout.LAPIC + 0xB0:#x}, 0\njmp 1b")
    for base in (0, BUFFERS, layout.MMIO_DEVICES, layout.IOAPIC, 0xFFFFF000):
        move = f"mov $0x1b, %ecx\nmov ${base | 0x900:#x}, %eax\nxor %edx, %edx\ntry wrmsr\nmov ${base:#x}, %edi\nmov $64, %ecx\nlea 1f(%rip), %r15\nrep stosl\n1: done"
        yield Guest(f"lapic-moved-to-{base:x}", f"long_mode\n{move}", devices=("rng",))
    x2apic = "mov $0x1b, %ecx\nmov $0xfee00d00, %eax\nxor %edx, %edx\ntry wrmsr\nmov $0x800, %esi\n1: mov %esi, %ecx\nmov $-1, %eax\nxor %edx, %edx\ntry wrmsr\ninc %esi\ncmp $0x840, %esi\njne 1b\ndone"
    yield Guest("x2apic-junk", f"long_mode\n{x2apic}")
    for seed in seeds(6):
        random = generator("controllers", seed)
        code = ["long_mode", "sti"]
        for _ in range(300):
            value = random.choice(
                [
                    random.getrandbits(32),
                    random.getrandbits(8),
                    random.choice([0x400, 0x200, 0x700]) | random.getrandbits(17) & ~0x700,
                ]
            )
            if random.random() < 0.6:
                code.append(
                    f"w4 {layout.IOAPIC:#x}, {random.randrange(0x40):#x}\nw4 {layout.IOAPIC + 0x10:#x}, {value:#x}"
                )
            else:
                code.append(f"w4 {layout.LAPIC + random.randrange(0x40) * 16:#x}, {value:#x}")
        yield Guest(f"controllers-{seed}", lines(code) + "\ndone", seconds=0.2)


AWAKE = "1: sti\nhlt\njmp 1b"  # what CPU 1 does, if it is started at SECOND


def sweep(verb: str, size: int, value: int) -> Guest:
    """One access to each port of a `part`; tells at NEXT_PORT which one comes next, before it comes."""
    string = SUFFIX[size]
    body = {
        "in": f"in %dx, {AX[size]}",
        "out": f"mov ${value:#x}, %eax\nout {AX[size]}, %dx",
        "ins": f"mov $3, %ecx\nmov ${BUFFERS}, %edi\nrep ins{string}",
        "outs": f"mov $3, %ecx\nmov ${BUFFERS}, %esi\nrep outs{string}",
    }[verb]
    loop = f"mov FIRST, %ebx\n1: mov %ebx, NEXT_PORT\nmov %ebx, %edx\n{body}\nadd STRIDE, %ebx\ncmp LAST, %ebx\njb 1b"
    end = "movl $0x10000, NEXT_PORT\ncli\nhlt"
    return Guest(f"{verb}-{size}-{value:x}", f"long_mode\n{loop}\n{end}", seconds=90)


def part(guest: Guest, value: int, first: int, last: int, stride: int) -> Guest:
    """The sweep from port `first` to before `last`."""
    return guest._replace(
        memory={BUFFERS: struct.pack("<I", value) * 4, NEXT_PORT: struct.pack("<IIII", 0, first, last, stride)}
    )
