"""Hostile guests that are drivers of virtio devices: chains, storms of kicks, and what a second CPU changes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from malice import RAM, RINGS, SCALE, Guest, generator, lines, seeds
from malice_driver import (
    HEADERS,
    QUEUES,
    RANDOM,
    SIZE,
    Device,
    chains,
    driver,
    repeat,
    ring,
)

from kvmpy.virtio.pci import TABLE
from kvmpy.x86 import layout

TRANSPORTS = ("mmio", "pci")


def transports(number: int) -> tuple[str, ...]:
    """One of them by turns; with SCALE, both."""
    return TRANSPORTS if SCALE else (TRANSPORTS[number % 2],)


def _serve_again(device: Device) -> str:
    """Kick all queues and make their rings' entries available once more; set up anew a device that wants it."""
    kicks = [device.kick(queue) for queue in range(QUEUES[device.kind])]
    kicks += [f"addw $3, {ring(queue) + 0x102:#x}" for queue in range(QUEUES[device.kind])]
    look = (
        f"mov ${device.base + 0x14:#x}, %rdi\nmov (%rdi), %al"
        if device.pci
        else f"mov ${device.base + 0x70:#x}, %rdi\nmov (%rdi), %eax"
    )
    return lines([*kicks, look, "test $0x40, %al", "jz 4f", device.all_up(), "4:"])


def random_chains() -> Iterator[Guest]:
    """Chains at random, served again and again."""
    for number, kind in enumerate(QUEUES):
        for seed in seeds(4):
            for transport in transports(number + seed):
                random = generator(f"chains {kind}", seed)
                memory: dict[int, bytes] = {}
                for queue in range(QUEUES[kind]):
                    memory |= chains(kind, queue, random, random.choice([0.05, 0.3]))
                yield driver(
                    f"chains-{kind}-{seed}", kind, transport, repeat(40, _serve_again(Device(kind, transport))), memory
                )


# What a second CPU does to the rings of the first one: in r9 is a random number, in r10 one of the device's queues.
TRICKS = {
    "anything": f"and $0x17ff, %r9d\nmov %r8b, {RINGS:#x}(%r9)",
    "lengths": f"and ${SIZE - 1}, %r9d\nshl $4, %r9d\nmov %r8d, {RINGS + 8:#x}(%r9, %r10)",
    "addresses": f"and ${SIZE - 1}, %r9d\nshl $4, %r9d\nmov %r8d, %r11d\nand $0xfffff, %r11d\nadd ${RAM - 0x80000:#x}, %r11d\nmov %r11, {RINGS:#x}(%r9, %r10)",
    "mmio-addresses": f"and ${SIZE - 1}, %r9d\nshl $4, %r9d\nmovl ${layout.MMIO_DEVICES:#x}, {RINGS:#x}(%r9, %r10)",
    "flags": f"and ${SIZE - 1}, %r9d\nshl $4, %r9d\nmov %r8w, {RINGS + 12:#x}(%r9, %r10)",
    "links": f"and ${SIZE - 1}, %r9d\nshl $4, %r9d\nmov %r8w, %r11w\nand $9, %r11d\nmov %r11w, {RINGS + 14:#x}(%r9, %r10)",
    "heads": f"and ${SIZE - 1}, %r9d\nmov %r8w, {RINGS + 0x104:#x}(%r10, %r9, 2)",
    "index": f"incw {RINGS + 0x102:#x}(%r10)",
    "index-jumps": f"mov %r8w, {RINGS + 0x102:#x}(%r10)",
    "used": f"and $0x3f, %r9d\nmov %r8w, {RINGS + 0x200:#x}(%r10, %r9)",
    "headers": f"and $0x7ff, %r9d\nmov %r8b, {HEADERS:#x}(%r9)",
}  # fmt: skip


