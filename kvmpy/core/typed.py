"""What modules of every start take from `typing` and `enum`, which take 5 ms to load and to make their classes.

Type checkers see the real names. Modules of which somebody reads the annotations (virtio devices, whose arguments are
their options) take them from `typing` itself.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

TYPE_CHECKING = False  # type checkers take it for True, whatever it says

if TYPE_CHECKING:
    from enum import Enum as Enum
    from typing import Any as Any
    from typing import ClassVar as ClassVar
    from typing import Final as Final
    from typing import NamedTuple as NamedTuple
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import Self as Self
    from typing import TypeGuard as TypeGuard
    from typing import TypeVar as TypeVar
    from typing import dataclass_transform as dataclass_transform
    from typing import overload as overload
else:
    Any = ClassVar = Final = NoReturn = Protocol = Self = TypeGuard = object

    class _Tuples(type):
        def __new__(meta, name, bases, body):
            if not bases:
                return super().__new__(meta, name, bases, body)
            fields = body.pop("__annotations__")
            plain = namedtuple(name, fields, defaults=[body.pop(field) for field in fields if field in body])
            return type(name, (plain,), {"__slots__": ()} | body)

    class NamedTuple(metaclass=_Tuples):
        """As typing.NamedTuple: annotations are the fields."""

    class _Members(type):
        def __new__(meta, name, bases, body):
            values = {key: body.pop(key) for key in list(body) if key.isupper()}
            cls = super().__new__(meta, name, bases, body | {"_members": {}})
            for key, value in values.items():
                member = object.__new__(cls)
                member.name, member.value = key, value
                cls._members[value] = member
                setattr(cls, key, member)
            return cls

        def __call__(cls, value):
            try:
                return cls._members[value]
            except KeyError:
                raise ValueError(f"{value!r} is not a valid {cls.__name__}") from None

        def __getitem__(cls, name: str):
            return {member.name: member for member in cls}[name]

        def __iter__(cls):
            return iter(cls._members.values())

    class Enum(metaclass=_Members):
        """As enum.Enum: names in capitals are the members."""

        def __repr__(self) -> str:
            return f"<{type(self).__name__}.{self.name}: {self.value!r}>"

        def __reduce__(self) -> tuple:
            return type(self), (self.value,)

    def TypeVar(name: str, **_: object) -> str:
        return name

    def dataclass_transform(**_: object) -> Callable:
        return lambda cls: cls

    def overload(function: Callable) -> Callable:
        return function
