"""Runs the machine of `kvmpy boot` with its console and signals, and tells how it ended."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import FrameType, SimpleNamespace

from .. import bundle
from ..config import MachineConfig
from ..console import Console, Endpoint
from ..core.board import Reason, Stop
from ..core.events import EventLoop
from ..core.signals import signal
from ..core.typed import TYPE_CHECKING, Any
from ..foundation import Foundation
from ..host import endpoint
from ..host.tty import Key
from ..kvm.handle import explain_bus_errors
from ..machine import Machine
from . import tell

if TYPE_CHECKING:
    from .locked import Lock

STATUS = {
    Reason.POWEROFF: 0,
    Reason.RESET: 0,
    Reason.HALT: 0,
    Reason.QUIT: 0,
    Reason.TIMEOUT: 124,
    Reason.PANIC: 253,
    Reason.TRIPLE_FAULT: 254,
    Reason.CRASH: 255,
    Reason.ERROR: 255,
}
LOST = 255
END_OF_FILE = b"\x04"  # Ctrl-d
REPORTED = {Reason.TIMEOUT, Reason.PANIC, Reason.TRIPLE_FAULT, Reason.CRASH, Reason.ERROR}
SIGNALS: dict[int, str] = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "SIGINT",
    signal.SIGHUP: "SIGHUP",
}  # with their names


def run(
    args: SimpleNamespace,
    config: MachineConfig,
    kind: str,
    path: str | None,
    timeout: float | None,
    lock: Lock | None,
    foundation: Foundation,
) -> int:
    """Run the machine and tell how it ended; returns the exit status."""
    explain_bus_errors()
    machine = Machine(
        config,
        endpoint=lambda loop, console: open_endpoint(kind, path, loop, console, machine),
        foundation=foundation,
    )
    bundle.keep()
    previous = {number: signal.signal(number, _stopper(machine)) for number in SIGNALS}
    if kind == "stdio":
        previous[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: tell_size(machine))
    try:
        machine.start(None if lock is None else lambda: lock.lock_down(machine))
        if kind == "stdio":
            tell_size(machine)
        stop = machine.wait(timeout)
        report, facts = reports(args, machine, stop, lock) if stop.reason in REPORTED else ("", None)
    finally:
        machine.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    status = exit_status(stop, asked_for_status=config.exec is not None)
    if args.json:
        import json  # not needed by most

        print(json.dumps(_outcome(machine, stop, status) | {"report": facts}))
    if not report and (args.verbose or (sys.stderr.isatty() and not args.quiet and config.exec is None)):
        report = f"kvmpy: {stop}"
    if not report and status == LOST and not args.quiet:
        report = f"kvmpy: {stop}; the command of --exec gave no exit status"
    if report:
        on_one_terminal = kind == "stdio" and sys.stderr.isatty()
        fresh_line = "\n" if on_one_terminal and not machine.console.text.endswith(("\n", "\r")) else ""
        tell(fresh_line + report, hurry=stop.reason is Reason.SIGNAL)
    return status


def reports(
    args: SimpleNamespace, machine: Machine, stop: Stop, lock: Lock | None
) -> tuple[str, dict[str, Any] | None]:
    """The crash report for people, and for --json, as far as they are wanted."""
    if lock is None:
        from ..report import crash_facts, crash_report

        report = "" if args.quiet else crash_report(machine, stop)
        return report, crash_facts(machine, stop) if args.json else None
    if args.quiet and not args.json:
        return "", None
    report, told = lock.report(machine, stop)
    facts = None
    if args.json:
        import json

        facts = json.loads(told or "null")
    return "" if args.quiet else report or f"kvmpy: {stop}", facts


def exit_status(stop: Stop, *, asked_for_status: bool) -> int:
    """The exit status of the command line for the way a machine stopped."""
    if stop.reason is Reason.EXIT:
        return stop.status
    if stop.reason is Reason.SIGNAL:
        return 128 + stop.status
    if asked_for_status and STATUS[stop.reason] == 0:
        return LOST
    return STATUS[stop.reason]


def tell_size(machine: Machine) -> None:
    """How large the user's terminal is now, for a console that has a size."""
    with suppress(OSError):  # no terminal
        size = os.get_terminal_size(1)
        machine.resize_console(size.columns, size.lines)


def open_endpoint(kind: str, path: str | None, loop: EventLoop, console: Console, machine: Machine) -> Endpoint | None:
    """The host's end of the console, as --serial names it."""
    config = machine.config

    def command(key: Key) -> None:
        if key is Key.QUIT:
            machine.stop(Stop(Reason.QUIT))
        elif key is Key.BREAK:
            console.received_break()

    if kind == "stdio":
        return endpoint.Stdio(
            loop,
            console.received if config.exec is None else None,  # a command in the guest has no input
            console.sent,
            command,
            at_end=END_OF_FILE
            if config.initrd is None
            else b"",  # ends the built-in shell; others may mean it otherwise
        )
    if kind == "pty":
        pty = endpoint.Pty(loop, console.received, console.sent)
        tell(f"kvmpy: the console is at {pty.path}")
        return pty
    if path is not None:
        if kind == "file":
            return endpoint.File(loop, path, console.sent)
        from pathlib import Path  # not needed by most

        from ..host.unix_socket import UnixSocket

        return UnixSocket(loop, Path(path), console.received, console.sent)
    return None


def _stopper(machine: Machine) -> Any:
    """A signal handler: before the guest runs it ends the process, afterwards it asks the machine to stop."""

    def handler(number: int, frame: FrameType | None) -> None:
        if not machine.started_at:
            raise SystemExit(128 + number)
        machine.stop(Stop(Reason.SIGNAL, SIGNALS[number], status=number))

    return handler


def _outcome(machine: Machine, stop: Stop, status: int) -> dict[str, Any]:
    return {
        "reason": stop.reason.name.lower(),
        "detail": stop.detail,
        "status": status,
        "seconds": round(time.monotonic() - machine.started_at, 3),
        "protocol": machine.entry.protocol,
        "cmdline": machine.cmdline,
        "init_ms": machine.boot_timer.ELAPSED / 1e6 if machine.boot_timer.ELAPSED >= 0 else None,
        "console": machine.console.text,
    }
