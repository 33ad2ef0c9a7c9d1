"""Reads tar archives of any origin, one header after the other (POSIX.1-2001 pax; GNU tar's manual, "Tar Internals").

The standard library's reader keeps all headers, takes as much memory as a header asks for, searches it in quadratic
time, and takes damage for the end of the archive. Here every length is bounded before use, and damage is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..core.errors import ImageError

BLOCK = 512
CHUNK = 1 << 20
MAX_EXTENSIONS = 1 << 20  # bytes of extended headers, and of the map of a sparse file, before one file
MAX_HEADERS = 16  # extended headers before one file
MAX_SIZE = 1 << 62
REMEDY = "get the image from its source again"
FILE, LINK, SYMLINK, CHAR, BLOCK_DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
REGULAR = (b"0", b"\0", b"7", b"S")  # 7: contiguous; S: sparse, as GNU tar writes it outside pax
XATTR = b"SCHILY.xattr."


class Member:
    """A file of an archive. `kind` is FILE ... FIFO, or what the header says if that is none of them."""

    __slots__ = ("gid", "kind", "mode", "mtime", "name", "rdev", "runs", "size", "stored", "target", "uid", "xattrs")

    def __init__(self, header: bytes) -> None:
        self.name, self.target = _text(header[:100]), _text(header[157:257])
        if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
            self.name = prefix + b"/" + self.name
        self.kind = header[156:157]
        self.mode = _number(header[100:108]) & 0o7777
        self.uid, self.gid = _number(header[108:116]), _number(header[116:124])
        self.size = self.stored = _number(header[124:136])  # bytes of content, and of it in the archive
        self.mtime = _number(header[136:148]) * 10**9  # ns since 1970
        self.rdev = 0, 0
        if self.kind in (CHAR, BLOCK_DEVICE):
            self.rdev = _number(header[329:337]), _number(header[337:345])
        self.xattrs: dict[bytes, bytes] = {}
        self.runs: list[tuple[int, int]] | None = None  # of a sparse file: offset and length of what is no hole


class Tar:
    """The members of the archive that `read(size)` gives, which may give less, and nothing only at its end.

    `skip(size)`, where there is one, moves past what nobody wants to read. Raises ImageError.
    """

    def __init__(self, read: Callable[[int], bytes], skip: Callable[[int], None] | None = None) -> None:
        self._read = read
        self._skip = skip
        self._left = 0  # bytes of content not read yet
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self.offset = 0  # in the archive

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def content(self, member: Member) -> Iterator[bytes]:
        """The content of the member that came last, in pieces; to be read once."""
        if member.runs is None:
            while self._left:
                yield self._some()
            return
        at = 0
        for offset, length in [*member.runs, (member.size, 0)]:
            while at < offset:
                step = min(offset - at, CHUNK)
                yield bytes(step)
                at += step
            end = self._left - length
            while self._left > end:
                piece = self._some(self._left - end)
                at += len(piece)
                yield piece

    def _some(self, most: int = CHUNK) -> bytes:
        data = self._read(min(self._left, most, CHUNK))
        if not data:
            raise ImageError("the archive ends within a file", REMEDY)
        self._left -= len(data)
        self.offset += len(data)
        return data

    def _next(self) -> Member | None:
        self._finish()
        records: dict[bytes, bytes] = {}
        room, header = MAX_EXTENSIONS, b""
        for _ in range(MAX_HEADERS):
            header = self._block()
            if not header.strip(b"\0"):
                return None
            _check(header)
            kind = header[156:157]
            if kind not in b"xgLK":
                return self._member(header, self._globals | records, room)
            size = _number(header[124:136])
            room -= size
            if size < 0 or room < 0:
                raise ImageError(f"an extended header of {size} bytes", REMEDY)
            data = self._exactly(-(-size // BLOCK) * BLOCK)[:size]
            if kind == b"g":
                self._globals |= _records(data)
                if sum(map(len, self._globals.values())) > MAX_EXTENSIONS:
                    raise ImageError("too many global headers", REMEDY)
            elif kind == b"x":
                records |= _records(data)
            else:
                records[b"path" if kind == b"L" else b"linkpath"] = _text(data)
        raise ImageError(f"{MAX_HEADERS} extended headers for one file", REMEDY)

    def _member(self, header: bytes, records: dict[bytes, bytes], room: int) -> Member:
        member = Member(header)
        if records:
            _apply(member, records)
        if member.kind == b"\0" and member.name.endswith(b"/"):
            member.kind = FOLDER
        if not 0 <= member.size <= MAX_SIZE:
            raise ImageError(f"a file of {member.size} bytes", REMEDY)
        if member.kind in (LINK, SYMLINK, CHAR, BLOCK_DEVICE, FOLDER, FIFO):
            member.size = member.stored = 0  # what the field says is of no content
        self._left = member.stored
        self._padding = -member.stored % BLOCK
        if member.kind == b"S":
            self._old_sparse(member, header, room)
        elif b"GNU.sparse.major" in records or b"GNU.sparse.map" in records:
            self._pax_sparse(member, records, room)
        elif b"GNU.sparse.size" in records:
            raise ImageError("a sparse file in the format 0.0 of GNU tar", "make the archive with a newer tar")
        if member.kind in REGULAR:
            member.kind = FILE
        return member

    # Sparse files.

    def _old_sparse(self, member: Member, header: bytes, room: int) -> None:
        runs, more = _pairs(header[386:482]), header[482]
        while more:
            room -= BLOCK
            if room < 0:
                raise ImageError("a sparse file of too many parts", REMEDY)
            block = self._exactly(BLOCK)
            runs += _pairs(block[:504])
            more = block[504]
        member.size = _number(header[483:495])
        member.runs = _checked(runs, member)

    def _pax_sparse(self, member: Member, records: dict[bytes, bytes], room: int) -> None:
        member.size = _decimal(records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size", b"")))
        member.name = records.get(b"GNU.sparse.name", member.name)
        if b"GNU.sparse.map" in records:
            numbers = list(map(_decimal, records[b"GNU.sparse.map"].split(b",")))
        else:
            numbers = self._sparse_map(room)
        if len(numbers) % 2:
            raise ImageError("a sparse file with half a part", REMEDY)
        member.stored = self._left
        member.runs = _checked(list(zip(numbers[::2], numbers[1::2], strict=True)), member)

    def _sparse_map(self, room: int) -> list[int]:
        """In whole blocks before the content: how many parts, then offset and length of each, a number a line."""
        data, wanted = b"", 1
        lines: list[bytes] = []
        while len(lines) < wanted:
            if self._left < BLOCK or len(data) + BLOCK > room:
                raise ImageError("a sparse file with a bad map", REMEDY)
            data += self._exactly(BLOCK)
            self._left -= BLOCK
            lines = data.split(b"\n")[:-1]
            if lines:
                wanted = 1 + 2 * _decimal(lines[0])
        return list(map(_decimal, lines[1:wanted]))

    # The archive's bytes.

    def _finish(self) -> None:
        """Move to the next header."""
        size, self._left, self._padding = self._left + self._padding, 0, 0
        if self._skip is not None:
            self._skip(size)
            self.offset += size
            return
        while size:
            size -= len(self._exactly(min(size, CHUNK)))

    def _block(self) -> bytes:
        """The next header; zeros at the end of an archive, marked or not."""
        data = self._read(BLOCK)
        self.offset += len(data)
        return data + self._exactly(BLOCK - len(data)) if data else bytes(BLOCK)

    def _exactly(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            data = self._read(min(left, CHUNK))
            if not data:
                raise ImageError("the archive ends early", REMEDY)
            parts.append(data)
            left -= len(data)
        self.offset += size
        return b"".join(parts)


def _check(header: bytes) -> None:
    """Raises ImageError when the checksum, of all bytes but its own, is wrong."""
    stated = _number(header[148:156])
    rest = header[:148] + b" " * 8 + header[156:]
    if stated not in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest)):
        raise ImageError("the archive is damaged, or no tar archive", REMEDY)


def _apply(member: Member, records: dict[bytes, bytes]) -> None:
    member.name = records.get(b"path", member.name)
    member.target = records.get(b"linkpath", member.target)
    if b"size" in records:
        member.size = member.stored = _decimal(records[b"size"])
    member.uid = _decimal(records[b"uid"]) if b"uid" in records else member.uid
    member.gid = _decimal(records[b"gid"]) if b"gid" in records else member.gid
    if b"mtime" in records:
        member.mtime = _time(records[b"mtime"])
    member.xattrs = {key.removeprefix(XATTR): value for key, value in records.items() if key.startswith(XATTR)}


def _records(data: bytes) -> dict[bytes, bytes]:
    """Those of a pax header, `LENGTH KEY=VALUE\\n` each."""
    found, at = {}, 0
    while at < len(data):
        space = data.find(b" ", at, at + 12)
        length = _decimal(data[at:space]) if space > at else 0
        key, equals, value = data[space + 1 : at + length].partition(b"=")
        if not equals or at + length > len(data) or not value.endswith(b"\n"):
            raise ImageError("a damaged extended header", REMEDY)
        found[key] = value[:-1]
        at += length
    return found


def _pairs(data: bytes) -> list[tuple[int, int]]:
    """Offsets and lengths of 12 bytes each, until one has none."""
    found = []
    for at in range(0, len(data) - 23, 24):
        if not data[at]:
            break
        found.append((_number(data[at : at + 12]), _number(data[at + 12 : at + 24])))
    return found


def _checked(runs: list[tuple[int, int]], member: Member) -> list[tuple[int, int]]:
    at, total = 0, 0
    for offset, length in runs:
        if offset < at or length < 0 or offset + length > member.size:
            raise ImageError("a sparse file with parts that overlap", REMEDY)
        at, total = offset + length, total + length
    if total != member.stored or not 0 <= member.size <= MAX_SIZE:
        raise ImageError("a sparse file with more or less content than it says", REMEDY)
    return runs


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int:
    """Octal digits, or as GNU tar has it a first byte of 0x80 and a big-endian number (0xff: a negative one)."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = _text(field).strip(b" ")
    if digits.strip(b"01234567"):
        raise ImageError("the archive is damaged, or no tar archive", REMEDY)
    return int(digits or b"0", 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ImageError("a damaged extended header", REMEDY)
    return int(text)


def _time(text: bytes) -> int:
    """Seconds with a fraction as ns."""
    sign = -1 if text.startswith(b"-") else 1
    whole, _, fraction = text.removeprefix(b"-").partition(b".")
    return sign * (_decimal(whole) * 10**9 + (_decimal(fraction[:9].ljust(9, b"0")) if fraction else 0))
