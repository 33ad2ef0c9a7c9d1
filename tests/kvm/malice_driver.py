"""What drivers of virtio devices among hostile guests are made from: registers, rings, requests, a second CPU in long mode.

A driver sets its device up with rings at RINGS, does what it does, and then sets it up again with rings at GOOD and makes
one request as it should be: its status is 0 when that is served, so that is what its machine has to end with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from random import Random

from malice import BUFFERS, RAM, RINGS, SECOND, SERVED, Guest, lines

from kvmpy.virtio.pci import BAR_SIZE, NOTIFY
from kvmpy.x86 import layout

SIZE = 8  # of each queue
QUEUES = {"rng": 1, "blk": 2, "net": 2, "balloon": 4, "console": 6, "vsock": 3, "fs": 2}
# Feature bits below 32 that are accepted: INDIRECT_DESC, and those of the device that make it do more.
INDIRECT = 1 << 28
FEATURES = {
    "rng": 0,
    "blk": 1 << 9 | 1 << 13 | 1 << 14,
    "net": 0,
    "balloon": 1 << 1 | 1 << 5,
    "console": 1 << 1,
    "vsock": 0,
    "fs": 0,
}
HEADERS = RINGS + 0x8000  # what devices read, 128 bytes for each buffer
GOOD = 0x300000  # a queue of one request, and its buffers
GOOD_BUFFERS = GOOD + 0x1000
STOPPED = 0x6310  # the second CPU says here that it has done its work

NEXT, WRITE, TABLE = 1, 2, 4  # descriptor flags
GONE = [RAM, RAM - 8, layout.HOLE, layout.MMIO_DEVICES, layout.PCI_WINDOW, layout.IOAPIC, layout.LAPIC, 0xFFFFF000, 1 << 32, 1 << 47, (1 << 64) - 0x1000]  # fmt: skip

Buffer = tuple[bytes | None, int]  # content, or None for what the device may write; and size


def read(data: bytes) -> Buffer:
    return data, len(data)


def write(size: int) -> Buffer:
    return None, size


VSOCK_RST = struct.pack("<QQIIIHHIII", 3, 2, 1024, 1024, 0, 1, 3, 0, 0, 0)
# A request that each device serves at once: the queue, and its buffers.
REQUESTS: dict[str, tuple[int, list[Buffer]]] = {
    "rng": (0, [write(64)]),
    "blk": (0, [read(struct.pack("<IIQ", 0, 0, 0)), write(512), write(1)]),
    "net": (1, [read(bytes(12) + bytes(60))]),
    "balloon": (0, [read(struct.pack("<I", 0x3C0))]),
    "console": (1, [read(b"text")]),
    "vsock": (1, [read(VSOCK_RST)]),
    "fs": (
        1,
        [read(struct.pack("<IIQQIIII", 56, 26, 1, 0, 0, 0, 0, 0) + struct.pack("<IIII", 7, 31, 65536, 0)), write(80)],
    ),
}


class Device:
    """The registers of device `number` of a machine, as code that writes them."""

    def __init__(self, kind: str, transport: str, number: int = 0) -> None:
        self.kind, self.transport = kind, transport
        self.pci = transport == "pci"
        self.base = layout.PCI_WINDOW + number * BAR_SIZE if self.pci else layout.MMIO_DEVICES + number * 0x1000
        self.function = layout.PCI_ECAM + 0x8000 + number * 0x1000

    def status(self, value: int) -> str:
        return f"w1 {self.base + 0x14:#x}, {value}" if self.pci else f"w4 {self.base + 0x70:#x}, {value}"

    def kick(self, queue: int, value: int | None = None) -> str:
        value = queue if value is None else value
        if self.pci:
            return f"w2 {self.base + NOTIFY + 4 * queue:#x}, {value & 0xFFFF:#x}"
        return f"w4 {self.base + 0x50:#x}, {value:#x}"

    def select(self, queue: int) -> str:
        return f"w2 {self.base + 0x16:#x}, {queue:#x}" if self.pci else f"w4 {self.base + 0x30:#x}, {queue:#x}"

    def size(self, value: int) -> str:
        return f"w2 {self.base + 0x18:#x}, {value:#x}" if self.pci else f"w4 {self.base + 0x38:#x}, {value:#x}"

    def ready(self, value: int) -> str:
        return f"w2 {self.base + 0x1C:#x}, {value:#x}" if self.pci else f"w4 {self.base + 0x44:#x}, {value:#x}"

    def rings(self, desc: int, avail: int, used: int) -> str:
        start, step = (0x20, 8) if self.pci else (0x80, 16)
        return lines(
            f"w4 {self.base + start + step * n + 4 * half:#x}, {address >> 32 * half & 0xFFFFFFFF:#x}"
            for n, address in enumerate((desc, avail, used))
            for half in (0, 1)
        )

    def feature(self, half: int, value: int) -> str:
        select, accept = (0x08, 0x0C) if self.pci else (0x24, 0x20)
        return f"w4 {self.base + select:#x}, {half}\nw4 {self.base + accept:#x}, {value:#x}"

    def up(self, queues: Iterable[tuple[int, int]], features: int | None = None) -> str:
        """From reset to DRIVER_OK, with the rings of each (queue, address) there."""
        chosen = FEATURES[self.kind] | INDIRECT if features is None else features
        code = [f"w2 {self.function + 4:#x}, 6" if self.pci else ""]
        code += [self.status(value) for value in (0, 1, 3)]
        code += [self.feature(0, chosen), self.feature(1, 1), self.status(0xB)]
        for queue, at in queues:
            code += [self.select(queue), self.size(SIZE), self.rings(at, at + 0x100, at + 0x200), self.ready(1)]
        return lines([*code, self.status(0xF)])

    def all_up(self) -> str:
        return self.up((queue, ring(queue)) for queue in range(QUEUES[self.kind]))


def ring(queue: int) -> int:
    return RINGS + 0x400 * queue


def descriptor(address: int, size: int, flags: int = 0, following: int = 0) -> bytes:
    return struct.pack("<QIHH", address & (1 << 64) - 1, size & 0xFFFFFFFF, flags & 0xFFFF, following & 0xFFFF)


def available(*heads: int, index: int | None = None) -> bytes:
    """An available ring with these heads, and `index` in it: as many, if nothing is said."""
    entries = [*heads, *([0] * (SIZE - len(heads)))]
    return struct.pack(f"<HH{SIZE}HH", 0, (len(heads) if index is None else index) & 0xFFFF, *entries, 0)


def queue_memory(at: int, descriptors: Sequence[bytes], avail: bytes) -> dict[int, bytes]:
    return {at: b"".join(descriptors).ljust(16 * SIZE, b"\0"), at + 0x100: avail, at + 0x200: bytes(6 + 8 * SIZE)}


def good(kind: str) -> dict[int, bytes]:
    """The memory of the request as it should be."""
    _, buffers = REQUESTS[kind]
    memory, descriptors = {}, []
    for n, (data, size) in enumerate(buffers):
        at = GOOD_BUFFERS + 0x400 * n
        memory[at] = data if data is not None else bytes(size)
        flags = (WRITE if data is None else 0) | (NEXT if n + 1 < len(buffers) else 0)
        descriptors.append(descriptor(at, size, flags, n + 1))
    return memory | queue_memory(GOOD, descriptors, available(0))


def driver(
    name: str,
    kind: str,
    transport: str,
    body: str,
    memory: dict[int, bytes],
    *,
    before: str | None = None,
    second: str = "",
    devices: tuple[str, ...] = (),
) -> Guest:
    """A guest that sets its device up (or does what is `before`), does `body`, and then wants to be served."""
    device = Device(kind, transport)
    queue, _ = REQUESTS[kind]
    wait = f"mov $5000000, %ecx\n1: in $0x80, %al\ncmpw $1, {GOOD + 0x202:#x}\nje 2f\ndec %ecx\njnz 1b\n2: "
    stop = "mov $0x502, %dx\nxor %eax, %eax\ntest %ecx, %ecx\nsetz %al\nout %al, %dx\ncli\nhlt"
    parts = ["long_mode", device.all_up() if before is None else before, start(second), body, join(second)]
    parts += [device.up([(queue, GOOD)]), device.kick(queue), wait + stop]
    return Guest(
        f"{name}-{transport}",
        lines(parts),
        transport=transport,
        second=to_long_mode(second) if second else "",
        devices=devices or (kind,),
        memory=memory | good(kind),
        seconds=30,
        ends=SERVED,
    )


# The second CPU.


def start(second: str) -> str:
    init, sipi = f"w4 {layout.LAPIC + 0x310:#x}, 0x01000000\nw4 {layout.LAPIC + 0x300:#x}, ", 0x600 | SECOND >> 12
    return f"{init} 0x4500\n{init} {sipi:#x}" if second else ""


def join(second: str) -> str:
    """Until the second CPU has done its work."""
    return f"1: in $0x80, %al\ncmpl $1, {STOPPED:#x}\njne 1b" if second else ""


def to_long_mode(code: str) -> str:
    """Code for the second CPU, which begins in real mode at SECOND; it is to fall through to its end."""
    return f"""
        9999: cli
        xor     %ax, %ax
        mov     %ax, %ds
        lgdtl   0x6110
        mov     $0x20, %eax
        mov     %eax, %cr4
        mov     ${layout.PAGE_TABLES}, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80000001, %eax
        mov     %eax, %cr0
        .byte   0x66, 0xea
        .long   {SECOND} + 9998f - 9999b
        .word   0x10
        .code64
        9998: mov $0x18, %eax
        mov     %eax, %ds
        mov     %eax, %ss
        mov     $0x7f00, %esp
        {code}
        movl    $1, {STOPPED:#x}
        9997: hlt
        jmp     9997b
    """


def repeat(times: int, code: str) -> str:
    return f"mov ${times}, %ebp\n3: {code}\ndec %ebp\njnz 3b"


RANDOM = "imul $1103515245, %r8, %r8\nadd $12345, %r8\nmov %r8, %r9\nshr $16, %r9"  # in r9; r8 is its state


# Chains at random: as they should be for the most part.


def requests(kind: str, queue: int, random: Random) -> list[Buffer]:
    """What a driver might put into the queue."""
    some = random.choice([0, 1, 12, 44, 60, 512, 4096])
    if kind == "blk":
        header = struct.pack(
            "<IIQ", random.choice([0, 0, 1, 4, 8, 11, 13, 99]), 0, random.choice([0, 5, 2047, 2048, 1 << 63])
        )
        data = random.choice(
            [write(512), read(bytes(512)), read(struct.pack("<QII", 0, 8, random.choice([0, 1, 2]))), write(20)]
        )
        return [read(header), data, write(1)]
    if kind == "vsock" and queue == 1:
        op, size = random.choice([1, 2, 3, 4, 5, 6, 7, 99]), random.choice([0, 0, 16, 1 << 31])
        return [
            read(
                struct.pack(
                    "<QQIIIHHIII", random.choice([3, 3, 9]), 2, 1, 2, size, random.choice([1, 1, 2]), op, 3, 0, 1
                )
            ),
            read(bytes(16)),
        ]
    if kind == "console" and queue == 3:
        return [
            read(
                struct.pack(
                    "<IHH", random.choice([0, 1, 2, 1 << 31]), random.choice([0, 3, 6, 99]), random.choice([0, 1])
                )
            )
        ]
    if kind == "fs":
        op = random.choice([1, 3, 14, 15, 16, 22, 26, 27, 28, 44, 38, 4096])
        return [read(struct.pack("<IIQQIIII", 40 + 40, op, 1, 1, 0, 0, 0, 0) + random.randbytes(40)), write(some)]
    if kind == "balloon":
        return [write(4096)] if queue == 3 else [read(random.randbytes(random.choice([4, 10, 64])))]
    reads = (kind == "net" and queue == 1) or (kind == "console" and queue % 2 == 1)
    return [read(random.randbytes(some))] if reads else [write(some)]


def chains(kind: str, queue: int, random: Random, defects: float) -> dict[int, bytes]:
    """Rings of a queue with up to SIZE descriptors in chains; each descriptor has a defect with some probability."""
    memory: dict[int, bytes] = {}
    descriptors: list[bytes] = []
    heads: list[int] = []
    while len(descriptors) < SIZE:
        buffers = requests(kind, queue, random)[: SIZE - len(descriptors)]
        heads.append(len(descriptors))
        for n, (data, size) in enumerate(buffers):
            number = len(descriptors)
            at = (
                HEADERS + 0x80 * (number + SIZE * queue) if size <= 0x80 else BUFFERS + 0x1000 * (number + SIZE * queue)
            )
            if data is not None:
                memory[at] = data
            flags, following = (WRITE if data is None else 0) | (NEXT if n + 1 < len(buffers) else 0), number + 1
            if random.random() < defects:
                at, size = random.choice(
                    [(random.choice(GONE), size), (at, random.choice([0, 1, -1, 1 << 31, 3])), (at, size)]
                )
                flags ^= random.choice([0, 0, NEXT, WRITE, TABLE, 0xFFF8])
                following = random.choice([following, number, 0, SIZE, 0xFFFF])
            descriptors.append(descriptor(at, size, flags, following))
    for head in heads:
        if random.random() < defects / 2:
            heads[heads.index(head)] = random.choice([SIZE, 0xFFFF, 1])
    return memory | queue_memory(ring(queue), descriptors, available(*heads[:SIZE]))
