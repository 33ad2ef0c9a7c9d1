"""Declarative registers: a device's class body is the table of its datasheet.

    class LCR(Bits):
        DLAB = bit(7)

    class Serial(RegisterDevice, span=8):
        LCR = Reg(3, bits=LCR)                 # plain: reads back what was written
        IIR = Reg(2, reset=0x01, write=0)      # read-only

        def write_LCR(self, value: int) -> None: ...   # only where something happens

On the class, `Serial.LCR` is the declaration; on an instance, `self.LCR` is the current value, a plain int.
Handlers are found once, when the device is made; an access costs one look-up and a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from .typed import Any, ClassVar, Self, overload


def bit(n: int) -> int:
    """The mask of bit `n`."""
    return 1 << n


class Field(int):
    """Bits `msb`..`lsb` of a register; as an int it is its own mask."""

    shift: int

    def __new__(cls, msb: int, lsb: int) -> Self:
        self = super().__new__(cls, ((1 << (msb - lsb + 1)) - 1) << lsb)
        self.shift = lsb
        return self

    def of(self, value: int) -> int:
        """The field's number in the register value `value`."""
        return (value & self) >> self.shift

    def put(self, value: int, number: int) -> int:
        """`value` with the field set to `number` (cut to the field's width)."""
        return (value & ~self) | ((number << self.shift) & self)


class Bits:
    """A namespace of masks and fields of one register."""

    @classmethod
    def describe(cls, value: int) -> str:
        """`0x60 (THRE|TEMT)`: the value with the names of the bits that are set."""
        names = []
        for name, mask in vars(cls).items():
            if name.startswith("_"):  # Python 3.13 keeps line numbers here
                continue
            if isinstance(mask, Field):
                names.append(f"{name}={mask.of(value):#x}")
            elif isinstance(mask, int) and value & mask and mask.bit_count() == 1:
                names.append(name)
        return f"{value:#x} ({'|'.join(names)})" if names else f"{value:#x}"


class Reg:
    """One register: where it is, what it resets to, which of its bits the guest can write.

    offset  in bytes from the device's base; None for a latch that no address shows but that is reset and saved
    reset   value after reset
    write   mask of the bits a plain write changes; 0 makes the register read-only
    read    False for a write-only register (reads give 0)
    w1c     mask of the bits that writing 1 clears
    rc      mask of the bits that reading clears
    bank    registers of bank n answer while the device has `select_bank(n)`, over those of bank 0
    width   in bytes, for a device whose registers differ and whose `read` and `write` see to that; 0: the stride
    bits    the names of its bits, for people and for the register-name lint
    """

    def __init__(
        self,
        offset: int | None,
        *,
        reset: int = 0,
        write: int = -1,
        read: bool = True,
        w1c: int = 0,
        rc: int = 0,
        bank: int = 0,
        width: int = 0,
        bits: type[Bits] = Bits,
    ) -> None:
        self.offset = offset
        self.reset = reset
        self.write = write
        self.read = read
        self.w1c = w1c
        self.rc = rc
        self.bank = bank
        self.width = width
        self.bits = bits
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    # A non-data descriptor: the instance's own attribute, a plain int, hides the declaration.
    @overload
    def __get__(self, obj: None, owner: type) -> Reg: ...
    @overload
    def __get__(self, obj: object, owner: type) -> int: ...
    def __get__(self, obj: object | None, owner: type) -> Reg | int:
        return self if obj is None else self.reset


Readers = dict[int, Callable[[], int]]
Writers = dict[int, Callable[[int], None]]


class Device:
    """Base of every device: brings the lock that the bus and the event loop hold around its methods."""

    VERSION: ClassVar[int] = 1  # of what state() returns
    lock: threading.Lock

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self.lock = threading.Lock()
        return self


