"""Copy a file or a folder to a machine that has a name, or from it.

    kvmpy cp SRC NAME:DST         kvmpy cp NAME:SRC DST

Paths in the guest start at /. Into a folder that is there, the copy goes with its name; what is there already is
replaced, a folder merged. A file of this host with a colon in its name is written ./a:b. In the guest all is done by
root; for a tar archive there is `kvmpy exec NAME -- tar -c ... | ...`.
"""

from __future__ import annotations

import argparse
import errno
import re
from pathlib import Path, PurePosixPath

from .. import named
from ..core.errors import ConfigError, GuestFileError, NotFoundError
from ..guest.client import Agent
from ..guest.files import Files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a path, or NAME:PATH")
    add("target", metavar="DST", help="the same; one of the two is in a machine")


def run(args: argparse.Namespace) -> int:
    source, target = split(args.source), split(args.target)
    if (source[0] is None) == (target[0] is None):
        raise ConfigError("one of the two paths has to be in a machine", "write that one as NAME:PATH")
    machine = named.find(source[0] or target[0] or "")
    machine.must_run()
    files = Agent(machine).files
    if source[0] is None:
        put(files, source[1], target[1])
    else:
        get(files, source[1], target[1])
    return 0


def split(text: str) -> tuple[str | None, str]:
    """The machine, if any, and the path; raises ConfigError."""
    match = re.fullmatch(rf"({named.NAME}):(.*)", text, re.DOTALL | re.ASCII)
    if match is None:
        return None, text
    if not match[2]:
        raise ConfigError(f'"{text}" names no file', f"use e.g. {match[1]}:/tmp")
    return match[1], match[2]


def put(files: Files, source: str, target: str) -> None:
    """Copy a file or folder of the host into the guest."""
    host = Path(source)
    files.put(host, _inside(target, host.resolve().name) if _is_folder(files, target) else target)


def get(files: Files, source: str, target: str) -> None:
    """Copy a file or folder of the guest to the host."""
    host = Path(target)
    if host.is_dir():
        host /= PurePosixPath("/", source).name or "root"
    elif target.endswith("/") and not files.stat(source).is_folder:
        raise NotFoundError(f'there is no folder "{target}" on the host', "make it first")
    files.get(source, host)


def _is_folder(files: Files, path: str) -> bool:
    try:
        return files.stat(path).is_folder
    except GuestFileError as error:
        if error.errno != errno.ENOENT or path.endswith("/"):
            raise
        return False


def _inside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"
