"""A command in the guest, as subprocess has commands of the host; no thread stands behind it.

Whoever waits for something (its end, output, room for input) receives for all: one thread at a time, in turn.
"""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from ..core.errors import CommandError, GuestError, GuestLost, TimedOut, TooLarge
from . import protocol
from .link import Connect, Link, deadline_after, failure, unexpected
from .protocol import LIMIT, MAX_DATA, WINDOW, Exit, Frame, Kind, Number, Run, Size
from .request import flags_of, request, shown
from .streams import Input, Output


class Process:
    """A running command; made by `Agent.popen`. All methods may be called from any thread.

    `stdin`, `stdout` and `stderr` are binary files where PIPE was asked for, else None. With a terminal the first two
    are its own.
    """

    def __init__(
        self,
        connect: Connect,
        args: Sequence[str | bytes],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        umask: int = 0o022,
        rlimits: Mapping[int, tuple[int, int]] | None = None,
        tty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.args = tuple(args)
        self.pid = 0
        self.usage: Exit | None = None  # what its end has told, besides the status
        flags = flags_of(stdin, stdout, stderr, tty is not None)
        frame = request(self.args, flags, env or {}, cwd, user, umask, rlimits or {}, tty or (0, 0))
        self._changed = threading.Condition()
        self._receiving = False
        self._broken: Exception | None = None
        self._buffers = {
            stream: bytearray()
            for stream, flag in ((protocol.STDOUT, Run.STDOUT | Run.TTY), (protocol.STDERR, Run.STDERR))
            if flags & flag
        }
        self._open = set(self._buffers)  # streams that have not ended
        self._credit = dict.fromkeys(self._buffers, 0)  # bytes that were read, for which there was no WINDOW yet
        self._window = WINDOW
        self._input_open = bool(flags & (Run.STDIN | Run.TTY))
        self._input_read = self._input_open
        self._collected = {stream: bytearray() for stream in self._buffers}
        self._to_send: memoryview | None = None
        begin = deadline_after(timeout)
        self._link = Link(connect, frame, timeout)
        self.stdin = io.BufferedWriter(Input(self)) if self._input_open else None
        self.stdout = self._file(protocol.STDOUT)
        self.stderr = self._file(protocol.STDERR)
        try:
            if not self._until(lambda: bool(self.pid), begin):
                raise TimedOut(f"{shown(self.args)} was not started within {timeout:g} s")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def returncode(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None as long as nobody has seen that."""
        if self.usage is None:
            return None
        return -self.usage.signal if self.usage.signal else self.usage.status

    def poll(self) -> int | None:
        """`returncode` as it is now; raises GuestLost."""
        self._until(lambda: self.usage is not None, time.monotonic())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command; raises TimedOut, GuestLost.

        It may never end when it writes more to a pipe than is read (256 KiB): use `communicate` then.
        """
        if not self._until(lambda: self.usage is not None, deadline_after(timeout)):
            raise TimedOut(f"{shown(self.args)} has not ended within {timeout:g} s")
        assert self.returncode is not None
        return self.returncode

    def communicate(self, input: bytes = b"", timeout: float | None = None, limit: int = LIMIT) -> tuple[bytes, bytes]:
        """Send `input` and its end, read all output, wait for the end; stdout and stderr.

        Raises GuestLost, TooLarge when one of them has more than `limit` bytes, and TimedOut. After the latter two the
        command still runs, and `communicate()` may be called again to go on.
        """
        deadline = deadline_after(timeout)
        if self._to_send is None:
            if self.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self.stdin.flush()
            self._to_send = memoryview(bytes(input))
        while True:
            self._push_input(deadline)
            self._collect(limit)
            if self._is_complete():
                break
            if not self._until(self._has_work, deadline):
                out, err = self._output()
                raise TimedOut(f"{shown(self.args)} has not ended within {timeout:g} s", "", out, err)
        self.close()
        return self._output()

    def send_signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the command, with `group` to all of its process group; nothing when it has ended."""
        if group or self.usage is None:
            stream = protocol.TO_GROUP if group else protocol.TO_COMMAND
            self._tell(protocol.frame(Kind.SIGNAL, bytes(Number(signal.Signals(number))), stream))

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self, group: bool = False) -> None:
        self.send_signal(signal.SIGKILL, group)

    def kill_all(self) -> None:
        """Kill the command, with all that it has started, wherever that is now; also when it has ended itself."""
        self._tell(protocol.frame(Kind.SIGNAL, bytes(Number(signal.SIGKILL)), protocol.TO_ALL))

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size."""
        self._tell(protocol.frame(Kind.RESIZE, bytes(Size(rows, columns))))

    def close(self) -> None:
        """Let go of the command: if it has not ended, it is killed with all that it has started."""
        with self._changed:
            if self._broken is None:
                self._broken = GuestLost(f"{shown(self.args)} was let go of")
            self._changed.notify_all()
            busy = self._receiving
        if busy:
            self._link.shut_down()  # who receives will then close it
        else:
            self._link.close()

    # What the files of its streams use.

    def read_into(self, stream: int, buffer: memoryview) -> int:
        """Wait for output of `stream`, and move what fits into `buffer`; how much that was, 0 at its end."""
        self._until(lambda: bool(self._buffers[stream]) or stream not in self._open, None)
        with self._changed:
            data = self._buffers[stream]
            size = min(len(data), len(buffer))
            buffer[:size] = memoryview(data)[:size]
            del data[:size]
        self._return_credit(stream, size)
        return size

    def write_input(self, data: memoryview, deadline: float | None = None) -> int:
        """Wait for room, and send what fits; how much that was, 0 at the deadline. Raises BrokenPipeError."""
        size = 0
        while not size:
            if not self._until(lambda: self._window > 0 or not self._input_read, deadline):
                return 0
            with self._changed:
                if not self._input_read or not self._input_open:
                    raise BrokenPipeError(errno.EPIPE, "nobody reads the input of the command")
                size = min(len(data), self._window, MAX_DATA)
                self._window -= size
        self._link.send(protocol.frame(Kind.DATA, bytes(data[:size]), protocol.STDIN), deadline)
        return size

    def end_input(self) -> None:
        """Send the end of stdin, once."""
        with self._changed:
            is_open, self._input_open = self._input_open, False
        if is_open:
            self._tell(protocol.frame(Kind.EOF, stream=protocol.STDIN))

    # Receiving.

    def _until(self, condition: Callable[[], bool], deadline: float | None) -> bool:
        """Receive, or let another thread receive, until `condition` holds; False at the deadline."""
        with self._changed:
            while not condition():
                if self._broken is not None:
                    raise self._broken
                if self._receiving:
                    left = None if deadline is None else deadline - time.monotonic()
                    if not self._changed.wait(left):
                        return condition()
                    continue
                self._receiving = True
                self._changed.release()
                frames: list[Frame] = []
                broken: Exception | None = None
                try:
                    frames = self._link.receive(deadline)
                except GuestLost as error:
                    broken = error
                finally:
                    self._changed.acquire()
                    self._receiving = False
                    self._changed.notify_all()
                self._take(frames, broken)
                if not frames and broken is None:
                    return condition()
                if deadline is not None and time.monotonic() >= deadline:  # however much it still has to say
                    return condition()
        return True

    def _take(self, frames: list[Frame], broken: Exception | None) -> None:
        """Note what has come; holds the condition."""
        try:
            for frame in frames:
                self._act(*frame)
        except GuestError as error:
            broken = GuestLost(str(error))
        except (GuestLost, CommandError) as error:
            broken = error
        if self._broken is None:
            self._broken = broken
        if self._is_done():
            self._broken = self._broken or GuestLost("the command has ended")
        if self._broken is not None:
            self._input_read = False
            self._link.close()

    def _act(self, kind: Kind, stream: int, payload: bytes) -> None:
        if kind == Kind.ERROR:
            raise failure(payload)
        if kind == Kind.STARTED and not self.pid:
            self.pid = protocol.parse(Number, payload).value
        elif not self.pid:
            raise unexpected(kind)
        elif kind == Kind.DATA and stream in self._open:
            buffer = self._buffers[stream]
            if len(buffer) + self._credit[stream] + len(payload) > WINDOW:
                raise GuestLost("the guest's agent sent more than there was room for")
            buffer += payload
        elif kind == Kind.EOF and stream in self._open:
            self._open.remove(stream)
        elif kind == Kind.EOF and stream == protocol.STDIN:
            self._input_read = False
        elif kind == Kind.WINDOW and stream == protocol.STDIN:
            self._window = min(self._window + protocol.parse(Number, payload).value, WINDOW)
        elif kind == Kind.EXIT and self.usage is None:
            usage = protocol.parse(Exit, payload)
            if usage.status > 255 or usage.signal > signal.NSIG:
                raise GuestLost(f"the guest's agent sent an end with status {usage.status}, signal {usage.signal}")
            self.usage = usage
        else:
            raise unexpected(kind)

    def _return_credit(self, stream: int, size: int) -> None:
        with self._changed:
            self._credit[stream] += size
            credit = self._credit[stream]
            if credit < WINDOW // 2 or stream not in self._open:
                return
            self._credit[stream] = 0
        self._tell(protocol.frame(Kind.WINDOW, bytes(Number(credit)), stream))

    def _tell(self, frame: bytes) -> None:
        """Send without waiting; to nobody when the command has gone."""
        if not self._link.closed:
            self._link.send(frame, time.monotonic())

    def _is_done(self) -> bool:
        """Whether the agent has no more to say."""
        return self.usage is not None and not self._open

    # communicate().

    def _is_complete(self) -> bool:
        return self._is_done() and not any(self._buffers.values())

    def _has_work(self) -> bool:
        return any(self._buffers.values()) or self._can_send() or self._is_done()

    def _can_send(self) -> bool:
        """Whether `write_input` would not wait: it may find out that nobody reads."""
        return self._input_open and (self._window > 0 or not self._input_read)

    def _push_input(self, deadline: float | None) -> None:
        try:
            while self._to_send and self._can_send():
                self._to_send = self._to_send[self.write_input(self._to_send, deadline) :]
        except (BrokenPipeError, GuestLost):  # a lost guest is told of where its end is waited for
            self._to_send = memoryview(b"")
        if not self._to_send:
            self.end_input()

    def _collect(self, limit: int) -> None:
        is_over = False
        for stream, buffer in self._buffers.items():
            collected = self._collected[stream]
            with self._changed:
                size = min(len(buffer), limit - len(collected))
                collected += buffer[:size]
                del buffer[:size]
                is_over = is_over or bool(buffer)
            self._return_credit(stream, size)
        if is_over:
            what = f"{shown(self.args)} has written more than {limit} bytes"
            raise TooLarge(what, "give it a larger limit, or read its output as it comes: popen", *self._output())

    def _output(self) -> tuple[bytes, bytes]:
        return tuple(bytes(self._collected.get(stream, b"")) for stream in (protocol.STDOUT, protocol.STDERR))  # type: ignore[return-value]

    def _file(self, stream: int) -> io.BufferedReader | None:
        return io.BufferedReader(Output(self, stream), MAX_DATA) if stream in self._buffers else None
