"""AsyncSandbox; the agent is a process of this machine, in no guest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from subprocess import PIPE
from typing import Any, Self

import pytest
from agents import LIMIT, NativeAgent, has_ended

import kvmpy
from kvmpy import aio
from kvmpy.guest import changes
from kvmpy.sandbox import Sandbox


@pytest.fixture(autouse=True)
def native(agent: NativeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sandboxes without a machine."""

    class NativeSandbox(Sandbox):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._agent, self.files = agent, agent.files

        def start(self) -> Self:
            return self

    monkeypatch.setattr(aio, "Sandbox", NativeSandbox)


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, LIMIT))


def test_run() -> None:
    async def scene() -> None:
        async with kvmpy.AsyncSandbox(env={"A": "1"}) as sandbox:
            done = await sandbox.run(
                "sh", "-c", "cat; echo $A $B >&2; exit 3", input="in", env={"B": "2"}, timeout=LIMIT
            )
            assert (done.stdout, done.stderr, done.returncode) == (b"in", b"1 2\n", 3)
            with pytest.raises(kvmpy.CommandFailed):
                await sandbox.run("false", check=True)
            with pytest.raises(kvmpy.CommandError):
                await sandbox.run("/nonexistent")
            with pytest.raises(kvmpy.TimedOut):
                await sandbox.run("sleep", "1000", timeout=0.2)

    play(scene())


def test_many_at_once() -> None:
    async def scene() -> None:
        async with kvmpy.AsyncSandbox() as sandbox:
            begin = time.monotonic()
            done = await asyncio.gather(*(sandbox.run("sh", "-c", f"sleep 1; echo {n}") for n in range(20)))
            assert [one.stdout for one in done] == [b"%d\n" % n for n in range(20)]
            assert time.monotonic() - begin < 10

    play(scene())


def test_a_command_that_is_cancelled_is_killed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with kvmpy.AsyncSandbox() as sandbox:
            task = asyncio.create_task(sandbox.run("sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 1000"))
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    play(scene())
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_a_process_to_talk_to() -> None:
    async def scene() -> None:
        async with kvmpy.AsyncSandbox() as sandbox, await sandbox.popen("sh", stdin=PIPE, stdout=PIPE) as process:
            await process.write(b"echo $((6*7))\n")
            assert await process.readline() == b"42\n"
            await process.write(b"exit 5\n")
            process.end_input()
            assert await process.read() == b""
            assert await process.wait(LIMIT) == 5
            assert process.returncode == 5

    play(scene())


def test_files(tmp_path: Path) -> None:
    async def scene() -> None:
        async with kvmpy.AsyncSandbox() as sandbox:
            await sandbox.files.write(tmp_path / "file", b"text")
            assert await sandbox.files.read(tmp_path / "file") == b"text"
            with pytest.raises(kvmpy.GuestFileError):
                await sandbox.files.read(tmp_path / "none")
            with pytest.raises(AttributeError):
                sandbox.files.nonsense  # noqa: B018

    play(scene())


def test_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UPPER", "LOWER"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(changes, name, str(tmp_path / name))
    (tmp_path / "UPPER/new").write_text("x")

    async def scene() -> None:
        async with kvmpy.AsyncSandbox() as sandbox:
            await sandbox.prepare()
            assert list(map(str, await sandbox.diff())) == ["A /new"]
            assert await sandbox.keep(tmp_path / "kept") == []
            assert sandbox.image is None

    play(scene())
    assert (tmp_path / "kept/new").read_text() == "x"
