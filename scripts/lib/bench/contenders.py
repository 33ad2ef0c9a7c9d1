"""The monitors that are measured, each as the command line that its users would write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """What a contender is to run. Devices come in this order: console, disks, networks."""

    image: Path = Path()  # 64 KiB, guests/bench/start.S
    mem: int = 64  # MiB
    cpus: int = 1
    console: bool = False  # a virtio console, whose output comes on standard output like the serial port's
    disks: tuple[Path, ...] = ()
    nets: tuple[Path, ...] = ()  # UNIX sockets on which the harness listens: frames behind their length

    def with_image(self, image: Path) -> Job:
        return replace(self, image=image)


@dataclass(frozen=True)
class Contender:
    """A monitor; `device` and `pin` are those of its first virtio-mmio device, of which each has `stride` bytes."""

    name: str
    device: int = 0
    stride: int = 0
    pin: int = 5
    exit_port: int = 0xF4
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, job: Job) -> list[str]:
        raise NotImplementedError

    @property
    def env(self) -> dict[str, str]:
        return os.environ | self.environment

    def lacks(self, job: Job) -> bool:
        """Whether this contender has no devices of that kind."""
        return False


class Kvmpy(Contender):
    """This checkout, through its command line."""

    def command(self, job: Job) -> list[str]:
        words = f"-m kvmpy boot {job.image} --boot flat --serial stdio --mem {job.mem}M --cpus {job.cpus}".split()
        words += ["--console", "virtio"] if job.console else []
        words += [f"--disk={disk}" for disk in job.disks]
        words += [f"--net=socket={path}" for path in job.nets]
        return [sys.executable, *words]


@dataclass(frozen=True)
class Qemu(Contender):
    """QEMU's microvm, the machine nearest to ours; the image is its firmware."""

    binary: str = ""
    aio: str = "threads"

    def command(self, job: Job) -> list[str]:
        words = f"{self.binary} -accel kvm -M microvm,acpi=off,rtc=off -m {job.mem} -smp {job.cpus}".split()
        words += "-nodefaults -no-user-config -display none -no-reboot -global virtio-mmio.force-legacy=false".split()
        words += f"-device isa-debug-exit,iobase={self.exit_port:#x},iosize=1 -bios {job.image}".split()
        words += "-chardev stdio,id=out,mux=on -serial chardev:out".split()
        devices = [["virtio-serial-device", "virtconsole,chardev=out"]] if job.console else []
        for number, disk in enumerate(job.disks):
            words += ["-drive", f"if=none,id=d{number},format=raw,aio={self.aio},file={disk}"]
            devices.append([f"virtio-blk-device,drive=d{number}"])
        for number, path in enumerate(job.nets):
            words += ["-netdev", f"stream,id=n{number},addr.type=unix,addr.path={path}"]
            devices.append([f"virtio-net-device,netdev=n{number}"])
        for number, (first, *others) in enumerate(devices):
            words += ["-device", f"{first},bus=virtio-mmio-bus.{number}"]
            words += [word for other in others for word in ("-device", other)]
        return words


class BareLoop(Contender):
    """The least that a monitor can do (bare_loop.c): no devices."""

    def command(self, job: Job) -> list[str]:
        return [str(ROOT / "scripts/lib/bench/build/bare_loop"), str(job.image)]

    def lacks(self, job: Job) -> bool:
        return job.console or bool(job.disks or job.nets) or job.cpus > 1


class Kvmtool(Contender):
    """kvmtool; untested, as no machine of ours had it. Its devices are on MMIO when told so."""

    def command(self, job: Job) -> list[str]:
        words = f"lkvm run --kernel {job.image} --mem {job.mem} --cpus {job.cpus} --virtio-transport mmio".split()
        words += ["--console", "virtio"] if job.console else ["--console", "serial"]
        return words + [word for disk in job.disks for word in ("--disk", str(disk))]

    def lacks(self, job: Job) -> bool:
        return bool(job.nets)


def disk_image(folder: Path, size: int = MIB, name: str = "disk.img") -> Path:
    """A disk without holes, whose bytes are in the page cache and on the disk of the host."""
    path = folder / name
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    return path


def build() -> None:
    """What is compiled: the guests and the bare loop."""
    subprocess.run(["make", "-s", "-C", ROOT / "guests", "bench"], check=True)
    folder = ROOT / "scripts/lib/bench/build"
    folder.mkdir(exist_ok=True)
    source, program = folder.parent / "bare_loop.c", folder / "bare_loop"
    fresh = folder / f"bare_loop.{os.getpid()}"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", fresh, source], check=True)
    fresh.rename(program)


def found(aios: tuple[str, ...] = ()) -> Iterator[Contender]:
    """All contenders that this host has; QEMU once for each of `aios`, where the row is about disks."""
    source = {"PYTHONPATH": str(ROOT)}
    layout = {"device": 0xD0000000, "stride": 0x1000}
    yield BareLoop("bare C loop", **layout)
    yield Kvmpy("kvmpy", exit_port=0x502, environment=source, **layout)
    yield Kvmpy("kvmpy pure", exit_port=0x502, environment=source | {"KVMPY_PURE": "1"}, **layout)
    if binary := shutil.which("qemu-system-x86_64"):
        for aio in aios or ("threads",):
            name = f"QEMU {aio}" if aios else "QEMU"
            yield Qemu(name, device=0xFEB00000, stride=0x200, binary=binary, aio=aio)
    if shutil.which("lkvm"):
        yield Kvmtool("kvmtool", device=0xD2000000, stride=0x200)
