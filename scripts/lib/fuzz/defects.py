"""What hostile drivers do to chains and rings: one defect at a time."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from .oracle import INDIRECT, NEXT, WRITE
from .ram import RANGES, RINGS

if TYPE_CHECKING:
    from .generate import Generator, Segment

(LOW, LOW_SIZE), (HIGH, HIGH_SIZE) = RANGES
LOW_END, HIGH_END = LOW + LOW_SIZE, HIGH + HIGH_SIZE
DEVICES = (0xD000_0000, 0xE000_0000, 0xFEC0_0000, 0xFEE0_0000)  # what answers there is no RAM
EDGES = (0, HIGH - 1, *(end + n for end in (LOW_END, HIGH_END) for n in (-1, 0, 1)), *(1 << n for n in (32, 52, 63)))
EDGES += ((1 << 64) - 1, (1 << 64) - 16, *DEVICES)
ADDRESS, LENGTH, FLAGS, FOLLOWING = range(4)  # fields of a descriptor


def spoil(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    """Put one defect into a chain."""
    make.random.choice(DEFECTS)(make, queue, segments, odd)


def bad_address(make: Generator) -> int:
    pick = make.random
    return pick.choice((*EDGES, (1 << 64) - pick.randrange(1, 8192), make.word()))


def bad_length(make: Generator) -> int:
    pick = make.random
    return pick.choice([0, 1, 0xFFFFFFFF, 0x80000000, 0xFFFFF000, LOW_SIZE, pick.randrange(1 << 17), make.word(32)])


def _address(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    make.random.choice(segments)[0] = bad_address(make)


def _length(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    make.random.choice(segments)[1] = bad_length(make)


def _nearly(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    segment = make.random.choice(segments)
    segment[1] = max(0, segment[1] + make.random.choice([-1, 1, -2, 16, 511, -511, 512]))


def _past(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    segment = make.random.choice(segments)
    segment[0] = max(0, make.random.choice([LOW_END, HIGH_END]) - segment[1] + make.random.choice([1, 1, 2, 8]))


def _nested(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    """The last part is in a table of its own, which another table names: good but for that."""
    address, size, writable, _ = segments[-1]
    inner = struct.pack("<QIHH", address, size, WRITE * writable, 0)
    odd["indirect"] = make.place(16 * len(segments))
    segments[-1] = [make.place(16), 16, 0, inner.hex()]
    odd["entries"] = [[len(segments) - 1, FLAGS, INDIRECT]]


def _long(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    """More descriptors than the queue has, some of them in a table."""
    size = make.sizes[queue % len(make.sizes)]
    if 0 < size <= 64:
        segments[:0] = [[make.place(0), 0, 0, ""] for _ in range(size)]
        odd.update(indirect=make.place(16 * len(segments)), direct=make.random.choice([0, size // 2, size - 1]))


def _direction(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    segment = make.random.choice(segments)
    segment[2] = 1 - segment[2]


def _drop(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    if len(segments) > 1:
        del segments[make.random.randrange(len(segments))]


def _double(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    segments.insert(make.random.randint(0, len(segments)), list(make.random.choice(segments)))


def _swap(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    make.random.shuffle(segments)


def _overlap(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    one, other = make.random.choice(segments), make.random.choice(segments)
    one[0] = max(0, other[0] + make.random.choice([0, 1, -1, 8]))


def _over_rings(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    make.random.choice(segments)[0] = RINGS + make.random.randrange(0x400)


def _flags(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    odd["entries"] = [[make.random.randrange(8), FLAGS, make.random.choice([0, 1, 2, 3, 4, 5, 6, 7, 0xFFF8, 0xFFFF])]]


def _following(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    value = make.random.choice([0, 1, 7, 8, 9, 255, 256, 0x7FFF, 0xFFFF])
    odd["entries"] = [[make.random.randrange(8), FOLLOWING, value]]


def _loop(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    odd["loop"] = make.random.randrange(8)


def _head(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    odd["head"] = make.random.choice([0, 1, 7, 8, 15, 16, 255, 256, 0x8000, 0xFFFF])


def _jump(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    odd["jump"] = make.random.choice([1, 2, 7, 8, 9, 16, 256, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF])


def _table(make: Generator, queue: int, segments: list[Segment], odd: dict[str, Any]) -> None:
    pick = make.random
    odd["indirect"] = bad_address(make) if pick.random() < 0.4 else make.place(16 * len(segments))
    what = pick.choice([0, 0, 1, 2, 3])
    if what == 0:
        odd["length"] = pick.choice(
            [0, 1, 15, 16, 17, 16 * 65536, 16 * 9, 16 * 257, 0xFFFFFFF0, 0xFFFFFFFF]
            + [16 * len(segments) + pick.randrange(-8, 16)] * 6
        )
    elif what == 1:
        odd["flags"] = pick.choice([NEXT, WRITE, NEXT | WRITE, 0xFFF8])
        odd["next"] = pick.randrange(10)
    elif what == 2:
        odd["entries"] = [[pick.randrange(8), FLAGS, INDIRECT]]
    elif what == 3:
        odd["entries"] = [
            [len(segments) - 1, FLAGS, NEXT],
            [len(segments) - 1, FOLLOWING, pick.choice([0, len(segments)])],
        ]


DEFECTS = (
    *(
        _address,
        _past,
        _nested,
        _long,
        _length,
        _nearly,
        _nearly,
        _direction,
        _drop,
        _double,
        _swap,
        _overlap,
        _over_rings,
    ),
    *(_flags, _following, _loop, _head, _jump, _table, _table),
)


def poke(make: Generator) -> None:
    """A store into a ring that is none of the driver's protocol, then a kick."""
    pick = make.random
    queue = pick.randrange(len(make.sizes))
    ring = pick.choice(["desc", "avail", "avail", "used"])
    size = make.sizes[queue] or 1
    if ring == "desc":
        entry = struct.pack(
            "<QIHH", bad_address(make), bad_length(make), pick.randrange(8), pick.randrange(size + 2) & 0xFFFF
        )
        offset = 16 * pick.randrange(min(size, 256))
        make.ops.append(["poke", queue, ring, offset, entry.hex()])
    else:
        offset = pick.choice([0, 2, 2, 4, 6, 4 + 2 * size, pick.randrange(8 * min(size, 256) + 8)])
        make.ops.append(["poke", queue, ring, offset, struct.pack("<H", make.word(16)).hex()])
    make.kick(queue)


def flip(make: Generator) -> None:
    """Another CPU goes to and fro between two values of a descriptor or an index during the next request."""
    pick = make.random
    make.kind.request(make)
    address = RINGS + pick.choice([16 * pick.randrange(16), 16 * make.sizes[0] + 2 * pick.randrange(8)])
    values = [struct.pack("<QIHH", bad_address(make), bad_length(make), pick.randrange(8), 1)[: pick.choice([2, 16])]]
    values.append(pick.randbytes(len(values[0])))
    make.ops.append(["flip", address, *(value.hex() for value in values)])
    make.kick(0)


def race(make: Generator) -> None:
    """Another CPU changes rings while the device works at the next request."""
    pick = make.random
    pokes = []
    for _ in range(pick.randint(1, 4)):
        address = RINGS + pick.choice([16 * pick.randrange(64), pick.randrange(0x800)])
        data = pick.choice(
            [pick.randbytes(2), struct.pack("<QIHH", bad_address(make), bad_length(make), pick.randrange(8), 1)]
        )
        pokes.append([address, data.hex()])
    make.ops.append(["race", pick.randint(1, 12), pokes])
    make.kind.request(make)