def races() -> Iterator[Guest]:
    """A second CPU changes descriptors, rings and headers while the device works."""
    for number, kind in enumerate(QUEUES):
        for count, (trick, code) in enumerate(TRICKS.items()):
            for transport in transports(number + count):
                random = generator(f"race {kind}", 0)
                memory: dict[int, bytes] = {}
                for queue in range(QUEUES[kind]):
                    memory |= chains(kind, queue, random, 0)
                pick = f"mov %r9d, %r10d\nshr $8, %r10d\nand ${_mask(QUEUES[kind])}, %r10d\nshl $10, %r10d"
                second = repeat(1500, f"{RANDOM}\n{pick}\n{code}")
                body = repeat(30, _serve_again(Device(kind, transport)))
                yield driver(f"race-{kind}-{trick}", kind, transport, body, memory, second=second)


def _mask(count: int) -> int:
    """A mask that gives numbers of queues, not all perhaps."""
    return (1 << count.bit_length() - 1) - 1


def storms() -> Iterator[Guest]:
    """Two CPUs that kick, reset and set up a device as fast as they can, with values of all kinds."""
    for number, kind in enumerate(QUEUES):
        for count, transport in enumerate(TRANSPORTS):
            if not SCALE and (number + count) % 2:
                continue
            device = Device(kind, transport)
            random = generator(f"storm {kind}", 0)
            memory: dict[int, bytes] = {}
            for queue in range(QUEUES[kind]):
                memory |= chains(kind, queue, random, 0)
            kicks = lines(device.kick(queue) for queue in range(QUEUES[kind]))
            odd = lines(
                device.kick(queue, value) for queue, value in ((0, 0xFFFF), (1, 5), (7, 0x80000000), (63, 0xFFFFFFFF))
            )
            late = lines(
                [
                    device.select(0),
                    device.size(0),
                    device.size(0xFFFF),
                    device.ready(0),
                    device.ready(2),
                    device.rings(RAM, 3, 1),
                    device.select(0xFFFF),
                    device.size(1),
                    device.ready(1),
                ]
            )
            reset = lines([device.status(0), device.all_up()])
            status = lines(device.status(value) for value in (0xFF, 0x80, 0x4, 0xF, 0x40, 0x8F))
            features = lines(device.feature(half, 0xFFFFFFFF) for half in (0, 1, 2, 0xFFFFFFFF))
            config = lines(
                f"{width} {device.base + (0x2000 if device.pci else 0x100) + at:#x}, 0x7f"
                for at in (0, 1, 4, 8, 0xEF8)
                for width in ("w1", "w2", "w4")
            )
            for name, first, second in (
                ("kicks", kicks, kicks),
                ("odd-kicks", odd, odd),
                ("kicks-and-resets", kicks, reset),
                ("resets", reset, reset),
                ("set-up-late", kicks, late),
                ("status", status, kicks),
                ("features", lines([features, reset]), kicks),
                ("config", config, kicks),
            ):
                yield driver(
                    f"storm-{kind}-{name}", kind, transport, repeat(60, first), memory, second=repeat(60, second)
                )


