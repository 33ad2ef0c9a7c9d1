"""Where hostile guests run: a machine for each, and a look at what it leaves of this process."""

from __future__ import annotations

import json
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from malice import IDT, RAM, REAL, SCALE, SECOND, SERVED, STUBS, Guest, assemble, second

import kvmpy
from kvmpy.core.board import Attachable, Reason, Stop
from kvmpy.core.log import BURST, log
from kvmpy.evidence import collect
from kvmpy.remains import gather
from kvmpy.report import facts, render
from kvmpy.virtio.balloon import Balloon
from kvmpy.virtio.blk import Blk
from kvmpy.virtio.console import VirtioConsole
from kvmpy.virtio.fs import Fs
from kvmpy.virtio.net import Net
from kvmpy.virtio.rng import Rng
from kvmpy.virtio.vsock import Vsock
from kvmpy.x86 import longmode

SECONDS = 30.0  # for what must happen; reached only when something hangs
LINES = 4 * BURST  # of the log, from one guest: each event has BURST in a period, and few kinds come together
REPORT_BYTES = 16 << 10  # for people
FACTS_BYTES = 16 << 20  # for programs, with lines of the console whole
PEAK = 48 << 20  # bytes of memory beyond those before: RAM, devices, the report
NORMAL = 5  # every so many hostile guests, a normal one is booted behind them
KEPT = 4 << 20  # of them after the machine has gone

POWER_OFF = bytes.fromhex("ba0006 b034 ee fa f4")  # mov dx,600h; mov al,34h (SLP_EN, S5); out dx,al; cli; hlt


def devices(folder: Path, peer: Path) -> dict[str, Callable[[], Attachable]]:
    """What makes the devices that guests want."""
    return {
        "rng": Rng,
        "blk": lambda: Blk(path=folder / "disk", queues=2),
        "net": lambda: Net("socket", path=peer),
        "balloon": lambda: Balloon(stats=1),
        "console": lambda: VirtioConsole(ports=2),
        "vsock": Vsock,
        "fs": lambda: Fs(path=folder / "share", tag="share"),
    }


def machine(guest: Guest, folder: Path, peer: Path) -> kvmpy.Machine:
    """A machine for the guest, not started; its program comes by `place`."""
    cpus = 2 if guest.second else 1
    vm = kvmpy.Machine(kernel=folder / "sector", mem=f"{RAM >> 20}M", cpus=cpus, transport=guest.transport)
    makers = devices(folder, peer)
    for kind in guest.devices:
        vm.add(makers[kind]())
    return vm


def place(vm: kvmpy.Machine, guest: Guest, binaries: Mapping[str, bytes]) -> Callable[[str], None]:
    """The program to memory, the first CPU to its entry; for Machine.start, as its `lock_down`."""
    memory, vcpu = vm.memory, vm.vcpus[0].vcpu
    sregs, regs = vcpu.sregs(), vcpu.regs()
    if guest.mode == "long":
        longmode.long_mode(sregs, memory)
        memory.write(IDT, b"".join(_gate(STUBS if vector < 32 else STUBS + 0x40) for vector in range(256)))
        memory.write(STUBS, binaries["stubs"])
    elif guest.mode == "protected":
        longmode.protected_mode(sregs, memory)
    for address, data in guest.memory.items():
        memory.write(address, data)
    memory.write(guest.origin, binaries.get(guest.name, b"\xf4"))
    if guest.second:
        memory.write(SECOND, binaries[second(guest.name)])
    vcpu.set_sregs(sregs)
    regs.rip, regs.rsp = guest.origin, REAL
    vcpu.set_regs(regs)
    return lambda role: None


class Outcome(NamedTuple):
    """What is known of a guest that has run."""

    stop: Stop
    memory: bytes  # the first 64 KiB of its RAM
    lines: list[str]  # of the log
    console: str


