"""Logs that keep what was written last, and their readers."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kvmpy.core.errors import HostError
from kvmpy.host.recent import Recent, old, read


def test_what_was_written_is_read(tmp_path: Path) -> None:
    log = Recent(tmp_path / "log")

    assert log.write(b"one ")
    assert log.write(b"two")
    log.close()

    assert b"".join(read(tmp_path / "log")) == b"one two"
    assert not log.write(b"late")


def test_it_begins_empty_and_for_its_user_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"of another one")

    Recent(tmp_path / "log").close()

    assert (tmp_path / "log").read_bytes() == b""
    assert list(read(tmp_path / "nothing")) == []
    with pytest.raises(HostError, match=r'cannot write ".*/no/log": No such file or directory; make room for it'):
        Recent(tmp_path / "no/log")


def test_only_the_last_is_kept(tmp_path: Path) -> None:
    log = Recent(tmp_path / "log", keep=100)

    for number in range(1000):
        log.write(b"%09d\n" % number)

    text = b"".join(read(tmp_path / "log"))
    assert 100 <= len(text) <= 200
    assert text.endswith(b"000000999\n")
    assert text == b"".join(b"%09d\n" % number for number in range(1000 - len(text) // 10, 1000))
    assert sorted(os.listdir(tmp_path)) == ["log", "log.old"]


def test_a_follower_sees_all_that_comes(tmp_path: Path) -> None:
    log = Recent(tmp_path / "log", keep=100)
    lines = [b"%09d\n" % number for number in range(57)]
    rest = iter(lines[5:])
    for line in lines[:5]:
        log.write(line)

    def wait() -> bool:
        """Each time there are some more, more than a file holds in the end."""
        for _ in range(9):
            line = next(rest, b"")
            if not line:
                return False
            log.write(line)
        return True

    assert b"".join(read(tmp_path / "log", wait)) == b"".join(lines)


def test_a_reader_that_begins_while_a_new_file_is_begun(tmp_path: Path) -> None:
    log = Recent(tmp_path / "log", keep=100)
    log.write(b"a" * 100)
    reader = read(tmp_path / "log", lambda: False)
    first = next(reader)

    log.write(b"b" * 100)

    assert first + b"".join(reader) == b"a" * 100 + b"b" * 100


def test_what_has_no_room_is_left_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Recent(tmp_path / "log")
    log.write(b"before ")
    write = os.write

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        assert not log.write(b"too much")
    log.write(b"after")

    assert b"".join(read(tmp_path / "log")) == b"before after"


def test_writes_of_threads_do_not_mix(tmp_path: Path) -> None:
    log = Recent(tmp_path / "log", keep=1 << 16)
    words = [bytes([letter]) * 50 + b"\n" for letter in b"abcd"]
    threads = [threading.Thread(target=lambda word=word: [log.write(word) for _ in range(500)]) for word in words]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    lines = b"".join(read(tmp_path / "log")).splitlines(keepends=True)
    assert set(lines) <= set(words)
    assert old(tmp_path / "log").stat().st_size <= 1 << 16
