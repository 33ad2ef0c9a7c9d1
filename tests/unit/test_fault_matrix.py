"""What becomes of a guest when its host fails: each device with each fault, and the outcome that is promised.

| fault of the host | device | the guest | the machine, and later work |
|---|---|---|---|
| EIO, ENOSPC, EFBIG, EDQUOT in a read, write, zeroing, discard | disk: raw, qcow2, snapshot | IOERR for that request | lives; the same request succeeds when the host does |
| EIO in fdatasync | disk: raw, qcow2 | IOERR for this and all later flushes: nobody knows what was lost | lives; reads and writes go on |
| EIO, ENOSPC met by the twin in C | disk: raw | IOERR, from Python, which tries again | lives; goes on |
| the image gets shorter | disk: raw | IOERR for what is not there any more | lives; goes on |
| short reads and writes, EINTR | disk: raw, qcow2 | nothing: what is left is done | lives |
| a slow disk | disk | waits for its own requests | lives: other devices have other threads |
| the peer of a socket goes, passt is killed, a tap deleted | net | link down | lives; sending is as without a cable |
| a capture's file system is full | net | nothing | lives; the capture ends, with a line in the log |
| the reader of a console goes, or its file's disk is full | console | nothing: what nobody takes is lost | lives; a file goes on when there is room |
| the peer of a named port goes | console | nothing: the port is closed, and open for the next | lives |
| the peer of a stream goes | vsock | RST | lives; other streams go on |
| EIO, ENOSPC, EDQUOT, EROFS, EMFILE | virtio-fs | that errno | lives; goes on |
| the folder is removed | virtio-fs | ENOENT; what is open can still be read | lives |
| the host does not take pages back | balloon | nothing: the pages stay where they are | lives |
| standard error is full, closed or gone | the log | nothing | lives; lines are lost |
| no memory, no descriptor, no thread | start | there is none | one line with a remedy |
| a kernel or initrd is truncated while it is read | start | there is none | one line, status 125 |
"""  # noqa: E501

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from balloons import INFLATE, Inflatable, pages
from disks import CONTENT, FEATURES, SECTORS, SIZE, Disk, failing
from images import bzimage
from nics import FRAME, PLAIN, Rig
from shares import Client
from vsocks import Guest

from kvmpy import faults
from kvmpy.core.errors import HostError
from kvmpy.core.events import EventLoop
from kvmpy.core.log import Log
from kvmpy.core.memory import GuestMemory
from kvmpy.host import endpoint, fuse_wire, passt, syscalls, tap
from kvmpy.host.fuse import FuseServer
from kvmpy.host.unix_socket import UnixSocket
from kvmpy.machine import Machine
from kvmpy.testing import FakeBoard, RingDriver, StepLoop
from kvmpy.virtio.blk import HEADER, Blk, S, T
from kvmpy.virtio.net import RX, TX
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.vsock_stream import RST, RW, SHUTDOWN

Fault = Callable[[str, int], Any]  # breaks a system call with an errno, for a `with`

ERRORS = [errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EDQUOT]
DISKS: dict[str, dict[str, Any]] = {
    "raw": {},
    "raw in several queues": {"queues": 4},
    "snapshot": {"snapshot": True},
    "qcow2": {"format": "qcow2"},
    "qcow2 snapshot": {"format": "qcow2", "snapshot": True},
}
CALLS = {  # what a request of this kind needs of the host
    "read": "os.preadv",
    "write": "os.pwritev",
    "zero": "kvmpy.host.syscalls.fallocate",
    "discard": "kvmpy.host.syscalls.fallocate",
    "flush": "os.fdatasync",
}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """`with broken(call, errno) as met:` has the host refuse a system call; `met` has the errno of each refusal."""

    @contextmanager
    def broken(call: str, number: int) -> Iterator[list[int]]:
        met: list[int] = []

        def fail(*arguments: Any, **named: Any) -> Any:
            met.append(number)
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(call, fail)
            yield met

    return broken


# Disks.


def image(tmp_path: Path, options: dict[str, Any]) -> Path:
    """An image with CONTENT."""
    path = tmp_path / "disk.img"
    path.write_bytes(qcow2() if options.get("format") == "qcow2" else CONTENT)
    return path


