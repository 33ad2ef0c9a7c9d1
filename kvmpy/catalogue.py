"""Devices by name: what `--device` may say, the class each name stands for, and its options.

    virtio-blk,path=disk.img,ro        a name of CATALOGUE
    ./flaky.py:FlakyDisk,rate=0.1      a class in a file of the user's own

The options of a device are the keyword arguments of its class, converted as their type hints say.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .core.errors import ConfigError, NotFoundError

CATALOGUE = {
    "virtio-balloon": "virtio.balloon:Balloon",
    "virtio-blk": "virtio.blk:Blk",
    "virtio-console": "virtio.port:PortSocket",
    "virtio-fs": "virtio.fs:Fs",
    "virtio-net": "virtio.net:Net",
    "virtio-rng": "virtio.rng:Rng",
    "virtio-vsock": "virtio.vsock:Vsock",
}
SWITCH = {"on": True, "yes": True, "true": True, "1": True, "off": False, "no": False, "false": False, "0": False}


def make(text: str) -> Any:
    """The device that `text` describes; raises ConfigError or NotFoundError, and what its class raises."""
    _, cls, arguments = parse(text)
    return cls(**arguments)


def plain(text: str) -> str | dict[str, dict[str, Any]]:
    """What `text` says as plain values: a name, or a name with its options. Raises as `make`."""
    name, _, arguments = parse(text)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
    return {name: options} if options else name


def parse(text: str) -> tuple[str, type, dict[str, Any]]:
    """Name, class and arguments of the device that `text` describes; raises ConfigError or NotFoundError."""
    name, *options = split(text)
    cls = find(name)
    parameters = options_of(cls)
    known = {parameter.name: parameter.annotation for parameter in parameters}
    arguments: dict[str, Any] = {}
    for option in options:
        key, given, value = option.partition("=")
        if key not in known:
            raise ConfigError(f'{name} has no option "{key}"', f"it has {', '.join(known) or 'none'}")
        if key in arguments:
            raise ConfigError(f'{name}: option "{key}" is given twice', "give it once")
        arguments[key] = convert(f"{name}: option {key}", known[key], value if given else None)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ConfigError(f'{name} needs the option "{missing[0]}"', f"write {name},{missing[0]}=...")
    return name, cls, arguments


def options_of(cls: type) -> list[inspect.Parameter]:
    """The keyword arguments of a device's class, each with its type as annotation."""
    initializer: Any = next(vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base))
    hints = get_type_hints(initializer)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        parameter.replace(annotation=hints.get(parameter.name, str))
        for parameter in list(inspect.signature(initializer).parameters.values())[1:]
        if parameter.kind not in variable
    ]


def split(text: str) -> list[str]:
    """The parts of `text` between commas; two commas are one that does not separate."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def find(name: str) -> type:
    """The class that `name` stands for."""
    if name in CATALOGUE:
        module, _, cls = CATALOGUE[name].partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), cls)  # type: ignore[no-any-return]
    path, colon, cls = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ConfigError(f'unknown device "{name}"', f"use {', '.join(CATALOGUE)}, or FILE.py:CLASS")
    source = load(Path(path))
    found = getattr(source, cls, None)
    if not isinstance(found, type) or not hasattr(found, "attach"):
        classes = [key for key, value in vars(source).items() if _is_own_device(value, source)]
        raise ConfigError(f'{path} has no device "{cls}"', f"it has {', '.join(classes) or 'none'}")
    return found


def load(path: Path) -> ModuleType:
    """The module in the user's file, which may import others that lie beside it."""
    if not path.is_file():
        raise NotFoundError(f"no file {path}", "give the path of a Python file with a device in it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: told as they would want to see it, without our frames
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = where[-1].lineno if where else getattr(error, "lineno", "?")
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}", "mend the file") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def convert(what: str, hint: Any, value: str | None) -> Any:
    """`value` as the type hint wants it; an option without a value is a switch that is on."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is bool:
        if value is None:
            return True
        if value.lower() not in SWITCH:
            raise ConfigError(f'{what}: "{value}" is no switch', "use on or off")
        return SWITCH[value.lower()]
    if value is None or (hint is Path and not value):
        raise ConfigError(f"{what} needs a value", f"write {what.rpartition(' ')[2]}=...")
    if hint in (int, float):
        try:
            return int(value, 0) if hint is int else float(value)
        except ValueError:
            raise ConfigError(f'{what}: "{value}" is no number', "use e.g. 10") from None
    return Path(value) if hint is Path else value


def _is_own_device(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "attach")