def buses() -> Iterator[Guest]:
    """BARs moved onto RAM, onto each other and away while a queue is kicked, and messages that go anywhere."""
    first, other = Device("rng", "pci"), Device("blk", "pci", 1)
    memory = chains("rng", 0, generator("bus", 0), 0)
    for name, low, high in (
        ("ram", 0x100000, 0),
        ("other-bar", other.base, 0),
        ("half-of-other-bar", other.base - 0x4000, 0),
        ("ioapic", layout.IOAPIC, 0),
        ("lapic", layout.LAPIC & ~0x7FFF, 0),
        ("ecam", layout.PCI_ECAM, 0),
        ("behind-window", layout.PCI_WINDOW_END, 0),
        ("zero", 0, 0),
        ("ones", 0xFFFFFFFF, 0xFFFFFFFF),
        ("high", 0xE1000000, 1),
        ("non-canonical", 0, 0x80000000),
    ):
        move = f"w4 {first.function + 0x10:#x}, {low:#x}\nw4 {first.function + 0x14:#x}, {high:#x}"
        back = f"w4 {first.function + 0x14:#x}, 0\nw4 {first.function + 0x10:#x}, {first.base:#x}"
        body = repeat(12, f"{move}\n{first.kick(0)}\n{back}\n{first.kick(0)}")
        yield driver(
            f"bar-onto-{name}", "rng", "pci", body, memory, devices=("rng", "blk"), second=repeat(40, first.kick(0))
        )
    swap = f"w2 {first.function + 4:#x}, 0\n{first.kick(0)}\nw2 {first.function + 4:#x}, 6"
    yield driver("bar-on-and-off", "rng", "pci", repeat(30, swap), memory, second=repeat(200, first.kick(0)))
    addresses = (
        layout.LAPIC,
        layout.LAPIC + 0xFF000,
        0,
        RAM,
        layout.MMIO_DEVICES,
        0xFEF00000,
        0xFFFFFFFC,
        layout.IOAPIC,
    )
    for address in addresses:
        for data in (0x41, 0x400, 0x200, 0x500, 0x600 | 8, 0x700, 0xFFFFFFFF):
            if not SCALE and (address >> 12 ^ data >> 8) % 3:
                continue
            entries = lines(
                f"w4 {first.base + TABLE + 16 * vector:#x}, {address:#x}\nw4 {first.base + TABLE + 16 * vector + 8:#x}, {data:#x}\nw4 {first.base + TABLE + 16 * vector + 12:#x}, 0"
                for vector in (0, 1, 2, 255)
            )
            body = f"{_msix_on(first)}\nw2 {first.base + 0x10:#x}, 0\nw2 {first.base + 0x1A:#x}, 1\n{entries}\n{repeat(20, first.kick(0))}"
            yield _no_promise(driver(f"message-{address:x}-{data:x}", "rng", "pci", body, memory))
    for seed in seeds(6):
        random = generator("functions", seed)
        writes = lines(
            f"{random.choice(['w1', 'w2', 'w4'])} {random.choice([first, other]).function + random.randrange(0x104):#x}, {random.choice([0, 0xFF, random.getrandbits(8)])}"
            for _ in range(300)
        )
        yield Guest(
            f"functions-{seed}-pci",
            f"long_mode\n{first.all_up()}\n{writes}\n{first.kick(0)}\ndone",
            transport="pci",
            devices=("rng", "blk"),
            memory=memory,
        )
    through = lines(
        f"w4 {first.function + at + 8:#x}, {offset:#x}\nw4 {first.function + at + 12:#x}, {size:#x}\nw4 {first.function + at + 16:#x}, -1\nmov {0:#x}, %rbx"
        for at in range(0x40, 0xC0, 4)
        for offset, size in ((0x14, 1), (0x7FFF, 4), (0xFFFFFFFF, 4), (0x3000, 2), (0, 0x80000000))
    )
    yield Guest(
        "window-in-configuration-space-pci",
        f"long_mode\n{first.all_up()}\n{through}\ndone",
        transport="pci",
        devices=("rng",),
        memory=memory,
    )


def _msix_on(device: Device) -> str:
    """Set the enable bit of each capability that could be MSI-X: no harm to others."""
    return f"""
        mov     ${device.function:#x}, %rdi
        movzbl  0x34(%rdi), %ecx
        5: movzbl (%rdi, %rcx), %eax
        cmp     $0x11, %eax
        je      6f
        movzbl  1(%rdi, %rcx), %ecx
        jmp     5b
        6: movw $0x8000, 2(%rdi, %rcx)
    """


def _no_promise(guest: Guest) -> Guest:
    """A message may stop the CPU that made it: an INIT, or an NMI without a handler."""
    return guest._replace(ends=Guest._field_defaults["ends"], seconds=0.2)
