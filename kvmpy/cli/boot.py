"""Boot a kernel and connect to its console.

Without --kernel the newest kernel of this host is taken, without --initrd the built-in initramfs.
On a terminal, Ctrl-a x quits and Ctrl-a h shows the other keys.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

from ..core.errors import ConfigError
from ..core.log import LEVELS, log
from ..core.typed import TYPE_CHECKING
from ..core.units import parse_seconds
from ..foundation import Foundation
from . import load, settings
from .options import Option, switch

if TYPE_CHECKING:
    from .locked import Lock

OFF, DEFAULT = "off", "default"  # of --sandbox
TURN = 0.0002  # seconds
OPTIONS = (
    *settings.OPTIONS,
    switch("--json", help="print the outcome, console text included, as JSON"),
    switch("-v", "--verbose", help="tell what is done and why; twice: every unmapped access", count=True),
    Option(("--sandbox",), "how kvmpy locks itself in: strict, default (default) or off", "LEVEL", default=DEFAULT),
    switch("-q", "--quiet", help="no crash report"),
)


def run(args: SimpleNamespace) -> int:
    if args.verbose:
        log.threshold = LEVELS["debug" if args.verbose > 1 else "info"]
    told = settings.of(args)
    serial = told.get("serial", "null" if args.json else "stdio")
    if args.json and serial == "stdio":
        raise ConfigError("--json and --serial stdio both want standard output", "leave one of them out")
    timeout = parse_seconds(told.get("timeout"))
    config = settings.machine_config(told, terminal_words())
    kind, path = settings.parse_serial(serial)
    foundation = Foundation(config)
    lock = None
    try:
        session = load_session()  # meanwhile
        lock = make_lock(args.sandbox, json=args.json)
        status: int = session.run(args, config, kind, path, timeout, lock, foundation)
        return status
    finally:
        foundation.close()
        if lock is not None:
            lock.close()


def load_session() -> ModuleType:
    """Load what runs machines while the foundation of one is laid, whose thread need not wait long for its turns."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        return load("session")
    finally:
        sys.setswitchinterval(usual)


def make_lock(level: str, *, json: bool) -> Lock | None:
    """What locks the process in, as --sandbox has it; None: nothing."""
    if level == OFF:
        return None
    locked = load("locked")
    lock: Lock = locked.Lock(locked.check_level(level), with_json=json)
    return lock


def terminal_words() -> list[str]:
    """What the built-in init passes on to its shell about the user's terminal."""
    if not os.isatty(0) or not os.isatty(1):
        return []
    size = os.get_terminal_size(1)
    return [f"TERM={os.environ.get('TERM', 'linux')}", f"LINES={size.lines}", f"COLUMNS={size.columns}"]