@cache
def qcow2() -> bytes:
    """A qcow2 image with CONTENT."""
    if not shutil.which("qemu-img"):
        pytest.skip("no qemu-img: apt-get install qemu-utils")
    with tempfile.TemporaryDirectory() as folder:
        raw, made = Path(folder, "raw"), Path(folder, "qcow2")
        raw.write_bytes(CONTENT)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=4K", raw, made], check=True)
        return made.read_bytes()


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr("kvmpy.virtio.blk.PURE", True)  # the twin makes its system calls by itself
    disk = Disk(image(tmp_path, DISKS[request.param]), FEATURES, **DISKS[request.param])
    yield disk
    disk.device.close()


def do(disk: Disk, operation: str) -> int:
    """The status of a request of this kind for sector 8, and so on."""
    if operation == "read":
        return disk.request(T.IN, 8, room=[4096])[0]
    if operation == "write":
        return disk.write(8, b"x" * 4096)
    if operation == "flush":
        return disk.request(T.FLUSH)[0]
    return disk.segments({"zero": T.WRITE_ZEROES, "discard": T.DISCARD}[operation], (0, SECTORS, 0))


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["read", "write", "zero", "discard"])
def test_disk_request_that_the_host_refuses(disk: Disk, broken: Fault, operation: str, number: int) -> None:
    with broken(CALLS[operation], number) as met:
        status = do(disk, operation)

    assert status == (S.IOERR if met else S.OK)  # a qcow2 image keeps zeros in its tables
    assert len(disk.board.logs) == bool(met)
    assert not disk.driver.needs_reset
    assert do(disk, operation) == S.OK
    assert disk.write(16, b"y" * 512) == S.OK
    assert disk.read(16, 1) == b"y" * 512
    assert disk.request(T.FLUSH)[0] == S.OK


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_flush_that_fails(disk: Disk, broken: Fault, number: int) -> None:
    """And those behind it: what could not be written may be gone, though the kernel reports it once only."""
    disk.write(8, b"x" * 512)
    with broken(CALLS["flush"], number) as met:
        first = disk.request(T.FLUSH)[0]

    later = disk.request(T.FLUSH)[0]

    assert [first, later] == ([S.IOERR] * 2 if met else [S.OK] * 2)  # what will be forgotten needs no fdatasync
    assert disk.write(16, b"y" * 512) == S.OK
    assert disk.read(16, 1) == b"y" * 512
    assert not disk.driver.needs_reset


def test_last_flush_of_an_image_that_fails(tmp_path: Path, broken: Fault) -> None:
    """When the machine ends: its other devices are closed all the same."""
    path = image(tmp_path, DISKS["qcow2"])
    disk = Disk(path, FEATURES, **DISKS["qcow2"])
    disk.write(8, b"x" * 512)

    with broken("os.fdatasync", errno.EIO):
        disk.device.close()

    assert [event for event, _ in disk.board.logs] == ["a disk may have lost what was written last"]
    again = Disk(path, FEATURES, **DISKS["qcow2"])
    assert again.read(0, 8) == CONTENT[:4096]
    again.device.close()


