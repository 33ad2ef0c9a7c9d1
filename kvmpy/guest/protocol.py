"""The frames between the host and the agent in the guest, as guests/PROTOCOL.md has them."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TypeVar

from ..core.errors import GuestError
from ..core.text import escaped
from ..core.wire import Wire, b4, u8, u16, u32, u64

PORT = 1024  # of AF_VSOCK
VERSION = 1
MAGIC = b"KVPA"
MAX_DATA = 64 << 10  # bytes of payload in any frame but EXEC
MAX_EXEC = 2 << 20
WINDOW = 256 << 10  # bytes that each stream may have on its way at first
MAX_LIMITS = 16
UNCHANGED = 0xFFFF_FFFF  # for mode, uid, gid
EVERYTHING = 0xFFFF_FFFF_FFFF_FFFF  # for size
MAX_NAME = 4096  # bytes of a path in ENTRY, its NUL included, as in Linux (PATH_MAX)

# What one answer may cost the host if the caller says nothing; with more, TooLarge.
LIMIT = 64 << 20  # bytes of memory: of a file, of each output of a command, of a folder's entries
ENTRY_COST = 512  # bytes that an entry takes at least
TREE_LIMIT = 16 << 30  # bytes on the host's disk, for a tree out of the guest
FILE_COST = 4096  # bytes that each of its files and folders takes at least

STDIN, STDOUT, STDERR = range(3)
TO_COMMAND, TO_GROUP, TO_ALL = range(3)  # whom SIGNAL is for


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    ERROR = 2
    END = 3
    DATA = 4
    EOF = 5
    WINDOW = 6
    EXEC = 16
    STARTED = 17
    RESIZE = 18
    SIGNAL = 19
    EXIT = 20
    READ = 32
    WRITE = 33
    LIST = 34
    STAT = 35
    MKDIR = 36
    REMOVE = 37
    RENAME = 38
    PACK = 39
    UNPACK = 40
    CHANGES = 41
    ENTRY = 48
    DIAL = 49


class Stage(IntEnum):
    """What failed, in ERROR."""

    PROTOCOL = 1
    SYSTEM = 2
    USER = 3
    LIMIT = 4
    CWD = 5
    EXEC = 6
    LOADER = 7
    FILE = 8
    PORT = 9


class Run(IntFlag):
    """Flags of EXEC."""

    TTY = 1
    STDIN = 2
    STDOUT = 4
    STDERR = 8
    MERGE = 16


class How(IntFlag):
    """Flags of a file request."""

    ATOMIC = 1
    APPEND = 2
    EXCLUSIVE = 4
    PARENTS = 8
    NOFOLLOW = 16
    RECURSIVE = 32
    CONTENT = 64


class Change(IntEnum):
    """What an ENTRY in the answer to CHANGES tells, in place of its links."""

    DELETED = 0
    CHANGED = 1
    ADDED = 2
    ENTERED = 3


class Header(Wire):
    length: u32
    kind: u8
    stream: u8
    zero: u16


class Hello(Wire):
    magic: b4
    oldest: u16
    newest: u16


class Error(Wire):
    stage: u32
    errno: u32


class Exec(Wire):
    flags: u32
    umask: u32
    rows: u16
    columns: u16
    argc: u32
    envc: u32
    limits: u32


class Limit(Wire):
    resource: u32
    zero: u32
    soft: u64
    hard: u64


class Exit(Wire):
    status: u32
    signal: u32
    core: u32
    zero: u32
    elapsed: u64
    user: u64
    system: u64
    maxrss: u64


class FileRequest(Wire):
    flags: u32
    mode: u32
    uid: u32
    gid: u32
    offset: u64
    size: u64


class Entry(Wire):
    mode: u32
    uid: u32
    gid: u32
    links: u32
    size: u64
    mtime: u64


class Number(Wire):
    """The payload of STARTED, WINDOW, SIGNAL and DIAL."""

    value: u32


class Size(Wire):
    """The payload of RESIZE."""

    rows: u16
    columns: u16


HELLO = bytes(Hello(MAGIC, VERSION, VERSION))

W = TypeVar("W", bound=Wire)
Frame = tuple[Kind, int, bytes]  # kind, stream, payload


def frame(kind: Kind, payload: bytes | memoryview = b"", stream: int = 0) -> bytes:
    """A frame as bytes; raises ValueError when the payload is longer than the agent takes."""
    if len(payload) > (MAX_EXEC if kind is Kind.EXEC else MAX_DATA):
        raise ValueError(f"{kind.name} with {len(payload)} bytes")
    return Header.LAYOUT.pack(len(payload), kind, stream, 0) + payload


def strings(*texts: bytes) -> bytes:
    """Each with its NUL; raises ValueError when one has a NUL in it."""
    if any(b"\0" in text for text in texts):
        raise ValueError("embedded null byte")
    return b"".join(text + b"\0" for text in texts)


def parse_entry(payload: bytes) -> tuple[Entry, bytes, bytes]:
    """Attributes, name and link target; raises GuestError when `payload` is no ENTRY."""
    texts = payload[Entry.SIZE :].split(b"\0", 3)
    if len(payload) < Entry.SIZE or len(texts) != 3 or texts[2] or max(map(len, texts)) >= MAX_NAME:
        raise GuestError("the guest's agent sent a malformed ENTRY")
    return Entry.read(payload), texts[0], texts[1]


def parse_error(payload: bytes) -> tuple[int, int, str]:
    """Stage, errno, and the text fit for a terminal; raises GuestError."""
    error = parse(Error, payload[: Error.SIZE])
    text = payload[Error.SIZE :].decode("utf-8", "replace")
    return error.stage, error.errno, escaped(text).replace("\n", r"\n")


def parse(kind: type[W], payload: bytes) -> W:
    """The structure that is all of `payload`; raises GuestError."""
    if len(payload) != kind.SIZE:
        raise GuestError(f"the guest's agent sent {len(payload)} bytes for {kind.__name__}, not {kind.SIZE}")
    return kind.read(payload)


class Parser:
    """Takes bytes as they come, gives whole frames; holds less than one frame and one read."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes; raises GuestError at one that is not allowed."""
        buffer, at = self._buffer, 0
        buffer += data
        frames: list[Frame] = []
        while len(buffer) - at >= Header.SIZE:
            length, kind, stream, zero = Header.LAYOUT.unpack_from(buffer, at)
            if length > MAX_DATA or kind not in KINDS or stream > STDERR or zero or (kind == Kind.DATA and not length):
                raise GuestError(f"the guest's agent sent a bad frame: {bytes(buffer[at : at + Header.SIZE]).hex()}")
            if len(buffer) - at - Header.SIZE < length:
                break
            at += Header.SIZE
            frames.append((Kind(kind), stream, bytes(memoryview(buffer)[at : at + length])))
            at += length
        del buffer[:at]
        return frames

    @property
    def is_empty(self) -> bool:
        """Whether what came ended with a whole frame."""
        return not self._buffer


KINDS = frozenset(kind.value for kind in Kind)
