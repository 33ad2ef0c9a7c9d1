"""Print the machine that options and --config describe, as YAML that --config takes.

The options are those of `kvmpy boot`. Nothing is started, and no file of the machine is opened.
"""

from __future__ import annotations

from types import SimpleNamespace

from . import settings

OPTIONS = settings.OPTIONS


def run(args: SimpleNamespace) -> int:
    print(settings.dump(settings.of(args)), end="")
    return 0
