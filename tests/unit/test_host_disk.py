"""Images on the host: opening and locking them, raw files, block devices, snapshot overlays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from disks import failing

from kvmpy.core.errors import ConfigError, HostError, ImageError, NotFoundError
from kvmpy.core.log import LEVELS, log
from kvmpy.host import disk
from kvmpy.host.disk import Image, open_image, open_raw
from kvmpy.host.overlay import CLUSTER, Overlay

SIZE = 3 * CLUSTER + 4096  # the last cluster of a snapshot is not whole
OPTIONS: dict[str, Any] = {
    "read_only": False,
    "cache": "writeback",
    "snapshot": False,
    "format": "raw",
    "backing": False,
}


def read(image: Image, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    image.readv(offset, [memoryview(buffer)])
    return bytes(buffer)


def write(image: Image, offset: int, *data: bytes) -> None:
    image.writev(offset, [memoryview(part) for part in data])


@pytest.fixture
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(content)
    return path


@pytest.fixture
def image(path: Path) -> Iterator[disk.Raw]:
    image = open_raw(path)
    yield image
    image.close()


@pytest.fixture
def overlay(path: Path) -> Iterator[Overlay]:
    overlay = Overlay(open_raw(path, read_only=True))
    yield overlay
    overlay.close()


# Opening.


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"disk image .*/none: no such file; .*truncate -s 1G"):
        open_raw(tmp_path / "none")


def test_missing_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no such file; check the path$"):
        open_raw(tmp_path / "none" / "disk.img")


def test_file_taken_for_a_folder(path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_raw(path / "disk.img")


@pytest.mark.parametrize("read_only", [True, False])
def test_directory(tmp_path: Path, read_only: bool) -> None:
    with pytest.raises(HostError, match="is a directory; give a file or a block device"):
        open_raw(tmp_path, read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
def test_fifo(tmp_path: Path, read_only: bool) -> None:
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(HostError, match="neither a file nor a block device"):
        open_raw(tmp_path / "fifo", read_only=read_only)


def test_no_right_to_write() -> None:
    with pytest.raises(HostError, match=r"uevent_seqnum: Permission denied; .* add ro or snapshot"):
        open_raw(Path("/sys/kernel/uevent_seqnum"))  # which not even root may write


def test_no_right_to_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(HostError, match="Permission denied; get the right to read it"):
        open_raw(path, read_only=True)


def test_no_right_at_all(path: Path) -> None:
    """Neither to read nor to write: then it is no use to open it only for reading."""
    path.chmod(0)
    script = "import os, sys; from kvmpy.host import disk; import pathlib; os.geteuid() or os.setuid(65534)\n"
    script += "try: disk.open_raw(pathlib.Path(sys.argv[1]))\nexcept Exception as error: print(error)"
    for folder in [path.parent, *path.parents[1:3]]:
        folder.chmod(0o755)

    said = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stdout

    assert said == f"disk image {path}: Permission denied; get the right to read it\n"


def test_no_path() -> None:
    with pytest.raises(ConfigError, match="is no path"):
        open_raw(Path("a\0b"))


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    with pytest.raises(ImageError, match=r"is empty; .*truncate -s 1G"):
        open_raw(tmp_path / "empty")


@pytest.mark.parametrize("size", [1, 511, 513])
def test_no_whole_sectors(path: Path, size: int) -> None:
    os.truncate(path, size)

    with pytest.raises(ImageError, match=rf"has {size} bytes, which is no multiple of 512; .*truncate -s %512"):
        open_raw(path)


def test_errors_leave_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    before = os.listdir("/proc/self/fd")

    for _ in range(3):
        with pytest.raises(ImageError):
            open_raw(tmp_path / "empty")

    assert os.listdir("/proc/self/fd") == before


def test_backing_file_of_a_raw_image(path: Path) -> None:
    with pytest.raises(ConfigError, match="has no backing file"):
        open_image(path, **OPTIONS | {"backing": True})


@pytest.mark.parametrize("mode", [{}, {"read_only": True}, {"snapshot": True}, {"cache": "unsafe"}])
def test_raw_image_that_may_be_qcow2(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: dict[str, Any]
) -> None:
    monkeypatch.setattr(log, "_logger", None)
    path.write_bytes(b"QFI\xfb" + path.read_bytes()[4:])

    image = open_image(path, **OPTIONS | mode)
    content = read(image, 0, 512)
    image.close()

    assert content[:4] == b"QFI\xfb"  # the guest writes it: nothing changes but what is said
    assert "disk.img begins like a qcow2 image, and is used as raw; add format=qcow2" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "said"), [({}, 1), ({"read_only": True}, 0), ({"snapshot": True}, 0)])
def test_unsafe_says_so(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: dict[str, Any],
    said: int,
) -> None:
    monkeypatch.setattr(log, "_logger", None)
    monkeypatch.setattr(log, "threshold", LEVELS["info"])

    open_image(path, **OPTIONS | {"cache": "unsafe"} | mode).close()

    assert capsys.readouterr().err.count("cache=unsafe: the guest's flushes are ignored") == said


def test_direct_qcow2(path: Path) -> None:
    with pytest.raises(ConfigError, match="cache=direct is for raw images"):
        open_image(path, **OPTIONS | {"format": "qcow2", "cache": "direct"})


# Locking.


def test_twice(path: Path, image: disk.Raw) -> None:
    with pytest.raises(HostError, match="in use by this process already; give it once, or only for reading"):
        open_raw(path)


def test_read_while_it_is_written(path: Path, image: disk.Raw) -> None:
    with pytest.raises(HostError, match="in use"):
        open_image(path, **OPTIONS | {"snapshot": True})


def test_many_readers_no_writer(path: Path) -> None:
    readers = [open_image(path, **OPTIONS | mode) for mode in ({"read_only": True}, {"snapshot": True})]

    with pytest.raises(HostError, match="in use"):
        open_raw(path)
    for reader in readers:
        reader.close()
    open_raw(path).close()


def test_another_name_for_the_same_file(path: Path, image: disk.Raw) -> None:
    os.link(path, path.with_name("link"))

    with pytest.raises(HostError, match="in use"):
        open_raw(path.with_name("link"))


HOLD = """
import pathlib, sys
from kvmpy.host.disk import open_raw
image = open_raw(pathlib.Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def test_another_process_is_named_and_its_lock_ends_with_it(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()

        with pytest.raises(
            HostError, match=rf"in use by process {holder.pid} \(python.*\); end that first, or use a copy"
        ):
            open_raw(path)
        holder.kill()

    open_raw(path).close()


def test_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.fcntl", refuse)

    open_raw(path).close()


# Raw images.


def test_buffers_of_any_number_and_size(image: disk.Raw, content: bytes) -> None:
    buffers = [bytearray(n % 3) for n in range(3 * 1024)]

    image.readv(512, [memoryview(buffer) for buffer in buffers])

    assert b"".join(buffers) == content[512 : 512 + 3 * 1024]


@pytest.mark.parametrize("most", [1, 7, 512])
def test_host_that_does_it_bit_by_bit(
    image: disk.Raw, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def limited(call: Any) -> Any:
        return lambda fd, buffers, offset: call(fd, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", limited(preadv))
    monkeypatch.setattr(os, "pwritev", limited(pwritev))
    data = os.urandom(1024)

    write(image, 512, data[:1], b"", data[1:600], data[600:])

    assert read(image, 0, 2048) == content[:512] + data + content[1536:2048]
    assert path.read_bytes() == content[:512] + data + content[1536:]


def test_end_of_the_file_is_an_error(image: disk.Raw) -> None:
    with pytest.raises(OSError, match="shorter"):
        read(image, SIZE - 512, 1024)


def test_close_twice(path: Path) -> None:
    image = open_raw(path)

    image.close()
    image.close()

    with pytest.raises(OSError):
        read(image, 0, 512)


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes(image: disk.Raw, path: Path, content: bytes, unmap: bool) -> None:
    before = path.stat().st_blocks

    image.write_zeroes(4096, CLUSTER, unmap)

    assert path.read_bytes() == content[:4096] + bytes(CLUSTER) + content[4096 + CLUSTER :]
    assert before - path.stat().st_blocks == (CLUSTER // 512 if unmap else 0)


def test_allocation_that_fails(image: disk.Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.host.syscalls.fallocate", failing(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        image.write_zeroes(0, 4096, unmap=False)


def test_read_only_file_is_not_written(path: Path, content: bytes) -> None:
    image = open_raw(path, read_only=True)

    for change in (lambda: write(image, 0, bytes(512)), lambda: image.write_zeroes(0, 4096, True)):
        with pytest.raises(OSError):
            change()
    image.close()

    assert path.read_bytes() == content


def test_size_that_changes(image: disk.Raw, path: Path) -> None:
    os.truncate(path, 2 * SIZE + 100)

    image.measure()

    assert image.size == 2 * SIZE


# Direct.


@pytest.fixture
def direct(path: Path) -> Iterator[disk.Raw]:
    try:
        image = open_raw(path, cache="direct")
    except HostError as error:
        pytest.skip(str(error))
    yield image
    image.close()


@pytest.fixture
def fds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The open flags of the descriptors that are read and written."""
    import fcntl

    seen: list[int] = []

    def watched(call: Any) -> Any:
        def transfer(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            done: int = call(fd, buffers, offset)
            seen.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            return done

        return transfer

    monkeypatch.setattr(os, "preadv", watched(os.preadv))
    monkeypatch.setattr(os, "pwritev", watched(os.pwritev))
    return seen


def test_direct_goes_round_the_page_cache(direct: disk.Raw, content: bytes, fds: list[int]) -> None:
    import mmap

    with mmap.mmap(-1, 8192) as area:
        direct.readv(4096, [memoryview(area)])
        direct.writev(0, [memoryview(area)[:4096]])

    assert fds == [os.O_DIRECT, os.O_DIRECT]
    assert read(direct, 0, 8192) == content[4096:8192] * 2


def test_direct_takes_what_is_not_aligned(direct: disk.Raw, path: Path, content: bytes) -> None:
    data = os.urandom(1025)

    write(direct, 512, data[:1], data[1:1024])
    head = read(direct, 0, 2048)

    assert head == content[:512] + data[:1024] + content[1536:2048]
    assert path.read_bytes() == head + content[2048:]


def test_direct_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *arguments: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(HostError, match=r"refuses cache=direct .*; use cache=writeback"):
        open_raw(path, cache="direct")


# Block devices.


@pytest.fixture
def loop(path: Path) -> Iterator[Path]:
    """A loop device over the image."""
    try:
        found = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no losetup")
    if found.returncode:
        pytest.skip(f"no loop device: {found.stderr.strip()}")
    yield Path(found.stdout.strip())
    subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)


def test_block_device_without_a_medium(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "loop0").touch()
    monkeypatch.setattr(Path, "is_block_device", lambda path: True)

    with pytest.raises(ImageError, match="loop0 is empty; attach something to it"):
        open_raw(tmp_path / "loop0")


def test_block_device(loop: Path, path: Path, content: bytes) -> None:
    image = open_raw(loop)

    write(image, 512, b"x" * 512)
    image.write_zeroes(8192, 4096, unmap=False)
    image.write_zeroes(16384, 4096, unmap=True)
    image.discard(24576, 4096)
    image.discard(512, 512)
    image.flush()
    size, head = image.size, read(image, 0, 24576)
    with pytest.raises(HostError, match="Device or resource busy; unmount it first"):
        open_raw(loop)
    image.close()

    assert size == SIZE
    assert head[:8192] == content[:512] + head[512:1024] + content[1024:8192]
    assert head[8192:] == bytes(4096) + content[12288:16384] + bytes(4096) + content[20480:24576]
    assert path.read_bytes()[:24576] == head


# Snapshot overlays.


def test_overlay_reads_across_what_is_changed_and_what_is_not(overlay: Overlay, content: bytes) -> None:
    write(overlay, CLUSTER - 512, b"x" * 1024)
    write(overlay, SIZE - 512, b"y" * 512)

    expected = bytearray(content)
    expected[CLUSTER - 512 : CLUSTER + 512] = b"x" * 1024
    expected[-512:] = b"y" * 512
    assert read(overlay, 0, SIZE) == expected
    assert read(overlay, CLUSTER - 1024, 1024) == expected[CLUSTER - 1024 : CLUSTER]


def test_overlay_copies_only_what_is_changed_in_part(overlay: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = overlay._copy
    monkeypatch.setattr(overlay, "_copy", lambda cluster: copied.append(cluster) or real(cluster))  # type: ignore[func-returns-value]

    write(overlay, 0, bytes(CLUSTER))
    write(overlay, CLUSTER - 512, bytes(1024))
    write(overlay, 3 * CLUSTER, bytes(4096))

    assert copied == [0, 1]


def test_overlay_discards_whole_clusters(overlay: Overlay, content: bytes) -> None:
    overlay.discard(512, 2 * CLUSTER)
    overlay.discard(3 * CLUSTER + 512, 3584)
    first = read(overlay, 0, SIZE)
    overlay.discard(3 * CLUSTER, 4096)

    assert first == content[:CLUSTER] + bytes(CLUSTER) + content[2 * CLUSTER :]
    assert read(overlay, 3 * CLUSTER, 4096) == bytes(4096)


def test_overlay_leaves_the_image_alone(overlay: Overlay, path: Path, content: bytes) -> None:
    write(overlay, 0, bytes(SIZE))
    overlay.write_zeroes(0, SIZE, unmap=True)
    overlay.discard(0, SIZE)
    overlay.flush()

    assert read(overlay, 0, SIZE) == bytes(SIZE)
    assert path.read_bytes() == content


def test_overlay_takes_as_much_room_as_was_written(tmp_path: Path) -> None:
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", 1 << 40)
    overlay = Overlay(open_raw(tmp_path / "big", read_only=True))

    write(overlay, 1 << 39, bytes(512))
    blocks = os.fstat(overlay._file._fd).st_blocks
    overlay.close()

    assert overlay.size == 1 << 40
    assert blocks * 512 <= 2 * CLUSTER


def test_overlay_of_a_write_that_fails(overlay: Overlay, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(OSError, match="No space left"):
            write(overlay, 512, bytes(CLUSTER))

    assert read(overlay, 0, SIZE) == content


def test_no_room_for_an_overlay(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "ftruncate", refuse)

    with pytest.raises(HostError, match=r"no temporary file of .*; set TMPDIR"):
        open_image(path, **OPTIONS | {"snapshot": True})
    assert os.listdir("/proc/self/fd") == before
