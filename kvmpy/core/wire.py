"""Structs of bytes declared as class bodies: `Wire` for dense values, `Overlay` for sparse ones in place.

    class Desc(Wire):
        addr: u64
        len: u32

    desc = Desc.read(buf, 16)      # copies the bytes once, into a plain value
    bytes(desc), desc.write(buf, 16)

    class SetupHeader(Overlay, size=0x268):
        setup_sects = U8(0x1F1)    # reads and writes the bytes themselves

All fields are little-endian and packed, as every structure that this project shares with a guest is.
"""

from __future__ import annotations

import struct

from .record import Record
from .typed import Any, ClassVar, Self, overload

Buffer = bytes | bytearray | memoryview

u8 = int
u16 = int
u32 = int
u64 = int
b4 = bytes
b6 = bytes
b8 = bytes
b16 = bytes

# By the names of the types above: annotations are text at run time.
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "b4": "4s", "b6": "6s", "b8": "8s", "b16": "16s"}


class Wire(Record):
    """Base of dense structs: a subclass lists its fields in order, each one of the types above."""

    LAYOUT: ClassVar[struct.Struct]
    SIZE: ClassVar[int]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.LAYOUT = struct.Struct("<" + "".join(CODES[cls.__annotations__[name]] for name in cls.FIELDS))
        cls.SIZE = cls.LAYOUT.size

    @classmethod
    def read(cls, buf: Buffer, at: int = 0) -> Self:
        """The value of the SIZE bytes at `at`; raises struct.error when `buf` is too short."""
        if at < 0:
            raise struct.error(f"negative offset {at}")
        return cls(*cls.LAYOUT.unpack_from(buf, at))

    def __bytes__(self) -> bytes:
        return self.LAYOUT.pack(*vars(self).values())

    def write(self, buf: bytearray | memoryview, at: int = 0) -> None:
        """Store the SIZE bytes at `at`; raises struct.error when they do not fit."""
        if at < 0:
            raise struct.error(f"negative offset {at}")
        self.LAYOUT.pack_into(buf, at, *vars(self).values())


class _Number:
    """An integer field of an Overlay, at a fixed offset."""

    def __init__(self, code: str, offset: int) -> None:
        self._struct = struct.Struct("<" + code)
        self.offset = offset
        self.end = offset + self._struct.size

    @overload
    def __get__(self, obj: None, owner: type) -> _Number: ...
    @overload
    def __get__(self, obj: Overlay, owner: type) -> int: ...
    def __get__(self, obj: Overlay | None, owner: type) -> _Number | int:
        if obj is None:
            return self
        return int(self._struct.unpack_from(obj.buf, obj.base + self.offset)[0])

    def __set__(self, obj: Overlay, value: int) -> None:
        self._struct.pack_into(obj.buf, obj.base + self.offset, value)


def U8(offset: int) -> Any:
    return _Number("B", offset)


def U16(offset: int) -> Any:
    return _Number("H", offset)


def U32(offset: int) -> Any:
    return _Number("I", offset)


def U64(offset: int) -> Any:
    return _Number("Q", offset)


class Overlay:
    """Named numbers laid over `buf` from `base` on; without a buffer, over SIZE zero bytes of its own."""

    SIZE: ClassVar[int] = 0

    def __init_subclass__(cls, *, size: int) -> None:
        cls.SIZE = size
        for name, field in vars(cls).items():
            if isinstance(field, _Number) and not 0 <= field.offset <= field.end <= size:
                raise TypeError(f"{cls.__name__}.{name} at {field.offset:#x} is outside its {size:#x} bytes")

    def __init__(self, buf: Any = None, base: int = 0) -> None:
        self.buf = bytearray(self.SIZE) if buf is None else buf
        self.base = base
        if base < 0 or base + self.SIZE > len(self.buf):
            raise struct.error(
                f"{type(self).__name__} needs {self.SIZE} bytes at {base}, the buffer has {len(self.buf)}"
            )
