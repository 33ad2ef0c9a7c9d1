"""Print the machine that options and --config describe, as YAML that --config takes.

The options are those of `kvmpy boot`. Nothing is started, and no file of the machine is opened.
"""

from __future__ import annotations

import argparse

from . import settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    print(settings.dump(settings.of(args)), end="")
    return 0