@pytest.mark.parametrize("cache", ["writeback", "unsafe"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("pure", [False, True])
def test_a_flush_is_done_when_its_used_entry_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, cache: str, pure: bool
) -> None:
    monkeypatch.setattr("kvmpy.virtio.blk.PURE", pure)
    disk = Disk(image(tmp_path, {"format": format}), FEATURES, format=format, cache=cache)
    disk.write(8, b"x" * 512)
    seen: list[tuple[list[tuple[int, int]], bytes]] = []
    real = os.fdatasync

    def watched(fd: int) -> None:
        seen.append((disk.driver.used(0), disk.driver.data(0, flush)))
        real(fd)

    flush = disk.submit(T.FLUSH)
    monkeypatch.setattr(os, "fdatasync", watched)
    disk.driver.kick(0)
    finished = disk.driver.used(0)
    disk.device.close()

    assert finished == [(flush, 1)]
    assert all(used == [] for used, _ in seen)
    assert bool(seen) == (cache == "writeback")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_driver_that_cannot_flush_has_each_write_flushed(
    tmp_path: Path, syncs: list[int], monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr("kvmpy.virtio.blk.PURE", False)
    disk = Disk(image(tmp_path, {"format": format}), 1 << 32, format=format)

    counts = []
    for _ in range(2):
        before = len(syncs)
        disk.write(8, os.urandom(512))
        counts.append(len(syncs) - before)
    disk.device.close()

    assert min(counts) > 0


@contextmanager
def replaced(fd: int, path: str, flags: int) -> Iterator[None]:
    """The descriptor `fd` is one of the file `path` meanwhile: real errors, which the twin meets, too."""
    kept, other = os.dup(fd), os.open(path, flags)
    os.dup2(other, fd)
    yield
    os.dup2(kept, fd)
    os.close(kept)
    os.close(other)


@pytest.fixture
def twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk that is served in C."""
    monkeypatch.setattr("kvmpy.virtio.blk.PURE", False)
    disk = Disk(image(tmp_path, {}), FEATURES)
    assert disk.device._twins
    yield disk
    disk.device.close()


REAL = {
    "EIO": ("/proc/self/mem", os.O_RDONLY, "read", errno.EIO),
    "ENOSPC": ("/dev/full", os.O_RDWR, "write", errno.ENOSPC),
    "EBADF": ("/dev/null", os.O_RDONLY, "write", errno.EBADF),
    "EISDIR": ("/proc", os.O_RDONLY, "read", errno.EISDIR),
}


@pytest.mark.parametrize(("path", "flags", "operation", "number"), REAL.values(), ids=REAL)
def test_disk_in_c_that_the_host_refuses(twin: Disk, path: str, flags: int, operation: str, number: int) -> None:
    assert twin.device._image is not None
    with replaced(twin.device._image.fd, path, flags):
        statuses = [do(twin, operation) for _ in range(2)]

    assert statuses == [S.IOERR, S.IOERR]
    assert [fields["why"] for _, fields in twin.board.logs] == [os.strerror(number)] * 2
    assert twin.works
    assert twin.write(0, b"z" * 512) == S.OK


@pytest.mark.parametrize("pure", [False, True])
def test_image_that_gets_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pure: bool) -> None:
    monkeypatch.setattr("kvmpy.virtio.blk.PURE", pure)
    disk = Disk(path := image(tmp_path, {}), FEATURES)
    os.truncate(path, SIZE // 2)

    outcomes = [disk.request(T.IN, at, room=[1024])[0] for at in (0, SECTORS // 2 - 1, SECTORS // 2)]
    os.truncate(path, SIZE)

    assert outcomes == [S.OK, S.IOERR, S.IOERR]
    assert disk.read(SECTORS // 2, 1) == bytes(512)
    disk.device.close()


@pytest.mark.parametrize("most", [100, 512, 700])
def test_host_that_does_it_in_parts(disk: Disk, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:most]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, [buffers[0][:most]], at))

    disk.write(8, b"x" * 1024)

    assert disk.read(7, 4) == CONTENT[7 * 512 : 8 * 512] + b"x" * 1024 + CONTENT[10 * 512 : 11 * 512]


def test_system_calls_that_are_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python's own repeat themselves (PEP 475); those of host/syscalls.py do, too."""
    answers = iter([-1, -1, 0])
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EINTR)
    libc = type("Libc", (), {"fallocate64": staticmethod(lambda *arguments: next(answers))})
    monkeypatch.setattr(syscalls, "load", lambda: libc)

    syscalls.fallocate(0, 0, 0, 0)

    assert list(answers) == []


def test_slow_disk_is_alone_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a thread of its own: another device answers, while a request waits for the host."""
    waits, goes_on = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        goes_on.wait(60)

    monkeypatch.setattr("time.sleep", sleep)
    board, own = FakeBoard(16 << 20), EventLoop("disk", lambda error: None)
    monkeypatch.setattr(board, "new_loop", lambda name: own)
    disk, other = Blk(path=image(tmp_path, {})), Rng()
    faults.inject(disk, faults.Delay("read"))
    disk.attach(board)
    other.attach(board)
    slow, quick = RingDriver(board), RingDriver(board, 1, free=1 << 20)
    slow.start()
    quick.start()
    own.start()

    head = slow.submit(0, [HEADER.pack(T.IN, 0, 0)], [512, 1])
    slow.kick(0)
    assert waits.wait(60)
    number = quick.request(0, writable=[16])
    early = slow.used(0)
    goes_on.set()
    with disk.lock:
        late = slow.used(0)
    own.stop()
    disk.close()

    assert len(number) == 16
    assert (early, late) == ([], [(head, 513)])


# Networks.


def ends(rig: Rig) -> None:
    """The link is down, the guest knows, and what it sends is taken and lost."""
    assert rig.driver.config(6, 2) == 0
    assert [event for event, _ in rig.board.logs] == ["a network link is down"]
    head = rig.send(PLAIN + FRAME)
    assert (head, 0) in rig.driver.used(TX)
    assert not rig.driver.needs_reset


@pytest.mark.parametrize("waiting", [0, 3])
def test_peer_of_a_network_goes(rig: Rig, waiting: int) -> None:
    rig.offer(*[100] * waiting)
    rig.wire.peer.close()

    rig.turn()

    ends(rig)
    assert rig.driver.used(RX) == []


def test_passt_is_killed(plugged: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("passt"):
        pytest.skip("no passt: apt-get install passt")
    rig = plugged()
    user = passt.Passt()
    rig.net._unplug()
    rig.net.backend = user
    rig.start()
    assert user.process is not None
    user.process.kill()
    user.process.wait()

    rig.turn()

    ends(rig)
    assert "passt has ended" in str(rig.board.logs[0][1]["why"])


def test_tap_is_deleted(plugged: Callable[..., Rig]) -> None:
    try:
        interface = tap.Tap()
    except HostError as error:
        pytest.skip(str(error))
    rig = plugged()
    rig.net._unplug()
    rig.net.backend, rig.net._vnet = interface, True
    rig.start()
    done = subprocess.run(["ip", "link", "delete", interface.name], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to delete a tap: {done.stderr.strip()}")

    rig.turn()
    rig.send(PLAIN + FRAME)
    rig.turn()

    assert rig.driver.config(6, 2) == 0
    assert not rig.driver.needs_reset


# Consoles.


@pytest.fixture
def loop() -> Iterator[tuple[EventLoop, list[BaseException]]]:
    """A real event loop, and the exceptions that ended it."""
    errors: list[BaseException] = []
    loop = EventLoop("test", errors.append)
    yield loop, errors
    loop.stop()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_console_file_without_room(loop: tuple[EventLoop, list[BaseException]], tmp_path: Path) -> None:
    sent: list[int] = []
    console = endpoint.File(loop[0], tmp_path / "console", sent.append)

    with file_size_limit(10):
        console.write(b"x" * 20)
        console.write(b"lost")
    console.write(b"again")
    console.close()

    assert sum(sent) == 29
    assert (tmp_path / "console").read_bytes() == b"x" * 10 + b"again"


def test_console_on_a_full_device(loop: tuple[EventLoop, list[BaseException]]) -> None:
    sent: list[int] = []
    console = endpoint.File(loop[0], Path("/dev/full"), sent.append)

    console.write(b"hello")
    console.write(b"hello")
    console.close()

    assert sum(sent) == 10


def test_reader_of_a_console_goes(loop: tuple[EventLoop, list[BaseException]], tmp_path: Path) -> None:
    steps, sent = StepLoop(), list[int]()
    console = UnixSocket(steps, tmp_path / "console", lambda data: None, sent.append)
    reader = socket.socket(socket.AF_UNIX)
    reader.connect(str(tmp_path / "console"))
    (listener,) = steps.watched
    steps.ready(listener)
    reader.close()

    console.write(b"hello")
    for fd in set(steps.watched) - {listener}:
        steps.ready(fd)
    console.write(b"hello")

    assert sum(sent) == 10
    with socket.socket(socket.AF_UNIX) as again:
        again.connect(str(tmp_path / "console"))
        steps.ready(listener)
        console.write(b"for the next one")
        assert again.recv(100) == b"for the next one"
    console.close()


@pytest.mark.parametrize("call", ["accept", "dup"])
def test_no_descriptor_for_a_reader_of_a_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Fault, call: str
) -> None:
    """The listener does not spin meanwhile, and takes readers again when there is one."""
    steps = StepLoop()
    console = UnixSocket(steps, tmp_path / "console", lambda data: None, lambda count: None)
    (listener,) = steps.watched
    with (
        socket.socket(socket.AF_UNIX) as reader,
        broken({"accept": "socket.socket.accept", "dup": "os.dup"}[call], errno.EMFILE),
    ):
        reader.connect(str(tmp_path / "console"))
        steps.ready(listener)
    assert steps.watched == {}
    steps.advance(1)
    steps.ready(listener)
    for fd in set(steps.watched) - {listener}:
        steps.ready(fd)  # the one that waited, and has gone

    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(tmp_path / "console"))
        steps.ready(listener)
        console.write(b"hello")
        reader.settimeout(10)
        assert reader.recv(100) == b"hello"
    console.close()


# Streams.


def test_peer_of_a_stream_goes(guest: Guest) -> None:
    stream, other = guest.call(), guest.call(src_port=1234)
    stream.close()

    guest.settle()
    guest.send(op=RW, data=b"for nobody")
    guest.send(op=RW, src_port=1234, data=b"for somebody")

    assert {packet.op for packet in guest.got() if packet.dst_port != 1234} & {RST, SHUTDOWN}
    assert other.recv(100) == b"for somebody"


# File systems.


@pytest.fixture
def share(tmp_path: Path) -> Iterator[tuple[Path, Client]]:
    """A shared folder, with a file in it."""
    folder = tmp_path / "share"
    folder.mkdir()
    for name in ("file", "other"):
        (folder / name).write_bytes(b"content")
    server = FuseServer(folder)

    def serve(parts: Any, room: int) -> bytes:
        answer = bytearray(room)
        return bytes(answer[: server.serve([memoryview(part) for part in parts], [memoryview(answer)])])

    client = Client(serve)
    client.init()
    yield folder, client
    server.close()


FILES = {
    "read": ("os.preadv", lambda client, fh: client.read(fh)),
    "write": ("os.pwritev", lambda client, fh: client.write(fh, b"text")),
    "fsync": ("os.fsync", lambda client, fh: client.call(fuse_wire.Op.FSYNC, 1, fuse_wire.FSYNC_IN.pack(fh, 0, 0))),
    "lookup": ("os.stat", lambda client, fh: client.lookup(b"other")),
    "open": ("os.open", lambda client, fh: client.open(client.walk("other"))),
    "create": ("os.open", lambda client, fh: client.create(b"new")),
    "readdir": ("os.open", lambda client, fh: client.names()),
    "rename": ("os.rename", lambda client, fh: client.rename(b"other", b"another")),
    "mkdir": ("os.mkdir", lambda client, fh: client.mkdir(b"folder")),
    "unlink": ("os.unlink", lambda client, fh: client.unlink(b"file")),
}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize(("call", "operation"), FILES.values(), ids=FILES)
def test_shared_folder_that_the_host_refuses(
    share: tuple[Path, Client], broken: Fault, call: str, operation: Callable[[Client, int], object], number: int
) -> None:
    _, client = share
    fh = client.open(client.walk("file"), os.O_RDWR)

    with broken(call, number) as met, pytest.raises(OSError) as error:
        operation(client, fh)

    assert (error.value.errno, met[0]) == (number, number)
    assert client.read(fh) == b"content"
    operation(client, fh)


@pytest.mark.parametrize("make", [lambda client: client.mkdir(b"new"), lambda client: client.symlink(b"new", b"file")])
def test_what_cannot_be_opened_after_it_was_made_is_not_there(
    share: tuple[Path, Client], broken: Fault, make: Callable[[Client], object]
) -> None:
    folder, client = share

    with broken("os.open", errno.EMFILE), pytest.raises(OSError, match="Too many open files"):
        make(client)

    assert not os.path.lexists(folder / "new")
    make(client)


def test_shared_folder_without_room(share: tuple[Path, Client]) -> None:
    _, client = share
    fh = client.open(client.walk("file"), os.O_RDWR)

    with file_size_limit(4096), pytest.raises(OSError) as error:
        client.write(fh, b"x" * 100, offset=4096)

    assert error.value.errno == errno.EFBIG
    assert client.write(fh, b"x" * 100, offset=4096) == 100


def test_shared_folder_is_removed(share: tuple[Path, Client]) -> None:
    folder, client = share
    node = client.walk("file")
    fh = client.open(node)
    shutil.rmtree(folder)

    errors = []
    for operation in (
        lambda: client.lookup(b"file"),
        lambda: client.mkdir(b"folder"),
        lambda: client.create(b"new"),
        lambda: client.names(),
    ):
        with pytest.raises(OSError) as error:
            operation()
        errors.append(error.value.errno)

    assert set(errors) <= {errno.ENOENT, errno.ESTALE}
    assert client.read(fh) == b"content"
    assert client.getattr(1).permissions == 0o755


# Memory, and the log.


def test_pages_that_the_host_does_not_take_back(balloon: Inflatable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gpa: int, size: int) -> None:
        raise HostError("the host does not take pages back")

    head = balloon.driver.submit(INFLATE, [pages(5)])
    with monkeypatch.context() as patch:
        patch.setattr(balloon.board.mem, "discard", refuse)
        balloon.driver.kick(INFLATE)

    assert balloon.driver.used(INFLATE) == [(head, 0)]
    assert [event for event, _ in balloon.board.logs] == ["memory stays with the guest"]
    assert not balloon.driver.needs_reset


class Broken:
    """A standard error that takes nothing."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def write(self, text: str) -> int:
        raise self._error

    def flush(self) -> None:
        raise self._error


ENDS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "nobody reads": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "nobody has time": BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    "closed": ValueError("I/O operation on closed file"),
}


