"""Block device: a disk whose content is an image on the host (VIRTIO 1.2, 5.2).

Linux: VIRTIO_BLK. Data goes between the image and guest RAM without a copy. A hostile guest may ask for sectors beyond
the end, for lengths that are no sectors, write to a read-only disk, or split and flip the parts of a request: headers
and ranges are copied before they are checked, everything is checked before the image is touched, and the request ends
with IOERR or UNSUPP.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.board import Board
from ..core.buffers import pieces
from ..core.errors import ConfigError
from ..core.pure import PURE
from ..core.ratelimit import RateLimit, parse_bandwidth
from ..core.regs import Bits, bit
from ..core.wire import U8, U16, U32, U64, Overlay
from ..host.disk import SECTOR, Image, Raw, open_image
from .device import VirtioDevice
from .queue import Chain, VirtQueue
from .spec import Type

if TYPE_CHECKING:
    from .twin import DiskTwin

QUEUE_SIZE = 256
MAX_QUEUES = 16
PHYSICAL_BLOCK_EXP = 3  # the host's file systems and page cache work on 8 sectors
MAX_DISCARD_SEGMENTS = 32  # a guest cannot make one request longer than this
MAX_DISCARD_SECTORS = 1 << 22  # 2 GiB, in each of them
MAX_WRITE_ZEROES_SEGMENTS = 1
MAX_WRITE_ZEROES_SECTORS = 1 << 16  # 32 MiB: some file systems have to write them


class BLK_F(Bits):
    """Feature bits (5.2.3)."""

    SEG_MAX = bit(2)
    RO = bit(5)
    BLK_SIZE = bit(6)
    FLUSH = bit(9)
    TOPOLOGY = bit(10)
    MQ = bit(12)
    DISCARD = bit(13)
    WRITE_ZEROES = bit(14)


class T:
    """Types of request (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class S:
    """Status of a request, its last byte (5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


HEADER = struct.Struct("<IIQ")  # 5.2.6 virtio_blk_req: type, reserved, sector
SEGMENT = struct.Struct("<QII")  # 5.2.6 virtio_blk_discard_write_zeroes: sector, num_sectors, flags
ID_BYTES = 20  # 5.2.6: of the string that GET_ID answers, padded with NUL
UNMAP = 1  # 5.2.6: flag of a segment of WRITE_ZEROES


class Config(Overlay, size=60):
    """virtio_blk_config (5.2.4), up to what the offered features cover."""

    capacity = U64(0)  # sectors of 512 bytes
    seg_max = U32(12)
    blk_size = U32(20)
    physical_block_exp = U8(24)
    min_io_size = U16(26)
    num_queues = U16(34)
    max_discard_sectors = U32(36)
    max_discard_seg = U32(40)
    discard_sector_alignment = U32(44)
    max_write_zeroes_sectors = U32(48)
    max_write_zeroes_seg = U32(52)
    write_zeroes_may_unmap = U8(56)


class Blk(VirtioDevice):
    """A disk. The image is opened when the device is attached, and closed by `close`.

    path       the image: a file or a block device
    ro         the guest can only read it
    serial     up to 20 characters for the guest to know the disk by
    cache      writeback; direct (not through the page cache of the host); unsafe (flushes are ignored)
    snapshot   the image stays as it is: what the guest writes is forgotten at the end
    queues     1 to 16, for guests with as many CPUs
    format     raw or qcow2; it is never guessed
    backing    open the backing file that a qcow2 image names
    bandwidth  bytes per second, such as 10M
    iops       requests per second
    """

    type_id = Type.BLOCK
    modules = ("virtio_blk",)
    own_thread = True

    def __init__(
        self,
        *,
        path: Path,
        ro: bool = False,
        serial: str | None = None,
        cache: str = "writeback",
        snapshot: bool = False,
        queues: int = 1,
        format: str = "raw",
        backing: bool = False,
        bandwidth: str | None = None,
        iops: int | None = None,
    ) -> None:
        if not 1 <= queues <= MAX_QUEUES:
            raise ConfigError(f"a disk of {queues} queues", f"use 1 to {MAX_QUEUES}")
        if iops is not None and iops < 1:
            raise ConfigError(f"invalid iops {iops}", "give requests per second, 1 or more")
        serial = serial or ""
        if len(serial) > ID_BYTES or not (serial.isascii() and serial.isprintable()):
            raise ConfigError(f"invalid disk serial {serial!r}", f"use up to {ID_BYTES} ASCII characters")
        self.path = Path(path)
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._id = serial.encode().ljust(ID_BYTES, b"\0")
        self._bandwidth = None if bandwidth is None else parse_bandwidth(bandwidth)
        self._iops = iops
        self._options: dict[str, Any] = {
            "read_only": ro,
            "cache": cache,
            "snapshot": snapshot,
            "format": format,
            "backing": backing,
        }
        self._image: Image | None = None
        self._limit: RateLimit | None = None
        self._first = 0  # the queue that is served first after a wait
        self._accepted = 0
        self._twins: dict[int, DiskTwin] = {}  # of the queues that have one
        self._handlers: dict[int, Callable[[Image, Chain, int, int], int]] = {
            T.IN: self._in,
            T.OUT: self._out,
            T.FLUSH: self._flush,
            T.GET_ID: self._get_id,
            T.DISCARD: self._discard,
            T.WRITE_ZEROES: self._write_zeroes,
        }

    # Life.

    def attach(self, board: Board) -> None:
        """Open the image; raises ConfigError, NotFoundError, ImageError or HostError."""
        self._image = image = self.open()
        self.longest_file = image.size + image.size // 8  # with the tables of a format
        self.features = BLK_F.SEG_MAX | BLK_F.BLK_SIZE | BLK_F.FLUSH | BLK_F.TOPOLOGY
        self.features |= BLK_F.RO if image.read_only else BLK_F.DISCARD | BLK_F.WRITE_ZEROES
        self.features |= BLK_F.MQ if len(self.queue_sizes) > 1 else 0
        self.space = self._config(image)
        self.config = self.space.buf
        try:
            super().attach(board)
            if self._bandwidth or self._iops:
                self._limit = RateLimit(self.loop, self, self._resume, bandwidth=self._bandwidth, iops=self._iops)
        except BaseException:
            self.close()
            raise

    def open(self) -> Image:
        """What has the content, opened once, by `attach`; a subclass may bring another one."""
        return open_image(self.path, **self._options)

    def activate(self, features: int, queues: Sequence[VirtQueue]) -> None:
        self._accepted = features
        image = self._image
        if PURE or image is None or image.fd < 0 or self._limit is not None or type(self).answer is not Blk.answer:
            return
        from .twin import DiskTwin, usable

        writable = not image.read_only and bool(features & BLK_F.FLUSH)
        for queue in filter(usable, (queue for queue in queues if queue.ready)):
            self._twins[queue.index] = DiskTwin(
                queue, image.fd, sectors=self.space.capacity, writable=writable, patient=len(queues) == 1
            )

    def reset(self) -> None:
        self._twins = {}

    def resize(self) -> None:
        """Look how large the image is now, and tell the driver (with `lock` held). Raises ConfigError if it cannot
        change: only a raw image without snapshot can."""
        if not isinstance(self._image, Raw):
            raise ConfigError(f"disk image {self.path} cannot be resized while in use", "stop the machine first")
        self._image.measure()
        if self.space.capacity != self._image.size // SECTOR:
            self.space.capacity = self._image.size // SECTOR
            for twin in self._twins.values():
                twin.resize(self.space.capacity)
            self.config_changed()

    def close(self) -> None:
        image, self._image = self._image, None
        try:
            if image is not None:
                image.close()
        except OSError as error:  # of the last flush
            self.board.log("a disk may have lost what was written last", path=str(self.path), why=error.strerror)

    def state(self) -> dict[str, Any]:
        return super().state() | {"capacity": self.space.capacity}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if state.get("capacity") != self.space.capacity:
            raise ValueError(f"{self.path} has {self.space.capacity} sectors, the state wants {state.get('capacity')}")

    # Requests.

    def notify(self, index: int, queue: VirtQueue) -> None:
        image, limit = self._image, self._limit
        if image is None or (limit is not None and limit.waiting):
            return
        for chain in self._twins.get(index, queue).available():
            self.answer(image, chain)
            queue.push(chain)
            if limit is not None and not limit.spend(max(chain.size, chain.capacity)):
                return  # what else is in the queue stays there until the limit's timer

    def _resume(self) -> None:
        """Each time another queue comes first: under a limit that may be the only one that is served."""
        count = len(self.queue_sizes)
        for number in range(count):
            self.serve((self._first + number) % count)
        self._first = (self._first + 1) % count

    def answer(self, image: Image, chain: Chain) -> None:
        """Do one request and write its status, the last byte of the chain (5.2.6). A subclass may answer otherwise."""
        room = chain.capacity - 1
        if room < 0:
            return
        status = S.IOERR
        if len(header := chain.read(HEADER.size)) == HEADER.size:
            kind, _, sector = HEADER.unpack(header)
            handler = self._handlers.get(kind, _unsupported)
            try:
                status = handler(image, chain, sector, room)
            except OSError as error:
                self.board.log("disk error", path=str(self.path), request=kind, sector=sector, why=error.strerror)
        chain.write(bytes([status]), at=room)

    def _in(self, image: Image, chain: Chain, sector: int, room: int) -> int:
        if chain.size != HEADER.size or not self._has(sector, room):
            return S.IOERR
        image.readv(sector * SECTOR, pieces(chain.writable, 0, room))
        chain.written = room
        return S.OK

    def _out(self, image: Image, chain: Chain, sector: int, room: int) -> int:
        length = chain.size - HEADER.size
        if room or image.read_only or not self._has(sector, length):
            return S.IOERR
        image.writev(sector * SECTOR, pieces(chain.readable, HEADER.size, length))
        return self._written(image)

    def _flush(self, image: Image, chain: Chain, sector: int, room: int) -> int:
        if room or chain.size != HEADER.size:
            return S.IOERR
        image.flush()
        return S.OK

    def _get_id(self, image: Image, chain: Chain, sector: int, room: int) -> int:
        if chain.size != HEADER.size:
            return S.IOERR
        chain.write(self._id[:room])
        return S.OK

    def _discard(self, image: Image, chain: Chain, sector: int, room: int) -> int:
        if not self._accepted & BLK_F.DISCARD:
            return S.UNSUPP
        status, segments = self._segments(chain, room, MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS, flags=0)
        if status != S.OK:
            return status
        for start, count, _ in segments:
            image.discard(start * SECTOR, count * SECTOR)
        return self._written(image)

    def _write_zeroes(self, image: Image, chain: Chain, sector: int, room: int) -> int:
        if not self._accepted & BLK_F.WRITE_ZEROES:
            return S.UNSUPP
        limits = (MAX_WRITE_ZEROES_SEGMENTS, MAX_WRITE_ZEROES_SECTORS)
        status, segments = self._segments(chain, room, *limits, flags=UNMAP)
        if status != S.OK:
            return status
        for start, count, flags in segments:
            image.write_zeroes(start * SECTOR, count * SECTOR, unmap=bool(flags & UNMAP))
        return self._written(image)

    def _segments(
        self, chain: Chain, room: int, most: int, longest: int, *, flags: int
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """The ranges behind the header, copied and checked: at most `most`, of up to `longest` sectors each."""
        length = chain.size - HEADER.size
        if room or length % SEGMENT.size or not 0 < length <= most * SEGMENT.size:
            return S.IOERR, []
        segments = list(SEGMENT.iter_unpack(chain.read(length, at=HEADER.size)))
        if any(given & ~flags for _, _, given in segments):
            return S.UNSUPP, []  # 5.2.6.2
        good = all(0 < count <= longest and self._has(start, count * SECTOR) for start, count, _ in segments)
        return (S.OK if good else S.IOERR), segments

    def _has(self, sector: int, length: int) -> bool:
        """Whether `length` bytes from `sector` on are whole sectors of this disk."""
        capacity: int = self.space.capacity
        return not length % SECTOR and sector < capacity and length // SECTOR <= capacity - sector

    def _written(self, image: Image) -> int:
        """The end of a request that changed the image: a driver that cannot flush expects it on the disk (5.2.6.2)."""
        if not self._accepted & BLK_F.FLUSH:
            image.flush()
        return S.OK

    def _config(self, image: Image) -> Config:
        space = Config()
        space.capacity = image.size // SECTOR
        space.seg_max = QUEUE_SIZE - 2  # besides header and status
        space.blk_size = SECTOR
        space.physical_block_exp = PHYSICAL_BLOCK_EXP
        space.min_io_size = 1 << PHYSICAL_BLOCK_EXP  # in units of blk_size
        space.num_queues = len(self.queue_sizes)
        if not image.read_only:
            space.max_discard_sectors = MAX_DISCARD_SECTORS
            space.max_discard_seg = MAX_DISCARD_SEGMENTS
            space.discard_sector_alignment = 1 << PHYSICAL_BLOCK_EXP
            space.max_write_zeroes_sectors = MAX_WRITE_ZEROES_SECTORS
            space.max_write_zeroes_seg = MAX_WRITE_ZEROES_SEGMENTS
            space.write_zeroes_may_unmap = 1
        return space


def _unsupported(image: Image, chain: Chain, sector: int, room: int) -> int:
    return S.UNSUPP
