"""Disks, with a model of their content: each request's status, data and effect on the image."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.host.qcow2 import Qcow2
from kvmpy.virtio.blk import BLK_F, Blk
from kvmpy.virtio.spec import F

from .kind import Kind, Violation
from .oracle import Done, Image, Span, last

if TYPE_CHECKING:
    from .generate import Generator
    from .rig import Rig

SECTOR, SECTORS = 512, 64
CONTENT = b"".join(struct.pack("<Q", n + 1) * 64 for n in range(SECTORS))
HEADER, SEGMENT = struct.Struct("<IIQ"), struct.Struct("<QII")
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SERIAL = b"fuzz".ljust(20, b"\0")
CANARY = b"not yours"


class Disk(Kind):
    """A raw disk."""

    NAME = "blk"
    TWIN = True
    FEATURES = Kind.FEATURES | BLK_F.FLUSH | BLK_F.DISCARD | BLK_F.WRITE_ZEROES
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX, BLK_F.FLUSH, BLK_F.DISCARD, BLK_F.WRITE_ZEROES)
    SIZES = (32, 32)
    OPTIONS: dict[str, Any] = {"queues": 2}
    WRITABLE = True
    INITIAL = CONTENT

    def open(self, folder: Path) -> Blk:
        self.path = folder / "disk.img"
        self.path.write_bytes(self.file())
        (folder / "canary").write_bytes(CANARY)
        self.content = bytearray(self.INITIAL)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.unsure: set[int] = set()  # sectors whose content nobody can know
        self.features = 0
        self.device = Blk(path=self.path, serial="fuzz", **self.OPTIONS)
        return self.device

    def file(self) -> bytes:
        return CONTENT

    def started(self, features: int) -> None:
        self.features = features

    # Requests.

    def request(self, make: Generator) -> None:
        pick = make.random
        kind = pick.choice(
            [IN] * 6 + [OUT] * 6 + [FLUSH, GET_ID, DISCARD, WRITE_ZEROES, pick.randrange(16), make.word(32)]
        )
        count = pick.choice([0, 1, 1, 1, 2, 3, 8, pick.randrange(20)])
        sector = pick.randrange(SECTORS)
        chance = pick.random()
        if chance < 0.9:
            sector = min(sector, SECTORS - min(count, SECTORS))
        elif chance < 0.95:
            sector = pick.choice([SECTORS, SECTORS - 1, 1 << 55, (1 << 55) - 1, (1 << 64) - 1, make.word()])
        size = count * SECTOR + (pick.choice([1, -1, 511, 16]) if chance > 0.97 else 0)
        readable, writable = [HEADER.pack(kind, make.word(32), sector)], [1]
        if kind == IN:
            writable.insert(0, max(size, 0))
        elif kind == OUT:
            readable.append(pick.randbytes(16) * (max(size, 0) // 16) + bytes(max(size, 0) % 16))
        elif kind == GET_ID:
            writable.insert(0, pick.choice([20, 20, 0, 1, 19, 21, 4096]))
        elif kind in (DISCARD, WRITE_ZEROES):
            ranges = [(sector, count, pick.choice([0, 0, 0, 1, 2]))]
            ranges += [(pick.randrange(SECTORS), pick.randrange(4), 0) for _ in range(pick.choice([0, 0, 1, 40]))]
            if chance > 0.97:
                ranges = [(make.word(), make.word(32), make.word(32) & 3)]
            readable.append(b"".join(SEGMENT.pack(*one) for one in ranges) + bytes(chance > 0.99))
        make.chain(pick.randrange(2), readable, writable)

    def works(self, rig: Rig) -> None:
        for queue in range(2):
            answer = rig.request(queue, [HEADER.pack(IN, 0, 5)], [SECTOR, 1])
            if len(answer) != SECTOR + 1 or answer[-1] != OK:
                raise Violation("recovery", f"a normal read of queue {queue} gives {len(answer)} bytes")

    # The model.

    def allows(self, one: Done, before: Image) -> list[Span]:
        return last(one.writable)  # the status is there whatever was written in front of it

    def done(self, chains: list[Done], before: Image, after: Image) -> None:
        for one in chains:
            self._one(one, before, after)
        self._compare()

    def _one(self, one: Done, before: Image, after: Image) -> None:
        room = one.capacity - 1
        if room < 0:
            if one.written:
                raise Violation("used.len", "something was written, where nothing could be")
            return
        request = before.gather(one.readable)
        answer = after.gather(one.writable)
        status, data = self._do(request, room)
        what = f"request {request[:16].hex()} of {len(request)} bytes with room for {room}"
        if answer[-1] != status:
            raise Violation("status", f"{what}: status {answer[-1]}, expected {status}")
        written = room + 1 if data is not None and len(data) == room else len(data or b"") if room else 1
        if one.written != written:
            raise Violation("used.len", f"{what}: {one.written} bytes, expected {written}")
        if data is not None and not self.unsure and answer[: len(data)] != data:
            raise Violation("data", f"{what}: not what is on the disk")

    def _do(self, request: bytes, room: int) -> tuple[int, bytes | None]:
        """The status, and what is read."""
        if len(request) < HEADER.size:
            return IOERR, None
        kind, _, sector = HEADER.unpack_from(request)
        rest = request[HEADER.size :]
        if kind == IN:
            if rest or not _there(sector, room):
                return IOERR, None
            return OK, bytes(self.content[sector * SECTOR : sector * SECTOR + room])
        if kind == OUT:
            if room or not self.WRITABLE or not _there(sector, len(rest)):
                return IOERR, None
            self.content[sector * SECTOR : sector * SECTOR + len(rest)] = rest
            return OK, None
        if kind == FLUSH:
            return (IOERR if room or rest else OK), None
        if kind == GET_ID:
            return (IOERR, None) if rest else (OK, SERIAL[:room])
        if kind not in (DISCARD, WRITE_ZEROES):
            return UNSUPP, None
        return self._ranges(kind, rest, room), None

    def _ranges(self, kind: int, rest: bytes, room: int) -> int:
        feature, most, known = (BLK_F.DISCARD, 32, 0) if kind == DISCARD else (BLK_F.WRITE_ZEROES, 1, 1)
        if not self.WRITABLE or not self.features & feature:
            return UNSUPP
        if room or not rest or len(rest) % SEGMENT.size or len(rest) > most * SEGMENT.size:
            return IOERR
        ranges = list(SEGMENT.iter_unpack(rest))
        if any(flags & ~known for _, _, flags in ranges):
            return UNSUPP
        if not all(count and _there(sector, count * SECTOR) for sector, count, _ in ranges):
            return IOERR
        for sector, count, _ in ranges:
            if kind == DISCARD:
                self.unsure.update(range(sector, sector + count))
            self.content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        return OK

    def tangled(self) -> None:
        self.unsure.update(range(SECTORS))
        self._compare()

    def _compare(self) -> None:
        """The disk is what the model says; where that cannot know it learns."""
        found = self.view()
        if len(found) != len(self.content):
            raise Violation("file", f"the disk has {len(found)} bytes now")
        if self.unsure:
            for sector in self.unsure:
                span = slice(sector * SECTOR, (sector + 1) * SECTOR)
                self.content[span] = found[span]
            self.unsure.clear()
        if found != self.content:
            at = next(n for n in range(len(found)) if found[n] != self.content[n])
            raise Violation("file", f"byte {at} of the disk is not what was written there")

    def view(self) -> bytes:
        """The disk's content, as the file has it."""
        return os.pread(self._fd, 2 * SECTORS * SECTOR, 0)

    def observe(self) -> Any:
        return bytes(self.content)

    def close(self) -> None:
        try:
            self.check_file()
        finally:
            os.close(self._fd)
        if (self.path.parent / "canary").read_bytes() != CANARY or len(os.listdir(self.path.parent)) != 2:
            raise Violation("file", "files beside the disk have changed")

    def check_file(self) -> None:
        """After the device was closed."""
        self._compare()