@pytest.mark.parametrize("locked_in", [False, True])
@pytest.mark.parametrize("error", ENDS.values(), ids=ENDS)
def test_log_that_nobody_takes(monkeypatch: pytest.MonkeyPatch, error: Exception, locked_in: bool) -> None:
    log = Log()
    monkeypatch.setattr(sys, "stderr", Broken(error))
    if locked_in:
        log.need_no_imports()

    log.warning("an event", number=1)
    log.warning("another event", number=2)


def test_log_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is when the first line is written, and there may be no descriptor then."""
    log = Log()
    with monkeypatch.context() as patch:
        patch.setattr("kvmpy.core.log._make_logger", failing(errno.EMFILE))
        log.warning("an event")

    log.warning("a later one")

    assert capsys.readouterr().err == "kvmpy: warning: a later one\n"


@pytest.mark.parametrize("locked_in", [False, True])
def test_log_without_a_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], locked_in: bool
) -> None:
    log = Log()
    monkeypatch.setattr(sys, "stderr", None)
    if locked_in:
        log.need_no_imports()

    log.warning("an event")

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPERM], ids=errno.errorcode.get)
def test_no_memory_for_a_guest(broken: Fault, number: int) -> None:
    before = os.listdir("/proc/self/fd")

    with broken("mmap.mmap", number), pytest.raises(HostError, match=r"cannot map 16 MiB of guest RAM: .*; give less"):
        GuestMemory.allocate([(0, 16 << 20)])

    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "file descriptors"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("can't start new thread"), "threads"),
    ],
)
def test_machine_that_the_host_has_no_more_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, what: str
) -> None:
    """Wherever that is found out: a HostError, and nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("kvmpy.boot.loader.read_image", fail)
    machine = Machine(kernel=tmp_path / "kernel")

    with pytest.raises(HostError, match=f"this host has no more {what}; .*raise the limit"):
        machine.start()
    assert len(os.listdir("/proc/self/fd")) == before


def test_loop_that_gets_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = EventLoop("test", lambda error: None)
    monkeypatch.setattr("threading.Thread.start", lambda thread: (_ for _ in ()).throw(RuntimeError))

    with pytest.raises(RuntimeError):
        loop.start()
    loop.stop()


TRUNCATES = """
import os, sys
from kvmpy import cli
from kvmpy.boot import files
real = files.read

def read(path, *words):
    view = real(path, *words)
    os.truncate(path, 0)
    return view

files.read = read
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [["inspect"], ["boot", "--kernel"], ["run", "--root", "none", "--kernel"]], ids=str)
def test_kernel_that_is_truncated_while_it_is_read(tmp_path: Path, words: list[str]) -> None:
    if words != ["inspect"] and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm, without which no kernel is read")
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(bzimage(bytes(1 << 20)))
    command = [sys.executable, "-c", TRUNCATES, *words, kernel, *(["--", "true"] if "run" in words else [])]

    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)

    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvmpy: memory has gone: a kernel or initrd was truncated while it was read")
