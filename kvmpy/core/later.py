"""Modules that are loaded when something of theirs is used, for those who need one of many.

if TYPE_CHECKING:
    from . import elf, flat
else:
    elf, flat = later(__package__, "elf flat")
"""

from __future__ import annotations

import sys
from types import ModuleType

from .typed import Any


class _Later(ModuleType):
    """Stands for the module of its name."""

    def __getattr__(self, name: str) -> Any:
        __import__(self.__name__)
        return getattr(sys.modules[self.__name__], name)


def later(package: str, names: str) -> list[ModuleType]:
    """The modules `names` of `package`, or of the standard library for "", none of them loaded."""
    return [_Later(f"{package}.{name}" if package else name) for name in names.split()]
