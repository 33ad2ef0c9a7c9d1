"""Open a shell in a fresh machine.

It is `kvmpy run --tty` with your shell, or with /bin/sh where the guest has not this host's file system. Leave it by
`exit`, and all that was done in it is forgotten, but in volumes.
"""

from __future__ import annotations

import argparse
import os

from ..sandbox import HOST
from .run import add_options, execute, is_interactive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    shell = os.environ.get("SHELL") if args.root == HOST else None
    return execute(args, [shell or "/bin/sh"], tty=is_interactive(), whole=True)
