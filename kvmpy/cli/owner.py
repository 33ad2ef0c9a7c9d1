"""The process that owns a machine with a name, in the foreground or in the background."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from .. import named
from ..console import Console
from ..core import progress
from ..core.board import Reason, Stop
from ..core.errors import ConfigError, GuestLost, HostError, KvmpyError
from ..core.events import EventLoop
from ..core.units import parse_seconds
from ..guest import protocol
from ..guest.process import Process
from ..host.recent import Recent
from ..named import CONSOLE, OUTPUT, OWNER, SOCKET, Claim
from ..sandbox import Sandbox
from . import command, relay, run, tell
from .outcome import Outcome

CONSOLE_KEPT = 1 << 20  # bytes
ENDED_ORDERLY = (Reason.QUIT, Reason.POWEROFF, Reason.RESET, Reason.HALT)
WATCH_SECONDS = 2.0  # between two looks whether the machine's folder is still there
KILLED = 128 + signal.SIGKILL


@contextmanager
def holding(name: str, outcome: Outcome) -> Iterator[Claim]:
    """The name, as long as the block runs in the foreground."""
    claim = named.claim(name)
    ended = {"why": "its owner has failed"}
    try:
        claim.note_owner()
        yield claim
        ended = how_it_ended(outcome.status, outcome.error)
    except KvmpyError as error:
        ended = how_it_ended(error.status, error)
        raise
    except SystemExit as signalled:
        ended = how_it_ended(int(signalled.code or 0))
        raise
    except KeyboardInterrupt:
        ended = how_it_ended(128 + signal.SIGINT)
        raise
    finally:
        remember(claim, ended)


def how_it_ended(status: int, error: KvmpyError | None = None) -> dict[str, Any]:
    """What is to be remembered: a machine that is lost has no status."""
    why = {} if error is None else {"why": str(error)}
    return why if isinstance(error, GuestLost) else {"status": status} | why


def remember(claim: Claim, ended: dict[str, Any]) -> None:
    """Note the end of the machine, and let go of its name."""
    with suppress(KvmpyError):  # no room: then it is lost
        claim.note(ended=time.time(), **ended)
    claim.close()


def ends(claim: Claim) -> dict[str, Any]:
    """Options of the Sandbox: where others reach its guest, and where its console goes."""
    return {
        "vsock": claim.folder / SOCKET,
        "endpoint": lambda loop, console: KeptConsole(claim, loop, console),
    }


def describe(claim: Claim, args: argparse.Namespace, words: list[str], sandbox: Sandbox) -> None:
    """What others see of the machine."""
    config = sandbox.machine.config
    claim.note(
        created=time.time(),
        detached=args.detach,
        command=words,
        cpus=config.cpus,
        mem=config.mem,
        root=str(args.root),
        network=args.net,
        publish=args.publish,
        volumes=args.volume,
        env=sandbox.env,
        cwd=sandbox.cwd,
        user=sandbox.user,
    )


def in_background(args: argparse.Namespace, words: list[str]) -> int:
    """Start a machine whose owner is a child of this process; returns when its command runs, and in that child again,
    when it has ended."""
    if args.json is not None:
        raise ConfigError("--json tells of the end, which --detach does not wait for", "ask `kvmpy ps --all --json`")
    relay.starting()
    claim = named.claim(args.name)
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        return _Owner(args, words, claim, tells).live()
    os.close(tells)
    claim.close()
    try:
        with progress.working("starting a machine"), open(told, "rb") as answers:
            answer = answers.read()
    except BaseException:  # a signal: for both
        os.kill(child, signal.SIGTERM)
        _forget(child, claim.name)
        raise
    if not answer:
        raise HostError(f'the owner of machine "{claim.name}" has died', f"see {claim.folder / OWNER}")
    error = json.loads(answer)
    if not error:
        print(claim.name)
        return 0
    _forget(child, claim.name)
    tell(f"kvmpy: {error['text']}")
    return int(error["status"])


def _forget(child: int, name: str) -> None:
    """Nothing of a machine that has not started is to be left."""
    os.waitpid(child, 0)
    with suppress(KvmpyError):  # it is another one's already
        named.find(name).remove()


class _Owner:
    """The child. It says through the pipe `tells` that all is well, or what is not."""

    def __init__(self, args: argparse.Namespace, words: list[str], claim: Claim, tells: int) -> None:
        self._args, self._words, self._claim, self._tells = args, words, claim, tells

    def live(self) -> int:
        """All of its life; its exit status, which nobody wants to know."""
        claim = self._claim
        ended: dict[str, Any] = {"why": "its owner has failed"}
        try:
            self._leave_home()
            claim.note_owner()
            ended = self._own()
        except KvmpyError as error:
            ended = how_it_ended(error.status, error)
            self._answer({"text": str(error), "status": error.status})
            if isinstance(error, GuestLost):
                tell(error.report)
        except SystemExit as signalled:  # before there was a command to be told
            status = int(signalled.code or 0)
            ended = how_it_ended(status)
            self._answer({"text": f'machine "{claim.name}" was stopped at its start', "status": status})
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            remember(claim, ended)
        return 0

    def _watch(self) -> None:
        """End a machine that nobody can find any more, since its folder has gone."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(WATCH_SECONDS)
            if not self._claim.is_found():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGHUP)
                return

    def _own(self) -> dict[str, Any]:
        """Own a machine until it ends; what is to be remembered of that."""
        args = self._args
        timeout = parse_seconds(args.timeout)
        sandbox, words = run.make_sandbox(args, self._words, self._claim, tty=args.tty)
        log = Recent(self._claim.folder / OUTPUT)
        with run.started(args, sandbox):
            self._claim.note(running=True)
            threading.Thread(target=self._watch, name="kvmpy-watch", daemon=True).start()
            if not words:
                return self._wait(sandbox)
            streams = command.streams(tty=args.tty, stdin=False)
            with sandbox.popen(*words, **streams) as process:
                self._answer({})
                return how_it_ended(Keeper(process, log).run(timeout))

    def _wait(self, sandbox: Sandbox) -> dict[str, Any]:
        """Until somebody ends a machine that has no command."""

        def end(number: int, frame: FrameType | None) -> None:
            sandbox.machine.stop(Stop(Reason.QUIT))

        for number in relay.ENDING:
            signal.signal(number, end)
        self._answer({})
        stop = sandbox.wait()
        assert stop is not None
        if stop.reason in ENDED_ORDERLY:
            return how_it_ended(0)
        tell(sandbox.report)
        return {"why": str(stop)}

    def _answer(self, error: dict[str, Any]) -> None:
        """Tell the parent, once: nothing went wrong, or what."""
        if self._tells >= 0:
            with suppress(BrokenPipeError):  # it was killed
                os.write(self._tells, json.dumps(error).encode())
            os.close(self._tells)
            self._tells = -1

    def _leave_home(self) -> None:
        """A session of its own, and nothing of the one who has started it."""
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(self._claim.folder / OWNER, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(null, 0)
        for fd in (1, 2):
            os.dup2(log, fd)
        os.close(log)
        os.close(null)
        for fd in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the one that has listed them
                if fd > 2 and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:  # inherited: ours all have it
                    os.close(fd)
        progress.show()


class Keeper(relay.Relay):
    """Carries a command that has nobody in front of it: its output goes to a log."""

    def __init__(self, process: Process, log: Recent) -> None:
        super().__init__(process, tty=False)
        self._log = log

    def _put(self, fd: int, data: bytes) -> None:
        self._log.write(protocol.frame(protocol.Kind.DATA, data, fd))

    def _pass_in(self) -> None:
        """There is no input, and no end of it."""

    def _asked_to_end(self, number: signal.Signals) -> int | None:
        if number == signal.SIGHUP:
            return KILLED
        self._process.send_signal(signal.SIGTERM, group=True)
        return None


class KeptConsole:
    """The host's end of a console that is kept in the machine's folder."""

    def __init__(self, claim: Claim, loop: EventLoop, console: Console) -> None:
        self._console = console
        self._log = Recent(claim.folder / CONSOLE, CONSOLE_KEPT)

    def write(self, data: bytes) -> None:
        self._log.write(data)
        self._console.sent(len(data))

    def pause(self) -> None:
        return

    def resume(self) -> None:
        return

    def close(self) -> None:
        self._log.close()