class RegisterDevice(Device):
    """A device made of registers, each `stride` bytes wide, answering `span` bytes.

    `read_NAME(self) -> int` and `write_NAME(self, value)` replace the plain behaviour of register NAME, its
    masks included. An access that hits no register reads 0 and writes nothing. One that is wider than `stride`
    becomes one access per register, lowest address first, as a bus does for a narrower device.
    """

    SPAN: ClassVar[int]
    STRIDE: ClassVar[int]
    REGISTERS: ClassVar[dict[str, Reg]] = {}
    _plain: ClassVar[bool]  # accesses go to registers as they are
    _banked: ClassVar[frozenset[int | None]]  # offsets at which banks differ

    def __init_subclass__(cls, *, span: int = 0, stride: int = 1, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: reg for name, reg in vars(cls).items() if isinstance(reg, Reg)}
        cls.REGISTERS = {**cls.REGISTERS, **own}
        cls._banked = frozenset(reg.offset for reg in cls.REGISTERS.values() if reg.bank)
        cls._plain = cls.read is RegisterDevice.read and cls.write is RegisterDevice.write
        if span:
            cls.SPAN, cls.STRIDE = span, stride
        _check_handlers(cls)
        _check_places(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        for name, reg in cls.REGISTERS.items():
            self.__dict__[name] = reg.reset
        self._banks = {bank: self._tables(bank) for bank in {0, *(reg.bank for reg in cls.REGISTERS.values())}}
        self.select_bank(0)
        return self

    # Handlers by offset, of the bank that is selected and of all of them.
    _reads: Readers
    _writes: Writers
    _banks: dict[int, tuple[Readers, Writers]]

    def _tables(self, bank: int) -> tuple[Readers, Writers]:
        reads: Readers = {}
        writes: Writers = {}
        values = self.__dict__
        for name, reg in sorted(self.REGISTERS.items(), key=lambda item: item[1].bank):
            if reg.offset is None or reg.bank not in (0, bank):
                continue
            if reg.read:
                reads[reg.offset] = getattr(self, "read_" + name, None) or _getter(values, name, reg.rc)
            if reg.write or reg.w1c:
                writes[reg.offset] = getattr(self, "write_" + name, None) or _setter(values, name, reg)
        return reads, writes

    def select_bank(self, bank: int) -> None:
        """Let the registers of `bank` answer, over those of bank 0."""
        self._reads, self._writes = self._banks[bank]

    def reset(self) -> None:
        """Back to the values after power-on."""
        for name, reg in self.REGISTERS.items():
            self.__dict__[name] = reg.reset
        self.select_bank(0)

    def handlers(self, offset: int) -> tuple[Callable[[], int], Callable[[int], None]]:
        """What reads and writes the register at `offset`, of bank 0."""
        reads, writes = self._banks[0]
        return reads.get(offset, _zero), writes.get(offset, _nothing)

    def resolve(self, offset: int, size: int) -> tuple[Callable[[], int], Callable[[int], None], Any]:
        """For core.bus.Slot: the register's own handlers, where there is nothing to decide between."""
        if self._plain and size <= self.STRIDE and offset not in self._banked:
            return *self.handlers(offset), self.lock
        return partial(self.read, offset, size), partial(self.write, offset, size), self.lock

    def read(self, offset: int, size: int) -> int:
        if size <= self.STRIDE:
            return self._reads.get(offset, _zero)()
        value, mask = 0, (1 << 8 * self.STRIDE) - 1
        for at in range(0, size, self.STRIDE):
            value |= (self._reads.get(offset + at, _zero)() & mask) << 8 * at
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size <= self.STRIDE:
            self._writes.get(offset, _nothing)(value)
            return
        mask = (1 << 8 * self.STRIDE) - 1
        for at in range(0, size, self.STRIDE):
            self._writes.get(offset + at, _nothing)(value >> 8 * at & mask)

    def state(self) -> dict[str, Any]:
        """All registers by name, and the version of this layout: plain values that JSON can carry."""
        return {"version": self.VERSION, "registers": {name: self.__dict__[name] for name in self.REGISTERS}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; raises ValueError for another version, other registers or values too wide."""
        if state.get("version") != self.VERSION:
            raise ValueError(f"{type(self).__name__}: state version {state.get('version')}, expected {self.VERSION}")
        registers = state.get("registers", {})
        if registers.keys() != self.REGISTERS.keys():
            raise ValueError(f"{type(self).__name__}: state has registers {sorted(registers)}")
        for name, value in registers.items():
            reg = self.REGISTERS[name]
            on_bus = reg.offset is not None
            if type(value) is not int or (on_bus and not 0 <= value < 1 << 8 * (reg.width or self.STRIDE)):
                raise ValueError(f"{type(self).__name__}: state has {name}={value!r}")
        self.__dict__.update(registers)


def _check_handlers(cls: type[RegisterDevice]) -> None:
    """A handler whose name has a typo would never be called: refuse the class."""
    for name in vars(cls):
        verb, _, register = name.partition("_")
        if verb in ("read", "write") and register and register not in cls.REGISTERS:
            raise TypeError(f"{cls.__name__}.{name}: no register {register!r}; has {', '.join(cls.REGISTERS)}")


def _check_places(cls: type[RegisterDevice]) -> None:
    """Registers lie inside the span, on a stride, and no two of a bank answer the same access."""
    span = getattr(cls, "SPAN", 0)
    taken: dict[tuple[str, int, int], str] = {}
    for name, reg in cls.REGISTERS.items():
        if reg.offset is None:
            continue
        if not 0 <= reg.offset < span or reg.offset % cls.STRIDE:
            raise TypeError(f"{cls.__name__}.{name}: no register can be at {reg.offset:#x} of a span of {span:#x}")
        for verb, answers in (("reads", reg.read), ("writes", reg.write or reg.w1c)):
            other = taken.setdefault((verb, reg.bank, reg.offset), name) if answers else name
            if other != name:
                raise TypeError(f"{cls.__name__}: {name} and {other} both answer {verb} at {reg.offset:#x}")


def _zero() -> int:
    return 0


def _nothing(value: int) -> None:
    return


def _getter(values: dict[str, int], name: str, clear: int) -> Callable[[], int]:
    def take() -> int:
        value = values[name]
        values[name] = value & ~clear
        return value

    return take if clear else lambda: values[name]


def _setter(values: dict[str, int], name: str, reg: Reg) -> Callable[[int], None]:
    writable, clearable = reg.write & ~reg.w1c, reg.w1c
    keep = ~writable

    def put(value: int) -> None:
        values[name] = (values[name] & keep & ~(value & clearable)) | (value & writable)

    return put
