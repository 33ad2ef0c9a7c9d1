"""ext4 after power cuts: what was flushed is there, and where somebody forgot to flush, that is found.

One boot, in which a program keeps records on three disks: all in order; with fsync forgotten in the program; on a disk
that does not pass flushes on. From the logs of what was written, the disks are made as power cuts would leave them.
KVMPY_POWER_CUTS=1000 tries so many cuts, of more rounds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from power import DB, LIMIT, LOG, STATE, Recorded, record

from kvmpy import faults

CUTS = int(os.environ.get("KVMPY_POWER_CUTS", "12"))
ROUNDS = 8 if CUTS <= 20 else 200
GOOD, FORGETFUL, LYING = range(3)
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def disks(cloud: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Recorded]:
    folder = tmp_path_factory.mktemp("power")
    disks = [
        Recorded(folder / "good.img"),
        Recorded(folder / "forgetful.img"),
        Recorded(folder / "lying.img", faults.Ignore("flush")),
    ]
    record(cloud, folder, disks, ROUNDS, {FORGETFUL: "nosync"})
    return disks


def test_everything_was_kept_and_flushed(disks: list[Recorded]) -> None:
    assert [[len(disk.safe[what]) for what in (LOG, STATE, DB)] for disk in disks] == [[ROUNDS] * 3] * 3
    assert disks[GOOD].log.entries.count(None) > 4 * ROUNDS
    assert disks[LYING].log.entries.count(None) == 0


@pytest.mark.parametrize("block", [4096, 512])
def test_file_system_survives_power_cuts(disks: list[Recorded], tmp_path: Path, block: int) -> None:
    assert list(disks[GOOD].damages(tmp_path, CUTS // 2, seed=1, block=block)) == [""] * (CUTS // 2)


@pytest.mark.parametrize("disk", [FORGETFUL, LYING])
def test_missing_flush_is_found(disks: list[Recorded], tmp_path: Path, disk: int) -> None:
    assert any(disks[disk].damages(tmp_path, 30, seed=1))  # most of them show it, and one is enough


def test_readme_example(cloud: Path, tmp_path: Path) -> None:
    section = re.search(r"^### Faults\n(.*?)^##", README.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    (program,) = re.findall(r"^```python\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))

    command = [sys.executable, "-c", f"import kvmpy\n{program}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)

    assert done.returncode == 0, done.stderr
    assert {line.partition(" path=")[0] for line in done.stderr.splitlines()} == {"kvmpy: warning: disk error"}
    assert (tmp_path / "disk.img").read_bytes()[51200:51205] == b"kept\n"
