"""Hostile guests of one defect each: those of other monitors, by their number in the list that tests are named after."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from malice import BUFFERS, RAM, RINGS, Guest, lines
from malice_driver import (
    GONE,
    HEADERS,
    INDIRECT,
    NEXT,
    SIZE,
    TABLE,
    WRITE,
    Device,
    available,
    descriptor,
    driver,
    queue_memory,
    repeat,
    ring,
)

from kvmpy.x86 import layout

END = 1 << 64
TABLE_AT = BUFFERS + 0x8000  # of indirect descriptors
BLK_IN, BLK_OUT, BLK_GET_ID, BLK_DISCARD, BLK_ZEROES = 0, 1, 8, 11, 13
CAPACITY = 2048  # sectors of the disk


class Case:
    """Chains in one queue of a device; when they are given back or the device wants a reset, it has to serve again."""

    def __init__(self, name: str, kind: str = "rng", queue: int = 0) -> None:
        self.name, self.kind, self.queue = name, kind, queue
        self.memory: dict[int, bytes] = {}

    def ring(self, descriptors: Sequence[bytes], avail: bytes | None = None) -> Case:
        self.memory |= queue_memory(ring(self.queue), descriptors, avail or available(0))
        return self

    def chain(self, *buffers: tuple[int, int, int] | bytes) -> Case:
        """Buffers as (address, size, flags), or bytes for the device to read; linked."""
        descriptors = []
        for n, buffer in enumerate(buffers):
            if isinstance(buffer, bytes):
                self.memory[HEADERS + 0x80 * n] = buffer
                buffer = (HEADERS + 0x80 * n, len(buffer), 0)
            at, size, flags = buffer
            descriptors.append(descriptor(at, size, flags | (NEXT if n + 1 < len(buffers) else 0), n + 1))
        return self.ring(descriptors)

    def table(self, entries: Sequence[bytes], size: int | None = None, flags: int = TABLE) -> Case:
        """One descriptor, which names a table of these."""
        self.memory[TABLE_AT] = b"".join(entries)
        return self.ring([descriptor(TABLE_AT, 16 * len(entries) if size is None else size, flags)])

    def guest(self, transport: str, features: int | None = None) -> Guest:
        device = Device(self.kind, transport)
        before = device.up([(self.queue, ring(self.queue))], features)
        where = device.base + (0x14 if device.pci else 0x70)
        seen = f"mov ${where:#x}, %rdi\nmov {'(%rdi), %al' if device.pci else '(%rdi), %eax'}\ntest $0x40, %al\njnz 2f"
        look = f"cmpw $0, {ring(self.queue) + 0x202:#x}\njne 2f\n{seen}"
        body = f"{device.kick(self.queue)}\nmov $5000000, %ecx\n1: in $0x80, %al\n{look}\ndec %ecx\njnz 1b\nmov $0x502, %dx\nmov $2, %al\nout %al, %dx\n2:"
        return driver(self.name, self.kind, transport, body, self.memory, before=before)


ROOM = (BUFFERS, 64, WRITE)


def ring_cases() -> Iterator[Case]:
    room = descriptor(BUFFERS, 64, WRITE)
    for index in (SIZE + 1, 0xFFFF):
        yield Case(f"row-01-{index}").ring([room], available(index=index))
    yield Case("row-02-alone").chain((0, 0, WRITE))
    yield Case("row-02-chained").chain((BUFFERS, 0, WRITE), ROOM, (0, 0, WRITE))
    yield Case("row-03-self").ring([descriptor(BUFFERS, 64, WRITE | NEXT, 0)])
    yield Case("row-03-two").ring([descriptor(BUFFERS, 64, WRITE | NEXT, n) for n in (1, 0)])
    yield Case("row-03-table").table([descriptor(BUFFERS, 64, WRITE | NEXT, n) for n in (1, 0)])
    yield Case("row-04-next").ring([descriptor(BUFFERS, 64, WRITE | NEXT, SIZE)])
    yield Case("row-04-head").ring([room], available(*[0xFFFF] * SIZE))
    yield Case("row-05").table([descriptor(BUFFERS, 64, WRITE | NEXT, n + 1) for n in range(SIZE)] + [room])
    for at, size in ((END - 0x1000, 0x2000), (END - 1, 1), (END - 64, 64)):
        yield Case(f"row-06-{at:x}-{size}").chain((at, size, WRITE))
    for at in (RAM - 32, RAM, layout.HOLE - 32):
        yield Case(f"row-07-{at:x}").chain((at, 64, WRITE))
    yield Case("row-08").chain((0, 0xFFFFFFFF, WRITE))
    yield Case("row-09").table([descriptor(0, 0xFFFFF000, WRITE | NEXT, n + 1) for n in range(6)] + [room])
    for size in (0, 8, 17, 16 * 65536):
        yield Case(f"row-12-{size}").table([room], size)
    yield Case("row-13-nested").table([descriptor(TABLE_AT, 16, TABLE)])
    yield Case("row-13-next").table([room], flags=TABLE | NEXT)
    yield Case("row-13-after-chain").ring([descriptor(BUFFERS, 64, WRITE | NEXT, 1), descriptor(TABLE_AT, 16, TABLE)])
    yield Case("row-15").table([room], flags=TABLE | WRITE)
    yield Case("row-19-desc-is-data").chain((RINGS, 64, WRITE))
    yield Case("row-19-used-is-data").chain((RINGS + 0x200, 64, WRITE))
    for at in GONE:
        yield Case(f"row-23-{at:x}").chain((at, 64, WRITE))
    yield Case("row-24").ring([room], available(index=-1))
    yield Case("row-27", "console", 1).chain(*[bytes([65 + n]) for n in range(SIZE)])


def blk(kind: int, sector: int, *data: tuple[int, int, int] | bytes, name: str) -> Case:
    case = Case(name, "blk")
    return case.chain(struct.pack("<IIQ", kind, 0, sector & END - 1), *data, (BUFFERS + 0x7000, 1, WRITE))


def disk_cases() -> Iterator[Case]:
    sector, into = bytes(512), (BUFFERS, 512, WRITE)
    for at in (CAPACITY, -1, 1 << 55, (END - 512) // 512):
        yield blk(BLK_IN, at, into, name=f"row-28-in-{at}")
        yield blk(BLK_OUT, at, (BUFFERS, 512, 0), name=f"row-28-out-{at}")
    yield blk(BLK_OUT, CAPACITY - 1, *[(BUFFERS, 512, 0)] * 4, name="row-29")
    for size in (1, 511, 513):
        yield blk(BLK_IN, 0, (BUFFERS, size, WRITE), name=f"row-30-{size}")
    for kind in (BLK_DISCARD, BLK_ZEROES):
        for at, count, flags in ((-1, 8, 0), (0, 0, 0), (0, 0xFFFFFFFF, 0), (0, 8, 0xFFFFFFFE), (CAPACITY, 1, 1)):
            yield blk(
                kind, 0, struct.pack("<QII", at & END - 1, count, flags), name=f"row-31-{kind}-{at}-{count}-{flags}"
            )
        yield blk(kind, 0, bytes(17), name=f"row-31-{kind}-odd")
    for kind in (2, 5, 0x80000000, 0xFFFFFFFF):
        yield blk(kind, 0, into, name=f"row-33-{kind:x}")
    for size in (1, 19, 20, 21, 4096):
        yield blk(BLK_GET_ID, 0, (BUFFERS, size, WRITE), name=f"row-34-{size}")
    yield Case("row-35-no-status", "blk").chain(bytes(16))
    yield Case("row-35-status-empty", "blk").chain(bytes(16), into, (BUFFERS, 0, WRITE))
    yield Case("row-35-status-read-only", "blk").chain(bytes(16), into, (BUFFERS, 1, 0))
    yield Case("row-35-short-header", "blk").chain(bytes(8), into, (BUFFERS, 1, WRITE))
    yield Case("row-35-header-writable", "blk").chain((HEADERS, 16, WRITE), into, (BUFFERS + 512, 1, WRITE))
    yield blk(BLK_OUT, 0, into, name="row-35-direction")
    assert len(sector) == 512


def frame_and_stream_cases() -> Iterator[Case]:
    for size in (65562, 0x10000, 0x100000):
        yield Case(f"row-41-{size}", "net", 1).chain((BUFFERS, size, 0))
    for size in (0, 1, 11):
        yield Case(f"row-42-{size}", "net", 1).chain((BUFFERS, size, 0))
    yield Case("row-42-writable", "net", 1).chain((BUFFERS, 72, WRITE))
    for flags, gso, hdr_len, gso_size, start, offset in (
        (1, 0, 0, 0, 0xFFFF, 0xFFFF),
        (1, 1, 0xFFFF, 0, 0, 0),
        (0, 0xFF, 0, 1, 0, 0),
        (0xFF, 3, 0, 0xFFFF, 14, 16),
    ):
        header = struct.pack("<BBHHHHH", flags, gso, hdr_len, gso_size, start, offset, 0)
        yield Case(f"row-43-{header.hex()}", "net", 1).chain(header + bytes(60))
    for size, length in ((64 << 10, 16), (0xFFFFFFFF, 0), (1, 0)):
        packet = struct.pack("<QQIIIHHIII", 3, 2, 1, 2, size, 1, 5, 0, 0, 0)
        yield Case(f"row-47-{size}-{length}", "vsock", 1).chain(
            packet, *([(RAM - length, length, 0)] if length else [])
        )
    for name, values in {
        "other-source": (9, 2, 1, 2, 0, 1, 1, 0, 0, 0), "to-itself": (3, 3, 1, 2, 0, 1, 1, 0, 0, 0), "to-all": (3, 0xFFFFFFFF, 1, 2, 0, 1, 1, 0, 0, 0),
        "type": (3, 2, 1, 2, 0, 7, 1, 0, 0, 0), "operation": (3, 2, 1, 2, 0, 1, 99, 0, 0, 0), "credit": (3, 2, 1, 2, 0, 1, 6, 0, 0, 0xFFFFFFFF), "request": (3, 2, 1, 2, 0, 1, 1, 0, 0, 0),
    }.items():  # fmt: skip
        yield Case(f"row-52-{name}", "vsock", 1).chain(struct.pack("<QQIIIHHIII", *values))
    yield Case("row-48", "vsock", 1).chain(struct.pack("<QQIIIHHIII", 3, 2, 1, 2, 8, 1, 5, 0, 0, 0), (BUFFERS, 4096, 0))
    yield Case("row-53").chain(*[(BUFFERS, 0x100000, WRITE)] * SIZE)
    for pages in ((0xFFFFFFFF,), (0,), (RINGS >> 12,), (0x240,) * 16, (RAM >> 12,)):
        yield Case(f"row-55-{pages[0]:x}-{len(pages)}", "balloon").chain(struct.pack(f"<{len(pages)}I", *pages))
    yield Case("row-55-odd", "balloon").chain(bytes(7))
    yield Case("row-56", "console", 1).chain(b"one", b"two", b"three")
    for number, event, size in ((1 << 31, 3, 8), (9, 6, 8), (0, 99, 8), (0, 0, 3)):
        yield Case(f"row-60-{number:x}-{event}-{size}", "console", 3).chain(
            struct.pack("<IHH", number, event, 1)[:size]
        )


def rows() -> Iterator[Guest]:
    """Every case, on the one transport or the other."""
    for number, case in enumerate([*ring_cases(), *disk_cases(), *frame_and_stream_cases()]):
        yield case.guest(("mmio", "pci")[number % 2])
    yield Case("row-14").table([descriptor(BUFFERS, 64, WRITE)]).guest("mmio", features=0)
    for transport in ("mmio", "pci"):
        device = Device("rng", transport)
        memory = queue_memory(RINGS, [descriptor(BUFFERS, 64, WRITE)], available(0))
        up = device.up([(0, RINGS)])
        begin = [device.status(value) for value in (0, 1, 3)] + [
            device.feature(0, INDIRECT),
            device.feature(1, 1),
            device.status(0xB),
        ]
        for name, body in {
            "row-16": [
                up,
                *[line for size in (0, 0xFFFF) for line in (device.select(0), device.size(size), device.kick(0))],
                device.ready(0),
                device.rings(RAM, RAM, RAM),
            ],
            "row-17-sizes": [
                line
                for size in (0, 3, 0xFFFF, 4096)
                for line in (
                    *begin,
                    device.select(0),
                    device.size(size),
                    device.rings(RINGS, RINGS + 0x100, RINGS + 0x200),
                    device.ready(1),
                    device.status(0xF),
                    device.kick(0),
                )
            ],
            "row-17-no-addresses": [
                *begin,
                device.select(0),
                device.size(SIZE),
                device.ready(1),
                device.ready(2),
                device.status(0xF),
                device.kick(0),
            ],
            "row-18": [
                up,
                *[device.kick(0, value) for value in (5, 0xFFFF, 0x80000000, 0xFFFFFFFF)],
                device.select(0xFFFF),
                device.size(8),
                device.rings(0, 0, 0),
                device.ready(1),
                device.kick(0),
            ],
            "row-19-unaligned": [
                *begin,
                device.select(0),
                device.size(SIZE),
                device.rings(RINGS + 1, RINGS + 0x101, RINGS + 0x203),
                device.ready(1),
                device.status(0xF),
                device.kick(0),
            ],
            "row-19-overlapping": [
                *begin,
                device.select(0),
                device.size(SIZE),
                device.rings(RINGS, RINGS, RINGS),
                device.ready(1),
                device.status(0xF),
                device.kick(0),
            ],
            "row-07-rings-in-the-hole": [
                line
                for at in GONE
                for line in (
                    *begin,
                    device.select(0),
                    device.size(SIZE),
                    device.rings(at & ~0xF, at & ~0xF, at & ~0xF),
                    device.ready(1),
                    device.status(0xF),
                    device.kick(0),
                )
            ],
            "row-25": [
                *[device.status(value) for value in (0, 1, 3)],
                device.feature(1, 5),
                device.status(0xB),
                device.status(0xF),
                device.kick(0),
            ],
            "row-63": [device.status(value) for value in (0xFF, 0x4, 0x8, 0xF, 0x3, 0, 0x8, 0xB, 0xB, 0xF, 0x80)],
            "row-64": [
                *[device.feature(half, 0xFFFFFFFF) for half in (0, 1, 2, 0xFFFFFFFF)],
                device.status(0xB),
                device.feature(0, 0),
                device.status(0xF),
            ],
            "row-65": [device.kick(0), *begin, device.kick(0), up, device.kick(0), device.status(0), device.kick(0)],
            "row-66": [repeat(300, lines([device.status(0), up, device.kick(0)]))],
        }.items():
            yield driver(name, "rng", transport, lines(body), memory, before="")


def strings_to_uart() -> Guest:
    """4096 bytes in one `rep outsb`, which is one exit or more."""
    content = bytes(32 + n % 95 for n in range(4096))
    return Guest(
        "row-68",
        f"cld\nmov $0x3f8, %dx\nmov $4096, %ecx\nmov ${BUFFERS}, %esi\nrep outsb\ndone",
        memory={BUFFERS: content},
        seconds=30,
    )
