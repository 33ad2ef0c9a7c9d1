"""ext4 on disks whose writes are logged, and what is found on one after the power has failed."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmpy
from kvmpy import faults
from kvmpy.boot import initramfs
from kvmpy.core.regs import Device
from kvmpy.virtio.blk import Blk

LIMIT = 200.0  # seconds, for anything the guest does
MIB = 1 << 20
SIZE = 16 * MIB
TOOLS = os.environ["PATH"] + ":/usr/sbin:/sbin"
PORT, PAGE, PAGES = 0x5E4, 4096, 8  # as in records.c
LOG, STATE, DB = 1, 2, 3
NAMES = {LOG: "log", STATE: "state", DB: "db"}
MODULES = ["virtio_mmio", "virtio_blk", "ext4"]
ADLER = struct.Struct("<I")


def tool(*words: str | Path, good: tuple[int, ...] = (0,)) -> str:
    """What one of the host's tools for file systems says; an assertion about its exit status."""
    program = shutil.which(words[0], path=TOOLS)
    if program is None:
        pytest.skip(f"no {words[0]} (package e2fsprogs)")
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True)
    assert done.returncode in good, f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Recorded:
    """An ext4 disk of a guest, with the log of what was written to it.

    `safe` has, for each kind of record, how many entries the log had when each record was reported safe.
    """

    def __init__(self, path: Path, *what: Any, block: int = 4096) -> None:
        self.path = path
        path.touch()
        os.truncate(path, SIZE)
        tool("mke2fs", "-q", "-t", "ext4", "-b", str(block), "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
        self.before = path.read_bytes()
        self.log = faults.WriteLog()
        self.safe: dict[int, list[int]] = {LOG: [], STATE: [], DB: []}
        self.device = Blk(path=path)
        faults.inject(self.device, self.log, *what)

    def damages(self, folder: Path, count: int, seed: int, block: int = 4096) -> Iterator[str]:
        """What is wrong after each of `count` power cuts; empty where nothing is."""
        path = folder / "cut.img"
        for at, image in self.log.cuts(self.before, count, seed, block):
            path.write_bytes(image)
            safe = {what: sum(then <= at for then in when) for what, when in self.safe.items()}
            try:
                tool("e2fsck", "-p", path, good=(0, 1))
                tool("e2fsck", "-fn", path)
            except AssertionError as error:
                yield f"cut {at}: {error}"
                continue
            yield damage(path, folder, safe)


class Port(Device):
    """Where the guest's program says what is safe; `disks` get to know at once, before the program goes on."""

    def __init__(self, disks: list[Recorded]) -> None:
        self._disks = disks

    def attach(self, board: kvmpy.Board) -> None:
        board.pio(PORT, 4, self)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        disk, what, number = self._disks[value >> 28], value >> 24 & 0xF, value & 0xFFFFFF
        assert number == len(disk.safe[what]) + 1
        disk.safe[what].append(len(disk.log))


def record(kernel: Path, folder: Path, disks: list[Recorded], rounds: int, options: dict[int, str]) -> None:
    """Let a Linux keep records on each of `disks`, in one boot."""
    program = folder / "records"
    source = Path(__file__).with_name("records.c")
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    script = "".join(
        f"mkdir -p /d{n} && mount -t ext4 /dev/vd{'abc'[n]} /d{n}"
        f" && /records {n} /d{n} {rounds} {options.get(n, '')} && umount /d{n} && echo kept-{n}\n"
        for n in range(len(disks))
    )
    modules = kernel.parent.parent / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    initrd = folder / "initrd"
    initrd.write_bytes(
        initramfs.build(files=[(program, "/records")], modules=MODULES, modules_dir=modules, exec=script)
    )
    machine = kvmpy.Machine(kernel=kernel, initrd=[initrd])
    for disk in disks:
        machine.add(disk.device)
    machine.add(Port(disks))
    with machine:
        machine.wait(LIMIT)
    for n in range(len(disks)):
        assert f"kept-{n}" in machine.console.text, machine.console.text[-2000:]


# What must be on the disk, as records.c makes it.


def content(what: int, number: int) -> bytes:
    return bytes(what * 31 + number * 131 + at * 7 & 0xFF for at in range(100 + number * 37 % 3000))


def damage(image: Path, folder: Path, safe: dict[int, int]) -> str:
    """What is wrong on the file system `image`, where so many records of each kind are safe; empty: nothing."""
    names = ("log", "state", "db", "db-journal")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    commands = folder / "commands"
    commands.write_text("".join(f"dump {name} {folder / name}\n" for name in names))
    tool("debugfs", "-f", commands, image)
    found = {name: (folder / name).read_bytes() if (folder / name).exists() else b"" for name in names}
    expected = b"".join(content(LOG, number) for number in range(1, safe[LOG] + 1))
    if not found["log"].startswith(expected):
        return f"log: not all of {safe[LOG]} records are there"
    number = int.from_bytes(found["state"][-4:], "little")
    if number < safe[STATE]:
        return f"state: {number}, but {safe[STATE]} was safe"
    if number and found["state"][:-4] != content(STATE, number):
        return f"state: {number} is damaged"
    return _database(bytearray(found["db"]), found["db-journal"], safe[DB])


def _database(db: bytearray, journal: bytes, safe: int) -> str:
    entry = PAGE + 4
    if len(journal) == 3 * entry + 4 and ADLER.unpack(journal[-4:])[0] == zlib.adler32(journal[:-4]):
        for at in (0, entry, 2 * entry):
            page = int.from_bytes(journal[at : at + 4], "little")
            db[page * PAGE : (page + 1) * PAGE] = journal[at + 4 : at + entry]
    number = int.from_bytes(db[:4], "little")
    if number not in (safe, safe + 1):
        return f"db: {number}, but {safe} was safe"
    if number and db != _pages(number):
        return f"db: {number} is damaged"
    return ""


def _pages(number: int) -> bytes:
    last = [0] * PAGES
    for change in range(1, number + 1):
        for page in (0, change % PAGES, (3 * change + 1) % PAGES):
            last[page] = change
    return b"".join(change.to_bytes(4, "little") * (PAGE // 4) for change in last)
