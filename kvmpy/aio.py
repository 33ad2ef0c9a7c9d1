"""Sandboxes for asyncio: `AsyncSandbox`, with the names of Sandbox; what waits there is awaited here.

    async with kvmpy.AsyncSandbox() as sandbox:
        done = await sandbox.run("uname", timeout=10)
        texts = await asyncio.gather(*(sandbox.files.read(name) for name in names))

Threads wait for the guest, one for each call that is under way. A command whose `run` is cancelled is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from subprocess import DEVNULL, PIPE
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .guest.client import Word
from .guest.completed import Completed, complete
from .guest.files import Files
from .guest.link import deadline_after
from .guest.process import Process
from .guest.protocol import LIMIT
from .machine import Machine
from .sandbox import Sandbox

if TYPE_CHECKING:
    from .guest.changes import Change
    from .oci.manifest import Config

MAX_CALLS = 256  # under way at once; further ones wait for their turn

T = TypeVar("T")


class AsyncSandbox:
    """Its options are those of Sandbox, and so are the errors. Its methods are for one event loop."""

    def __init__(self, **options: Any) -> None:
        self._sandbox = Sandbox(**options)
        self._threads = ThreadPoolExecutor(MAX_CALLS, "kvmpy-async")
        self.files = AsyncFiles(self._sandbox.files, self._call)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def machine(self) -> Machine:
        return self._sandbox.machine

    async def start(self) -> Self:
        """As Sandbox.start; when it is cancelled the machine is gone on return."""
        try:
            await self._call(self._sandbox.start)
        except asyncio.CancelledError:
            await asyncio.shield(self.close())
            raise
        return self

    async def close(self) -> None:
        """End the machine and all that runs in it; safe to call twice."""
        await asyncio.get_running_loop().run_in_executor(None, self._sandbox.close)
        self._threads.shutdown(wait=False)

    async def run(
        self,
        *argv: Word,
        input: bytes | str | None = None,
        timeout: float | None = None,
        check: bool = False,
        limit: int = LIMIT,
        **options: Any,
    ) -> Completed:
        """As Sandbox.run."""
        data = input.encode() if isinstance(input, str) else input
        deadline = deadline_after(timeout)
        pipes = {"stdin": DEVNULL if data is None else PIPE, "stdout": PIPE, "stderr": PIPE}
        process = await self._start_process(argv, {**pipes, "timeout": timeout, **options})
        try:
            done = await self._call(complete, process, data, timeout, deadline, limit)
        finally:
            process.close()
        return done.check() if check else done

    async def popen(self, *argv: Word, **options: Any) -> AsyncProcess:
        """As Sandbox.popen."""
        return AsyncProcess(await self._start_process(argv, options), self._call)

    def publish(self, port: str | int) -> int:
        """As Sandbox.publish."""
        return self._sandbox.publish(port)

    def logs(self) -> str:
        return self._sandbox.logs()

    def metrics(self) -> dict[str, float]:
        return self._sandbox.metrics()

    @property
    def image(self) -> Config | None:
        return self._sandbox.image

    async def prepare(self) -> None:
        await self._call(self._sandbox.prepare)

    async def diff(self) -> tuple[Change, ...]:
        return await self._call(self._sandbox.diff)

    async def keep(self, host: str | PathLike[str]) -> list[str]:
        return await self._call(self._sandbox.keep, host)

    async def pause(self) -> None:
        await self._call(self._sandbox.pause)

    async def resume(self) -> None:
        await self._call(self._sandbox.resume)

    async def _start_process(self, argv: tuple[Word, ...], options: dict[str, Any]) -> Process:
        future = self._threads.submit(self._sandbox.popen, *argv, **options)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_let_go)
            raise

    def _call(self, function: Callable[..., T], *args: Any, **named: Any) -> Awaitable[T]:
        return asyncio.wrap_future(self._threads.submit(function, *args, **named))


class AsyncProcess:
    """A running command; `process` is the Process itself, for all that does not wait."""

    def __init__(self, process: Process, call: Callable[..., Awaitable[Any]]) -> None:
        self.process = process
        self._call = call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    async def wait(self, timeout: float | None = None) -> int:
        """As Process.wait."""
        code: int = await self._call(self.process.wait, timeout)
        return code

    async def communicate(
        self, input: bytes = b"", timeout: float | None = None, limit: int = LIMIT
    ) -> tuple[bytes, bytes]:
        """As Process.communicate."""
        output: tuple[bytes, bytes] = await self._call(self.process.communicate, input, timeout, limit)
        return output

    async def read(self, size: int = 1 << 16) -> bytes:
        """The next output, at most `size` bytes; b"" at its end."""
        assert self.process.stdout is not None, "the command has no stdout=PIPE"
        data: bytes = await self._call(self.process.stdout.read1, size)
        return data

    async def readline(self) -> bytes:
        """The next line of output, with its end."""
        assert self.process.stdout is not None, "the command has no stdout=PIPE"
        data: bytes = await self._call(self.process.stdout.readline)
        return data

    async def write(self, data: bytes) -> None:
        """Send input, and wait until the guest has taken it."""
        assert self.process.stdin is not None, "the command has no stdin=PIPE"
        await self._call(self.process.stdin.write, data)
        await self._call(self.process.stdin.flush)

    def end_input(self) -> None:
        self.process.end_input()

    def send_signal(self, number: int, group: bool = False) -> None:
        self.process.send_signal(number, group)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self, group: bool = False) -> None:
        self.process.kill(group)

    def kill_all(self) -> None:
        self.process.kill_all()


class AsyncFiles:
    """The methods of Files, each to be awaited."""

    def __init__(self, files: Files, call: Callable[..., Awaitable[Any]]) -> None:
        self._files = files
        self._call = call

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._files, name)
        if name.startswith("_") or not callable(method):
            raise AttributeError(name)
        return lambda *args, **named: self._call(method, *args, **named)


def _let_go(future: Future[Process]) -> None:
    """End a command that was started for nobody."""
    if not future.cancelled() and future.exception() is None:
        future.result().close()
