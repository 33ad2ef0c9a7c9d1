"""Captures in the classic pcap format, and what happens when they cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpy.core.errors import HostError
from kvmpy.host.pcap import Pcap

TIME = 1_700_000_000_123_456_789  # nanoseconds
FRAME = bytes.fromhex("ffffffffffff 020000000001 0806") + bytes(28)
FILE_HEADER = bytes.fromhex("d4c3b2a1 0200 0400 00000000 00000000 00000400 01000000")
RECORD = bytes.fromhex("00f15365 40e20100 2a000000 2a000000") + FRAME


def test_bytes_of_a_capture(tmp_path: Path) -> None:
    pcap = Pcap(tmp_path / "capture", lambda: TIME)
    empty = (tmp_path / "capture").read_bytes()

    pcap.record([FRAME])
    pcap.record([FRAME[:20], b"", memoryview(FRAME)[20:]])

    assert empty == FILE_HEADER
    assert (tmp_path / "capture").read_bytes() == FILE_HEADER + RECORD + RECORD
    pcap.close()


@pytest.mark.skipif(not shutil.which("tcpdump"), reason="no tcpdump: run scripts/setup")
def test_tcpdump_reads_it_while_it_is_written(tmp_path: Path) -> None:
    pcap = Pcap(tmp_path / "capture", lambda: TIME)
    pcap.record([FRAME])

    with (tmp_path / "capture").open("rb") as capture:
        done = subprocess.run(["tcpdump", "-enttr", "-"], stdin=capture, capture_output=True, text=True, timeout=60)

    assert done.stdout.startswith("1700000000.123456 02:00:00:00:00:01 > ff:ff:ff:ff:ff:ff, ethertype ARP")
    pcap.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk() -> None:
    with pytest.raises(HostError, match='cannot write the capture "/dev/full": No space left on device; name another'):
        Pcap(Path("/dev/full"))


def test_half_a_packet_is_taken_back(tmp_path: Path) -> None:
    """A pipe with little room stands for a disk with little room."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    pcap = Pcap(tmp_path / "pipe")

    with pytest.raises(HostError, match="cannot write the capture"):
        for _ in range(10):
            pcap.record([bytes(10_000)])
    os.close(reader)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r'cannot write the capture ".*/none/capture": No such file or directory'):
        Pcap(tmp_path / "none" / "capture")
