"""Records: classes whose annotations are their fields, as dataclasses, for a thousandth of their start-up time.

A dataclass compiles its methods when it is defined: half a millisecond each, thirty times before a guest can start.

    class Range(Record, frozen=True):
        base: int
        end: int = 0
"""

from __future__ import annotations

from collections.abc import Callable

from .typed import Any, ClassVar, TypeVar, dataclass_transform

R = TypeVar("R", bound="Record")


class _Fresh:
    """In place of a default: makes one for each record."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def fresh(*, default_factory: Callable[[], Any]) -> Any:
    """A default that each record gets anew."""
    return _Fresh(default_factory)


@dataclass_transform(field_specifiers=(fresh,))
class Record:
    """Compares and prints by its fields. `frozen`: cannot be changed, and can be hashed."""

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, frozen: bool = False) -> None:
        super().__init_subclass__()
        own = [name for name, kind in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
        cls.FIELDS = (*cls.FIELDS, *(name for name in own if name not in cls.FIELDS))
        if frozen:
            cls.__setattr__ = _refuse  # type: ignore[assignment]
            cls.__delattr__ = _refuse  # type: ignore[assignment]
        else:
            cls.__hash__ = None  # type: ignore[assignment]

    def __init__(self, *values: Any, **named: Any) -> None:
        fields, state = self.FIELDS, self.__dict__
        if len(values) == len(fields) and not named:  # what most are
            state.update(zip(fields, values, strict=True))
            return
        if len(values) > len(fields):
            raise TypeError(f"{type(self).__name__} has {len(fields)} fields, not {len(values)}")
        given = dict(zip(fields, values, strict=False))
        for name in named:
            if name in given or name not in fields:
                raise TypeError(f"{type(self).__name__}: {name!r} is {'given twice' if name in given else 'no field'}")
        given |= named
        for name in fields:
            if name in given:
                state[name] = given[name]
                continue
            try:
                default = getattr(type(self), name)
            except AttributeError:
                raise TypeError(f"{type(self).__name__}: {name!r} is missing") from None
            state[name] = default.make() if isinstance(default, _Fresh) else default

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def replace(record: R, /, **changes: Any) -> R:
    """A copy with some fields changed."""
    state, fields = vars(record), record.FIELDS
    for name in changes:
        if name not in fields:
            raise TypeError(f"{type(record).__name__}: {name!r} is no field")
    copy = object.__new__(type(record))
    vars(copy).update({name: state[name] for name in fields} | changes)
    return copy


def _refuse(record: Record, name: str, *value: object) -> None:
    raise AttributeError(f"{type(record).__name__}.{name} cannot be changed")