class Arena:
    """Runs hostile guests in this process, with devices made afresh for each."""

    def __init__(self, folder: Path, include: Path, guests: Iterable[Guest], peer: Path) -> None:
        self.folder = folder
        self.endings: Counter[str] = Counter()
        self._binaries = assemble(guests, folder, include)
        self._peer = peer
        for name, code in (("sector", b"\xeb\xfe"), ("normal", POWER_OFF)):
            (folder / name).write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
        (folder / "disk").write_bytes(b"D" * (1 << 20))
        (folder / "share").mkdir()
        (folder / "share" / "file").write_bytes(b"content")
        for transport in ("mmio", "pci"):  # what is loaded lazily is loaded by the first machines
            self.run(Guest("warm", "", transport=transport, devices=tuple(devices(folder, peer))), check=False)

    def run(self, guest: Guest, *, check: bool = True) -> Outcome:
        """Run `guest` to its end or until its time is over; then see that the host is as it was before."""
        before = _Host()
        told: list[str] = []
        log._windows, log._logger = {}, _Lines(told)
        outcome = self._run(guest)
        self.endings[outcome.stop.reason.name] += 1
        if check:
            self._check(guest, outcome, before)
        return outcome

    def _run(self, guest: Guest) -> Outcome:
        vm = machine(guest, self.folder, self._peer)
        try:
            vm.start(lambda: place(vm, guest, self._binaries))
            select.select([vm._stop_event], [], [], min(guest.seconds / 4, 0.02))
            with vm.paused() as vcpus:
                assert all(vcpu.regs() for vcpu in vcpus)
            stop = vm.wait(guest.seconds)
            assert all(thread.join(0) for thread in vm.vcpus), "a vCPU's thread is still there"
            _report(vm, stop)
            return Outcome(stop, vm.memory.read(0, 1 << 16), log._logger.lines, vm.console.text)
        finally:
            vm.close()

    def run_locked_in(self, guest: Guest, level: str) -> dict[str, Any]:
        """Run `guest` in a process of its own that is locked in as that of `kvmpy boot` is: locked_guest.py."""
        binaries = {name: self._binaries.get(name) for name in ("stubs", guest.name, second(guest.name))}
        (self.folder / "guest").write_bytes(pickle.dumps((guest, binaries)))
        command: list[Any] = [
            sys.executable,
            Path(__file__).with_name("locked_guest.py"),
            level,
            self.folder,
            self._peer,
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * SECONDS)
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        found: dict[str, Any] = json.loads(done.stdout)
        assert Reason[found["reason"]] in guest.ends, found
        assert len(done.stderr.splitlines()) <= LINES
        return found

    def _check(self, guest: Guest, outcome: Outcome, before: _Host) -> None:
        assert outcome.stop.reason in guest.ends, str(outcome.stop)
        assert outcome.stop.cause is None
        assert guest.ends != SERVED or outcome.stop.status == 0, "a device has not served what was as it should be"
        after = _Host()
        assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
        assert after.peak - before.rss < PEAK
        assert after.rss - before.rss < KEPT
        assert len(outcome.lines) <= LINES, outcome.lines[-3:]
        assert all(count <= BURST for count in Counter(map(_event, outcome.lines)).values())
        assert all(len(line) < 1000 for line in outcome.lines)
        assert (self.folder / "disk").stat().st_size == 1 << 20
        if SCALE or self.endings.total() % NORMAL == 0:
            self.run_normal()

    def run_normal(self) -> None:
        """Boot a guest that is well-behaved, in the same process."""
        with kvmpy.Machine(kernel=self.folder / "normal", mem="1M") as vm:
            assert vm.wait(SECONDS).reason is Reason.POWEROFF


def _report(vm: kvmpy.Machine, stop: Stop) -> None:
    """What is told of the machine, in each of the three ways, has an end."""
    evidence = collect(vm, stop)
    assert len(render(evidence)) < REPORT_BYTES
    assert len(json.dumps(facts(evidence))) < FACTS_BYTES
    assert all("state" in cpu for cpu in gather(vm, stop)["vcpus"])


def _event(line: str) -> str:
    return line.partition("{")[0]


class _Host:
    """What this process holds now; makes the kernel begin anew with the peak of its memory."""

    def __init__(self) -> None:
        self.descriptors = sorted(os.listdir("/proc/self/fd"))
        self.threads = sorted(thread.name for thread in threading.enumerate())
        words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.rss, self.peak = (int(words[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")


class _Lines:
    """In the place of a logger: keeps what is logged."""

    def __init__(self, told: list[str]) -> None:
        self.lines = told

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **fields: self.lines.append(f"{level} {event} {fields}")


def _gate(handler: int) -> bytes:
    """A 64-bit interrupt gate (SDM vol. 3A, 6.14.1)."""
    return struct.pack("<HHHHII", handler, longmode.BOOT_CS, 0x8E00, 0, 0, 0)


ECHO = """
import asyncio, sys
async def echo(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def main():
    server = await asyncio.start_unix_server(echo, sys.argv[1])
    print(flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def start_peer(path: Path) -> subprocess.Popen[Any]:
    """A program that sends back what comes through the UNIX socket `path`: the other end of network cards."""
    process = subprocess.Popen([sys.executable, "-c", ECHO, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process