class ReadOnly(Disk):
    """A raw disk that the guest can only read."""

    NAME = "blk-ro"
    FEATURES = Kind.FEATURES | BLK_F.FLUSH | BLK_F.RO
    OPTIONAL = (F.INDIRECT_DESC, F.EVENT_IDX, BLK_F.FLUSH, BLK_F.RO)
    OPTIONS = {"queues": 2, "ro": True}
    WRITABLE = False

    def tangled(self) -> None:
        self._compare()


class Qcow2Disk(Disk):
    """A qcow2 image with clusters of 512 bytes, empty at first."""

    NAME = "blk-qcow2"
    TWIN = False
    OPTIONS = {"queues": 2, "format": "qcow2"}
    INITIAL = bytes(SECTORS * SECTOR)

    def file(self) -> bytes:
        return _empty_qcow2()

    def view(self) -> bytes:
        return _read(self.device._image)

    def check_file(self) -> None:
        """What was written is there for those who open the image again."""
        image = Qcow2(self.path, read_only=True)
        try:
            if _read(image) != self.content:
                raise Violation("file", "the image is another one after it was closed")
        finally:
            image.close()


class Snapshot(Disk):
    """A raw disk that stays as it is, whatever is written."""

    NAME = "blk-snapshot"
    TWIN = False
    OPTIONS = {"queues": 2, "snapshot": True}

    def view(self) -> bytes:
        return _read(self.device._image)

    def check_file(self) -> None:
        if self.path.read_bytes() != CONTENT:
            raise Violation("file", "a snapshot's file has changed")


def _there(sector: int, length: int) -> bool:
    return length % SECTOR == 0 and sector < SECTORS and sector + length // SECTOR <= SECTORS


def _read(image: Any) -> bytes:
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


def _empty_qcow2() -> bytes:
    """Version 3, clusters of 512 bytes: header, refcount table, a block of counts, L1 table."""
    bits = 9
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, bits, SECTORS * SECTOR, 0, 1, 3 << bits, 1 << bits, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    table, counts = struct.pack(">Q", 2 << bits), struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(1 << bits, b"\0") for part in (header, table, counts, b""))
