"""Hostile surroundings: rows 72, 77, 86 and 87 of the list of other monitors' defects."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from kvmpy.boot import cache
from kvmpy.cli import session
from kvmpy.core.board import Reason
from kvmpy.core.errors import HostError
from kvmpy.core.log import Log
from kvmpy.host.passt import Passt
from kvmpy.host.unix_socket import listen_at, remove
from kvmpy.machine import Machine
from kvmpy.testing import RingDriver
from kvmpy.virtio.device import VirtioDevice


def test_hostile_72_signal_handlers_neither_log_nor_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may interrupt whoever writes a line, or holds the lock of a machine's vCPU or loop."""
    machine = Machine(kernel="none")
    machine.started_at = 1.0
    told: list[str] = []
    monkeypatch.setattr(Log, "_emit", lambda self, level, event, fields: told.append(event))
    with machine.loop._lock, machine.console._news:
        session._stopper(machine)(signal.SIGTERM, None)
        session.tell_size(machine)

    stop = machine._stops.popleft()
    machine.close()

    assert (stop.reason, stop.status, told) == (Reason.SIGNAL, signal.SIGTERM, [])


def test_hostile_77_link_where_a_socket_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "mine").chmod(0o644)
    for number, target in enumerate(("mine", "nothing", "link1")):
        link = tmp_path / f"link{number}"
        link.symlink_to(target)

        with pytest.raises(HostError, match="cannot listen"):
            listen_at(link)

    assert (tmp_path / "mine").read_text() == "mine"
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o644
    assert sorted(os.listdir(tmp_path)) == ["link0", "link1", "link2", "mine"]


def test_hostile_77_a_socket_is_its_users_alone_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is not used a second time: it could be somebody else's file by then."""
    monkeypatch.setattr(Path, "chmod", lambda *args, **named: pytest.fail("chmod by name"))

    with listen_at(tmp_path / "socket"):
        mode = (tmp_path / "socket").stat().st_mode

    remove(tmp_path / "socket")
    assert stat.S_IMODE(mode) == 0o600
    assert os.listdir(tmp_path) == []


def test_hostile_77_links_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they lead to is neither believed nor written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = memoryview(b"compressed")
    cache.recall(source, lambda: b"first")
    (entry,) = cache.folder().iterdir()
    (tmp_path / "mine").write_text("mine")
    entry.unlink()
    entry.symlink_to(tmp_path / "mine")

    assert cache.recall(source, lambda: b"second") == b"second"
    assert (tmp_path / "mine").read_text() == "mine"
    assert cache.recall(source, lambda: b"third") == b"second"


def test_hostile_86_user_networking_is_another_process() -> None:
    """No byte of a TCP/IP stack is in this one: frames go to passt through a UNIX socket."""
    try:
        passt = Passt()
    except HostError as error:
        pytest.skip(str(error))

    assert passt.process is not None
    parent = int(Path(f"/proc/{passt.process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    passt.close()

    assert parent == os.getpid()


def test_hostile_87_buffers_larger_than_any_structure(each_device: VirtioDevice) -> None:
    """A buffer's length is the guest's; what is copied is as long as the structure that is looked for in it."""
    driver = RingDriver(each_device.board, free=0x100000)

    for readable, writable in (
        ([b"\xff" * 65536], [65536]),
        ([b"\0" * 65536], [65536]),
        ([b"A" * 65536], []),
        ([], [65536]),
    ):
        driver.start()
        for index in range(len(driver.queues)):
            driver.submit(index, readable, writable)
            driver.kick(index)
            for _, count in [] if driver.needs_reset else driver.used(index):
                assert count <= sum(writable)
        each_device.board.mem.write(0x100000, bytes(driver._free - 0x100000))
        driver._free = 0x100000
    driver.start()
    assert not driver.needs_reset
