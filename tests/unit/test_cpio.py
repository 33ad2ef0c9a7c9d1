"""newc archives: what Linux reads, written the same every time, and read back without trust."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvmpy.boot import cpio
from kvmpy.boot.cpio import Entry
from kvmpy.core.errors import ConfigError, ImageError, NotFoundError

ENTRIES = [
    Entry("etc", stat.S_IFDIR | 0o755),
    Entry("etc/motd", stat.S_IFREG | 0o644, b"hello"),
    Entry("etc/empty", stat.S_IFREG | 0o600),
    Entry("sh", stat.S_IFLNK | 0o777, b"bin/busybox"),
    Entry("console", stat.S_IFCHR | 0o600, rdev=(5, 1)),
    Entry("vda", stat.S_IFBLK | 0o660, rdev=(254, 300)),
]


def archive(entries: Iterable[Entry]) -> bytes:
    out = io.BytesIO()
    cpio.write(out, entries)
    return out.getvalue()


def plain(entries: Iterable[Entry]) -> list[Entry]:
    """Entries with their contents as bytes, so that they compare."""
    return [Entry(e.name, e.mode, e.data if isinstance(e.data, Path) else bytes(e.data), e.rdev) for e in entries]


def test_an_entry_is_what_the_format_says() -> None:
    written = archive([Entry("ab", stat.S_IFREG | 0o644, b"hello")])

    # cpio(5): magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize,
    # check; the name with its NUL up to a multiple of 4; the content up to a multiple of 4
    head = b"07070100000001000081a40000000000000000000000010000000000000005"
    head += b"00000000" * 4 + b"00000003" + b"00000000" + b"ab\0" + bytes(3)
    assert written.startswith(head + b"hello\0\0\0" + b"070701")


def test_the_archive_ends_with_a_trailer_and_whole_blocks() -> None:
    written = archive(ENTRIES)

    assert written.rstrip(b"\0").endswith(b"TRAILER!!!")
    assert len(written) % 512 == 0


@pytest.mark.parametrize("length", range(9))
def test_what_is_written_can_be_read(length: int) -> None:
    entries = [*ENTRIES, Entry("x" * (length + 1), stat.S_IFREG | 0o755, b"#" * length)]

    found, end = cpio.read(archive(entries))

    assert plain(found) == plain(entries)
    assert end == len(archive(entries))


def test_the_content_of_a_host_file_is_copied_and_its_age_and_owner_are_not(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    os.utime(tmp_path / "b", (1, 1))

    first = archive([Entry("x", stat.S_IFREG | 0o644, tmp_path / "a")])
    second = archive([Entry("x", stat.S_IFREG | 0o644, tmp_path / "b")])

    assert first == second == archive([Entry("x", stat.S_IFREG | 0o644, content)])


def test_a_host_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="gone: No such file"):
        archive([Entry("x", stat.S_IFREG | 0o644, tmp_path / "gone")])


def test_a_host_file_with_more_content_than_its_size_says() -> None:
    with pytest.raises(ImageError, match="changed its size"):
        archive([Entry("x", stat.S_IFREG | 0o644, Path("/proc/self/status"))])


def test_a_host_file_of_4_gib(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 32)

    with pytest.raises(ConfigError, match="less than 4 GiB"):
        archive([Entry("x", stat.S_IFREG | 0o644, tmp_path / "huge")])


@pytest.mark.parametrize("name", ["", "/etc", "../etc", "a/../b", "a\0b", "x" * 4096])
def test_a_name_that_linux_would_refuse_or_misplace(name: str) -> None:
    with pytest.raises(ConfigError, match="bad file name"):
        archive([Entry(name, stat.S_IFREG | 0o644)])


def test_archives_in_a_row_are_read_one_by_one() -> None:
    first, second = archive(ENTRIES[:2]), archive(ENTRIES[2:])

    found, end = cpio.read(first + bytes(1024) + second)
    others, last = cpio.read(first + bytes(1024) + second, end)

    assert plain(found + others) == plain(ENTRIES)
    assert last == len(first) + 1024 + len(second)


def test_the_end_of_an_archive_is_where_a_compressed_one_begins() -> None:
    first = archive(ENTRIES)

    _, end = cpio.read(first + b"\x1f\x8b compressed")

    assert end == len(first)


def test_an_archive_cut_anywhere() -> None:
    whole = archive(ENTRIES).rstrip(b"\0")

    for length in range(len(whole)):
        with pytest.raises(ImageError, match="cpio archive"):
            cpio.read(whole[:length])


@pytest.mark.parametrize(
    ("at", "bad", "message"),
    [
        (0, b"070707", "no newc header"),
        (6, b"0000000g", "malformed header"),
        (6, b"-0000001", "malformed header"),
        (6, b" 0000001", "malformed header"),
        (6, b"\xff0000001", "malformed header"),
        (54, b"ffffffff", "runs past the end"),  # filesize
        (94, b"00000000", "runs past the end"),  # namesize
        (94, b"00001001", "runs past the end"),
        (94, b"ffffffff", "runs past the end"),
    ],
)
def test_a_damaged_header(at: int, bad: bytes, message: str) -> None:
    damaged = bytearray(archive(ENTRIES))
    damaged[at : at + len(bad)] = bad

    with pytest.raises(ImageError, match=message):
        cpio.read(damaged)


def test_an_archive_of_nothing_but_headers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpio, "MAX_ENTRIES", 100)

    with pytest.raises(ImageError, match="more than 100 entries"):
        cpio.read(archive([Entry("x", stat.S_IFREG)] * 101))
