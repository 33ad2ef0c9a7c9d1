"""All that a shared folder can do, on a thread that is locked in as that of the device is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shares import Client
from test_fuse import *  # noqa: F403 - the tests, with another `mount`
from test_fuse import Mount

from kvmpy.host.fuse import FuseServer
from kvmpy.jail import lock
from kvmpy.jail.lock import REFER, Jail, landlock_abi

globals().pop("test_a_swap_at_any_moment_leads_nowhere")  # it traces the thread of the server, which is this one there
pytestmark = pytest.mark.skipif(landlock_abi() < REFER, reason="this kernel has no Landlock that allows renames")


def lock_in(folders: list[tuple[Path, bool]]) -> None:
    """What Jail.lock does that is a thread's own affair, and what the device's thread does."""
    lock._no_new_privileges()
    lock._few_capabilities(lock.FILE_CAPABILITIES)
    lock._landlock(folders)
    jail = Jail("default", reaching=True)
    jail._seccomp("process")
    jail._seccomp("loop")


@pytest.fixture
def mount(folder: Path) -> Iterator[Mount]:
    servers: list[tuple[FuseServer, ThreadPoolExecutor]] = []

    def mount(**options: object) -> Client:
        folders = [(folder, not options.get("read_only"))]
        thread = ThreadPoolExecutor(1, initializer=lock_in, initargs=(folders,))
        server = FuseServer(folder, **options)
        servers.append((server, thread))

        def work(parts: Sequence[bytes], room: int) -> bytes:
            answer = bytearray(room)
            return bytes(answer[: server.serve([memoryview(part) for part in parts], [memoryview(answer)])])

        client = Client(lambda parts, room: thread.submit(work, parts, room).result())
        client.server = server  # type: ignore[attr-defined]
        client.init()
        return client

    yield mount
    for server, thread in servers:
        server.close()
        thread.shutdown()


def test_the_thread_is_locked_in(mount: Mount, folder: Path) -> None:
    client = mount()
    seen: list[str] = []

    def look() -> None:
        for attempt in (lambda: Path("/etc/passwd").read_bytes(), os.fork, lambda: os.listdir(folder.parent)):
            try:
                attempt()
            except OSError as error:
                seen.append(type(error).__name__)

    client.server.serve = lambda *_: look() or 0  # type: ignore[attr-defined, func-returns-value]
    client.serve([b""], 64)

    assert seen == ["PermissionError"] * 3
