"""What modules of every start take from `typing`, which takes 3 ms to load and says nothing at run time.

Type checkers see the real names. Modules of which somebody reads the annotations (virtio devices, whose arguments are
their options) take them from `typing` itself.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

TYPE_CHECKING = False  # type checkers take it for True, whatever it says

if TYPE_CHECKING:
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

    def TypeVar(name: str, **_: object) -> str:
        return name

    def dataclass_transform(**_: object) -> Callable:
        return lambda cls: cls

    def overload(function: Callable) -> Callable:
        return function
