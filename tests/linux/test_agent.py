"""The agent in a Linux guest, over virtio-vsock: commands, files, and what is told when the guest ends."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import kvmpy
from kvmpy.boot import initramfs, kernels
from kvmpy.core.board import Reason
from kvmpy.core.errors import CommandError, GuestLost, TimedOut
from kvmpy.guest import protocol
from kvmpy.guest.client import Agent
from kvmpy.virtio.blk import Blk

vsock = pytest.importorskip("kvmpy.virtio.vsock")
LIMIT = 90.0  # seconds, for anything the guest does


@contextmanager
def guest(
    kernel: Path, folder: Path, *words: str, disk: Blk | None = None, **options: object
) -> Iterator[tuple[kvmpy.Machine, Agent]]:
    """A guest whose agent has said that it is there."""
    image = folder / "initrd"
    modules = ["virtio_mmio", "vmw_vsock_virtio_transport", *(["virtio_blk", "ext4"] if disk else [])]
    image.write_bytes(
        initramfs.build(agent=True, modules=modules, modules_dir=kernels.modules_dir_for(kernel), **options)  # type: ignore[arg-type]
    )
    vm = kvmpy.Machine(kernel=kernel, initrd=[image], append=" ".join(("quiet", *words)))
    device = vsock.Vsock()
    vm.add(device)
    if disk is not None:
        vm.add(disk)
    ready: queue.Queue[socket.socket] = queue.Queue()
    device.listen(protocol.PORT, ready.put)
    with vm:
        with ready.get(timeout=LIMIT) as told:
            told.settimeout(LIMIT)
            assert told.recv(64) == protocol.frame(protocol.Kind.HELLO, protocol.HELLO)
        yield vm, Agent(lambda: device.connect(protocol.PORT, LIMIT))


def test_all_that_the_agent_does(cloud: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "folder/file").write_bytes(bytes(range(256)) * 1000)
    (tree / "link").symlink_to("folder/file")

    with guest(cloud, tmp_path, "kvmpy.agent=only") as (vm, agent):
        done = agent.run(["sh", "-c", "cat; echo err >&2; cat /proc/self/oom_score_adj; exit 3"], input=b"in\n")
        much = agent.run(["sh", "-c", "cat | tee /dev/stderr"], input=b"x" * 600_000)
        killed = agent.run(["sh", "-c", "kill -SEGV $$"])
        nobody = agent.run(["sh", "-c", "id -u; id -G; touch /forbidden"], user="nobody")
        with pytest.raises(CommandError) as missing:
            agent.run(["nothing-like-it"])
        with pytest.raises(TimedOut) as late:
            agent.run(["sh", "-c", "echo begun; sleep 60"], timeout=1.0)
        with agent.popen(["sh", "-c", "stty size; tty; exec cat"], tty=(40, 132)) as terminal:
            assert terminal.stdin and terminal.stdout
            lines = [terminal.stdout.readline() for _ in range(2)]
            terminal.stdin.write(b"\x03")
            terminal.stdin.flush()
            interrupted = terminal.wait(LIMIT)
        agent.files.put(tree, "/tree")
        agent.run(["mv", "/tree/folder/file", "/tree/folder/moved"], check=True)
        agent.files.write("/etc/motd", b"hello\n", atomic=True)
        shown = agent.run(["cat", "/etc/motd"]).stdout
        agent.files.get("/tree", tmp_path / "back")
        agent.run(["sh", "-c", "for i in 1 2 3; do (sleep 0.1 &); done; sleep 0.5"], check=True)
        states = agent.run(["sh", "-c", "grep -h ^State: /proc/[0-9]*/status"]).stdout
        running = agent.popen(["sleep", "60"])
        with suppress(GuestLost):
            agent.run(["poweroff"], timeout=LIMIT)
        with pytest.raises(GuestLost) as lost:
            running.wait(LIMIT)
        vm.wait(LIMIT)

    assert (done.stdout, done.stderr, done.returncode) == (b"in\n0\n", b"err\n", 3)
    assert (len(much.stdout), len(much.stderr), killed.returncode) == (600_000, 600_000, -signal.SIGSEGV)
    assert nobody.stdout == b"65534\n65534\n" and b"Permission denied" in nobody.stderr
    assert (missing.value.status, late.value.stdout) == (127, b"begun\n")
    assert (lines, interrupted) == ([b"40 132\r\n", b"/dev/pts/0\r\n"], -signal.SIGINT)
    assert shown == b"hello\n"
    assert (tmp_path / "back/folder/moved").read_bytes() == (tree / "folder/file").read_bytes()
    assert (tmp_path / "back/link").readlink() == Path("folder/file")
    assert b"Z (zombie)" not in states
    assert lost.value.status == 255


def test_the_agent_beside_a_command(cloud: Path, tmp_path: Path) -> None:
    """The command ends the guest as it does without an agent."""
    command = "while ! [ -e /go ]; do sleep 0.1; done; echo gone; exit 4"
    with guest(cloud, tmp_path, "kvmpy.agent=1", exec=command) as (vm, agent):
        agent.files.write("/go", b"")
        vm.wait_for_console("gone", LIMIT)
        result = vm.wait(LIMIT)

    assert (result.reason, result.status) == (Reason.EXIT, 4)


def test_the_agent_in_the_root_of_a_disk(cloud: Path, tmp_path: Path) -> None:
    """Without anything of the disk running, and without the agent being on it."""
    folder, disk, busybox = tmp_path / "root", tmp_path / "disk", initramfs.find_busybox()
    for name in ("bin", "dev", "proc", "sys"):
        (folder / name).mkdir(parents=True)
    assert busybox is not None
    (folder / "bin/busybox").write_bytes(busybox.read_bytes())
    (folder / "bin/busybox").chmod(0o755)
    (folder / "marker").write_text("of the disk")
    mke2fs = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(folder), str(disk), "24M"]
    subprocess.run(mke2fs, check=True, env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})

    with guest(cloud, tmp_path, "kvmpy.agent=only root=/dev/vda", disk=Blk(path=disk)) as (_, agent):
        marker = agent.files.read("/marker")
        processes = agent.run(["/bin/busybox", "ps"]).stdout
        names = [info.name for info in agent.files.list("/")]

    assert marker == b"of the disk"
    assert b"kvmpy-agent" in processes
    assert names == ["bin", "dev", "lost+found", "marker", "proc", "sys"]
