"""The `kvmpy` command."""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False  # type checkers take it for True, whatever it says

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status (see cli/__init__.py for the table)."""
    gc.disable()  # until all is loaded: cli.load
    from kvmpy import bundle

    bundle.use()
    from kvmpy.cli import main as run

    return run(sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
