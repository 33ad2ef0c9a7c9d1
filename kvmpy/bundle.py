"""The compiled modules that a start needs, in one file: reading that is faster than opening a hundred.

The file is a cache beside those of Python, `__pycache__/bundle.TAG.marshal`, under the same rules: it is made by
whoever misses something in it and may write there, and a module of it counts as long as its source has the same length
and time of change. It has modules of this package and of the standard library. Without it all is as usual, but 5 ms
slower.

It begins with the lengths of two parts: the marshalled key and entries by name; the marshalled code of all modules, one
after the other. This module loads no other, since those are to come out of the bundle.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False  # type checkers take it for True, whatever it says

if TYPE_CHECKING:
    from typing import Any

ModuleSpec: Any = type(__spec__)  # importlib.machinery takes a millisecond to load
SourceFileLoader: Any = type(__spec__.loader)

HERE = os.path.dirname(__file__)  # noqa: PTH120
HOMES = (f"{HERE}{os.sep}", f"{os.path.dirname(os.__file__)}{os.sep}")  # noqa: PTH120 - folders of sources
PATH = f"{HERE}/__pycache__/bundle.{sys.implementation.cache_tag}.marshal"
LENGTH = 8  # bytes of the length of a part

# Of a module: its source, the time of that's last change (ns) and its length, whether it is a package, where its code
# begins and how many bytes it has.
Entry = tuple[str, int, int, bool, int, int]

_entries: dict[str, Entry] = {}  # by name
_codes = memoryview(b"")
_seen: set[str] = set()  # names that were taken from there, or loaded before


class _Loader(SourceFileLoader):  # type: ignore[misc]
    """Takes the code out of the bundle; the source, for those who want to see it, out of its file."""

    def get_code(self, name: str) -> Any:
        return marshal.loads(_code(name))


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> Any:
        if name not in _entries:
            return None
        source, time, length, is_package, *_ = _entries[name]
        if _facts(source) != (time, length):
            return None
        _seen.add(name)
        spec = ModuleSpec(name, _Loader(name, source), origin=source, is_package=is_package)
        spec.has_location = True  # it gets a __file__
        if is_package:
            spec.submodule_search_locations.append(os.path.dirname(source))  # noqa: PTH120
        return spec


def use() -> None:
    """Take modules from the bundle, from now on, if there is one."""
    global _codes
    _seen.update(sys.modules)
    try:
        with open(PATH, "rb", 0) as file:
            data = memoryview(file.readall())
        head, body = (int.from_bytes(data[at : at + LENGTH], "little") for at in (0, LENGTH))
        if len(data) != 2 * LENGTH + head + body:
            return
        key, entries = marshal.loads(data[2 * LENGTH :])
    except (OSError, EOFError, ValueError, TypeError):
        return
    if key == _key():
        _codes = data[2 * LENGTH + head :]
        _entries.update(entries)
        sys.meta_path.insert(0, _Finder)


def keep() -> None:
    """Make the bundle anew when what is loaded now is not all out of it."""
    if sys.dont_write_bytecode:
        return
    missing = [module for name, module in sys.modules.items() if name not in _seen]
    made = {name: (facts, code) for module in missing for name, facts, code in _made(module)}
    if not made:
        return
    entries, body = {}, b""
    for name, (facts, code) in ({name: (entry[:4], _code(name)) for name, entry in _entries.items()} | made).items():
        entries[name] = (*facts, len(body), len(code))
        body += code
    head = marshal.dumps((_key(), entries))
    beside = f"{PATH}.{os.getpid()}"
    try:
        try:
            with open(beside, "xb") as file:
                file.write(b"".join([*(len(part).to_bytes(LENGTH, "little") for part in (head, body)), head, body]))
            os.replace(beside, PATH)  # noqa: PTH105
        except OSError:
            os.unlink(beside)  # noqa: PTH108
    except OSError:
        return  # it stays slower


def _key() -> str:
    """Whose code it is, and where others would look for modules of these names."""
    return "\n".join([sys.version, str(sys.flags.optimize), *sys.path])


def _made(module: Any) -> list[tuple[str, tuple[str, int, int, bool], bytes]]:
    """Name, facts and code of a module that Python has compiled from its source; none of others."""
    spec = getattr(module, "__spec__", None)
    if spec is None or type(spec.loader) is not SourceFileLoader or not str(spec.origin).startswith(HOMES):
        return []
    facts = _facts(spec.origin)
    try:
        code = marshal.dumps(spec.loader.get_code(spec.name))
    except (OSError, SyntaxError):  # the source has been changed since
        return []
    return [] if facts is None else [(spec.name, (spec.origin, *facts, bool(spec.submodule_search_locations)), code)]


def _code(name: str) -> memoryview:
    *_, begin, length = _entries[name]
    return _codes[begin : begin + length]


def _facts(source: str) -> tuple[int, int] | None:
    """What changes with it: time of change and length."""
    try:
        status = os.stat(source)  # noqa: PTH116
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
