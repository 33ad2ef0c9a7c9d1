"""What argparse reads of a command line: all but the plain ones of options.py, and every --help."""

from __future__ import annotations

import argparse
import os
from functools import cache
from types import ModuleType
from typing import NoReturn

from ..core.errors import ConfigError
from . import options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ConfigErrors: one line, status 125."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, f"see `{self.prog} --help`")


def make(verb: str, module: ModuleType) -> Parser:
    """The parser of the verb that is in `module`."""
    parser = Parser(
        prog=f"kvmpy {verb}",
        description=(module.__doc__ or "").strip(),
        formatter_class=_formatter,
        allow_abbrev=False,  # or a script that abbreviates breaks when an option is added
    )
    fill(parser, module)
    return parser


def fill(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    """Teach it the verb's options."""
    if hasattr(module, "OPTIONS"):
        options.add_to(parser, module.OPTIONS)
    else:
        module.add_arguments(parser)


def _formatter(prog: str) -> argparse.HelpFormatter:
    """argparse makes one for each option, and would ask each time how wide the terminal is."""
    return argparse.RawDescriptionHelpFormatter(prog, width=_columns() - 2)


@cache
def _columns() -> int:
    """As shutil.get_terminal_size, which takes milliseconds to load."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80
