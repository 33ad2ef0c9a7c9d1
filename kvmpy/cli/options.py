"""Options in a table, which plain command lines are read by without argparse, whose loading takes a sixth of a start.

Whatever is not plain (mistakes, --help, abbreviated or clustered options, words that look like options) is left to
argparse, which gets its parser from the same table: it knows best how to explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

from ..core.record import Record
from ..core.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


class Option(Record, frozen=True):
    """`names` as they are typed; without dashes it is a positional argument, which may be left out.

    metavar  what the help calls its value; "" for a switch
    dest     attribute of the result; "" for the longest of `names`
    many     can be given again: values are collected, and switches counted
    default  what it is when it is not given
    """

    names: tuple[str, ...]
    help: str
    metavar: str = ""
    dest: str = ""
    many: bool = False
    default: Any = None

    @property
    def attribute(self) -> str:
        return self.dest or self.names[-1 if self.names[0][1:2] != "-" else 0].lstrip("-").replace("-", "_")

    @property
    def positional(self) -> bool:
        return not self.names[0].startswith("-")


def switch(*names: str, help: str, count: bool = False) -> Option:
    """An option without a value: a bool, or how often it was given."""
    return Option(names, help, many=count, default=0 if count else False)


def add_to(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Teach argparse the same options."""
    for option in options:
        words: dict[str, Any] = {"help": option.help, "default": option.default}
        if option.positional:
            words |= {"nargs": "?", "metavar": option.metavar}
        elif option.metavar:
            words |= {"dest": option.attribute, "metavar": option.metavar}
            words |= {"action": "append"} if option.many else {}
        else:
            words |= {"dest": option.attribute, "action": "count" if option.many else "store_true"}
        parser.add_argument(*option.names, **words)


def read(words: Sequence[str], options: Iterable[Option]) -> SimpleNamespace | None:
    """What `words` say, as argparse would have it; None where that takes argparse to tell."""
    known = {name: option for option in options for name in option.names}
    result = {option.attribute: option.default for option in known.values()}
    free = [option for option in known.values() if option.positional]
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            if not free:
                return None
            result[free.pop(0).attribute] = word
            continue
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = known.get(name)
        if option is None or (equals and not option.metavar):
            return None
        if option.metavar and not equals:
            value = next(rest, "-")
            if value.startswith("-"):
                return None
        key = option.attribute
        if not option.metavar:
            result[key] = result[key] + 1 if option.many else True
        else:
            result[key] = [*(result[key] or ()), value] if option.many else value
    return SimpleNamespace(**result)
