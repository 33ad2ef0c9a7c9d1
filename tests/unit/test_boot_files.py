"""Kernel and initrd files that cannot be opened or are too large; several initrds in one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kvmpy.boot import files, initrd, loader
from kvmpy.core.errors import ConfigError, HostError, ImageError, NotFoundError

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def test_no_such_file() -> None:
    with pytest.raises(NotFoundError, match=r"^kernel /no/such/kernel: no such file; check the path"):
        loader.read_image("/no/such/kernel")


def test_a_file_used_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    with pytest.raises(NotFoundError, match="no such file"):
        loader.read_image(tmp_path / "file" / "kernel")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is a directory; give a file"):
        loader.read_image(tmp_path)


def test_device() -> None:
    with pytest.raises(HostError, match=r"^initrd /dev/zero is a device"):
        initrd.read(["/dev/zero"], 1 << 20)


def test_path_with_nul() -> None:
    with pytest.raises(ConfigError, match="is no path"):
        loader.read_image("a\0b")


def test_name_too_long() -> None:
    with pytest.raises(HostError, match="File name too long"):
        loader.read_image("/" + "x" * 5000)


@needs_permissions
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.touch(mode=0)

    with pytest.raises(HostError, match=r"permission denied; make it readable \(sudo chmod \+r\)"):
        loader.read_image(path)


def test_larger_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(3 << 20)  # sparse

    with pytest.raises(ImageError, match="has more than the 2 MiB that can be used; strip it"):
        files.read(path, "kernel", 2 << 20, "strip it")


@pytest.mark.parametrize("size, limit", [(3 << 20, 3 << 20), (10, 10)])
def test_pipe(tmp_path: Path, size: int, limit: int) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"k" * size,))
    writer.start()

    content = files.read(path, "kernel", limit, "strip it")

    writer.join()
    assert content == b"k" * size


def test_pipe_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"k" * 11,))
    writer.start()

    with pytest.raises(ImageError, match="has more than the 0 MiB"):
        files.read(path, "kernel", 10, "strip it")
    writer.join()


def test_initrds_are_joined_at_multiples_of_four(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aaaaa")
    (tmp_path / "b").write_bytes(b"bbbb")
    (tmp_path / "c").write_bytes(b"c")

    joined = initrd.read([tmp_path / name for name in "abc"], 1 << 20)

    assert joined == b"aaaaa\0\0\0bbbbc"


def test_no_initrd() -> None:
    assert initrd.read([], 1 << 20) == b""


def test_empty_initrd(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    with pytest.raises(ImageError, match="empty is empty; make one with kvmpy initrd"):
        initrd.read([tmp_path / "empty"], 1 << 20)


def test_initrds_larger_than_memory_are_not_read(tmp_path: Path) -> None:
    for name in "ab":
        with open(tmp_path / name, "wb") as file:
            file.truncate(600 << 10)

    with pytest.raises(
        ImageError, match=r"^initrd .*/b has more than the 0 MiB .*; give more with --mem, or a smaller initrd"
    ):
        initrd.read([tmp_path / "a", tmp_path / "b"], 1 << 20)
