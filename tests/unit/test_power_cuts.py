"""A small database of our own on a disk whose power fails at random: it survives, and does not when a flush is missing.

The same is done with ext4, under Linux, in tests/linux/test_power_cuts.py.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from disks import CONTENT, SECTORS
from hypothesis import given
from hypothesis import strategies as st
from test_faults import Faulty

from kvmpy import faults
from kvmpy.faults.power import Write, survivors
from kvmpy.virtio.blk import S, T

CUTS = 100
RECORDS = 20
PAGE = 4096  # of the database: a record, or its head, which counts the records
HEAD = struct.Struct("<II")  # how many records, checksum of that


class Database:
    """Records in pages, and a head that says how many count, which is written when the record is safe."""

    def __init__(self, disk: Faulty, *, flush_record: bool = True, flush_head: bool = True) -> None:
        self._disk = disk
        self._flush_record, self._flush_head = flush_record, flush_head
        self.count = 0

    def append(self, data: bytes) -> None:
        """On return, the record is safe."""
        self.count += 1
        self._write(self.count, data.ljust(PAGE - 4, b"\0"))
        if self._flush_record:
            self._flush()
        number = struct.pack("<I", self.count)
        self._write(0, number.ljust(PAGE - 4, b"\0"))
        if self._flush_head:
            self._flush()

    def _write(self, page: int, data: bytes) -> None:
        assert self._disk.write(page * PAGE // 512, data + struct.pack("<I", zlib.crc32(data))) == S.OK

    def _flush(self) -> None:
        assert self._disk.request(T.FLUSH)[0] == S.OK


def page(image: bytes | bytearray, number: int) -> bytes | None:
    """The content of a page; None when it is damaged."""
    data = bytes(image[number * PAGE : (number + 1) * PAGE])
    return data[:-4] if zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0] else None


def damage(image: bytes | bytearray, safe: int) -> str:
    """What is wrong with a database of which so many records are safe, after a power cut; empty when nothing is."""
    head = page(image, 0)
    count = struct.unpack_from("<I", head)[0] if head is not None else 0
    if head is None and safe:
        return "the head is damaged"
    if count < safe:
        return f"record {count + 1} of {safe} is lost"
    for number in range(1, count + 1):
        record = page(image, number)
        if record is None or record.rstrip(b"\0") != b"record %d" % number:
            return f"record {number} is damaged"
    return ""


def damages(path: Path, *what: Any, cuts: int = CUTS, **database: bool) -> list[str]:
    """What is wrong after each of so many power cuts, while records were appended to a database."""
    path.write_bytes(bytes(len(CONTENT)))
    log = faults.WriteLog()
    disk = Faulty(path, log, *what)
    safe_at = [0]  # entries of the log when a record was reported safe
    records = Database(disk, **database)
    for number in range(1, RECORDS + 1):
        records.append(b"record %d" % number)
        safe_at.append(len(log))
    return [
        damage(image, max(n for n, then in enumerate(safe_at) if then <= at))
        for at, image in log.cuts(bytes(len(CONTENT)), cuts, seed=1)
    ]


def test_database_survives_power_cuts(path: Path) -> None:
    assert damages(path) == [""] * CUTS


def test_missing_flush_before_the_head_is_found(path: Path) -> None:
    found = set(damages(path, flush_record=False))

    assert any("damaged" in what for what in found)


def test_missing_flush_behind_the_head_is_found(path: Path) -> None:
    found = set(damages(path, flush_head=False))

    assert any("lost" in what for what in found)


def test_disk_that_lies_about_its_flushes_is_found(path: Path) -> None:
    found = set(damages(path, faults.Ignore("flush")))

    assert any("lost" in what for what in found)
    assert any("damaged" in what for what in found)


def test_the_same_seed_cuts_at_the_same_places(path: Path) -> None:
    log = faults.WriteLog()
    records = Database(Faulty(path, log))
    for number in range(5):
        records.append(b"%d" % number)

    first, again, other = ([(at, bytes(image)) for at, image in log.cuts(CONTENT, 9, seed)] for seed in (1, 1, 2))

    assert first == again != other


def test_database_survives_a_power_cut_in_the_middle_of_its_work(path: Path) -> None:
    """The same as it happens, with the cut in the disk itself."""
    for nth in range(1, 2 * RECORDS):
        path.write_bytes(bytes(len(CONTENT)))
        disk = Faulty(path, faults.PowerCut(nth=nth), seed=nth)
        records = Database(disk)
        safe = 0
        with pytest.raises(AssertionError):
            for number in range(1, RECORDS + 1):
                records.append(b"record %d" % number)
                safe = number
        assert damage(path.read_bytes(), safe) == ""
        disk.device.close()


def test_whole_log_makes_what_is_on_the_disk(path: Path) -> None:
    log = faults.WriteLog()
    disk = Faulty(path, log)

    disk.write(3, b"x" * 1024)
    disk.segments(T.WRITE_ZEROES, (5, 100, 0))
    disk.segments(T.DISCARD, (128, 64, 0))
    disk.request(T.FLUSH)
    (*_, (at, image)) = log.cuts(CONTENT, 50)

    assert at == len(log) == 4
    assert bytes(image) == path.read_bytes()


def test_failed_flush_keeps_nothing_safe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = faults.WriteLog()
    disk = Faulty(path, log)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", fail)

    assert disk.request(T.FLUSH)[0] == S.IOERR
    assert log.entries == []


WRITES = st.lists(
    st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 40), st.integers(1, 255) | st.none()), max_size=8
)


@given(writes=WRITES, seed=st.integers(0, 1 << 32), block=st.sampled_from([512, 4096]))
def test_each_sector_survives_as_it_was_at_some_time(
    writes: Sequence[tuple[int, int, int | None]], seed: int, block: int
) -> None:
    import random

    times = [bytearray(CONTENT)]
    log = []
    for start, count, fill in writes:
        count = min(count, SECTORS - start)
        data = None if fill is None else bytes([fill]) * (512 * count)
        log.append(Write(512 * start, 512 * count, data))
        times.append(bytearray(times[-1]))
        times[-1][512 * start : 512 * (start + count)] = data or bytes(512 * count)

    after = bytearray(CONTENT)
    for offset, buffers in survivors(log, random.Random(seed), block):
        data = b"".join(buffers)
        after[offset : offset + len(data)] = data

    assert len(after) == len(CONTENT)
    for at in range(0, len(CONTENT), 512):
        assert after[at : at + 512] in [then[at : at + 512] for then in times]
