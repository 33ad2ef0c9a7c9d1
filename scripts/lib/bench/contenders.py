"""The monitors that are measured, each as the command line that its users would write."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "scripts/lib/bench/build"
MIB = 1 << 20
LINKED, ENTRY64 = 0x100000, 0x10FFE0  # guests/bench/bench.ld
LINUX = "console=ttyS0,115200 quiet panic=-1 reboot=k pci=off no_timer_check 8250.nr_uarts=1 random.trust_cpu=on"
TRANSPORTS = 8  # of microvm without ACPI


@dataclass(frozen=True)
class Job:
    """What a contender is to run. Devices come in this order: console, disks, networks."""

    image: Path = Path()  # 64 KiB, guests/bench/start.S
    mem: int = 64  # MiB
    cpus: int = 1
    console: bool = False  # a virtio console, whose output comes on standard output like the serial port's
    disks: tuple[Path, ...] = ()
    nets: tuple[Path, ...] = ()  # UNIX sockets on which somebody listens: frames behind their length
    taps: tuple[str, ...] = ()  # interfaces
    qmp: Path | None = None  # where QEMU is to listen for commands

    def with_image(self, image: Path) -> Job:
        return replace(self, image=image)


@dataclass(frozen=True)
class Contender:
    """A monitor; `device` and `pin` are those of its first virtio-mmio device."""

    name: str
    device: int = 0
    pin: int = 5
    exit_port: int = 0xF4
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, job: Job) -> list[str]:
        raise NotImplementedError

    def linux(self, kernel: Path, initrd: Path, mem: int) -> list[str]:
        """The command that boots Linux with its console on standard output; [] if it cannot."""
        return []

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return kept | self.environment  # as users have it: modules are compiled once

    def lacks(self, job: Job) -> bool:
        """Whether this contender has no devices of that kind."""
        return False


@dataclass(frozen=True)
class Kvmpy(Contender):
    """This checkout, through its command line."""

    sandbox: str = ""

    def command(self, job: Job) -> list[str]:
        words = f"boot {job.image} --boot flat --serial stdio --mem {job.mem}M --cpus {job.cpus}".split()
        words += ["--sandbox", self.sandbox] if self.sandbox else []
        words += ["--console", "virtio"] if job.console else []
        words += [f"--disk={disk}" for disk in job.disks]
        words += [f"--net=socket={path}" for path in job.nets]
        words += [f"--net=tap={name}" for name in job.taps]
        return [str(BUILD / "venv/bin/kvmpy"), *words]

    def linux(self, kernel: Path, initrd: Path, mem: int) -> list[str]:
        words = f"boot {kernel} --initrd {initrd} --mem {mem}M --serial stdio".split()
        return [str(BUILD / "venv/bin/kvmpy"), *words, "--cmdline", LINUX]


@dataclass(frozen=True)
class Qemu(Contender):
    """QEMU's microvm, the machine nearest to ours; the image is its firmware."""

    binary: str = ""
    aio: str = "threads"

    def command(self, job: Job) -> list[str]:
        more = job.console + len(job.disks) + len(job.nets) > TRANSPORTS
        machine = "microvm,rtc=off," + ("acpi=on,ioapic2=on" if more else "acpi=off")
        words = f"{self.binary} -accel kvm -M {machine} -m {job.mem} -smp {job.cpus}".split()
        words += "-nodefaults -no-user-config -display none -no-reboot -global virtio-mmio.force-legacy=false".split()
        words += f"-device isa-debug-exit,iobase={self.exit_port:#x},iosize=1 -bios {job.image}".split()
        words += "-chardev stdio,id=out,mux=on -serial chardev:out".split()
        words += ["-qmp", f"unix:{job.qmp},server=on,wait=off"] if job.qmp else []
        devices = [["virtio-serial-device", "virtconsole,chardev=out"]] if job.console else []
        for number, disk in enumerate(job.disks):
            words += ["-drive", f"if=none,id=d{number},format=raw,aio={self.aio},file={disk}"]
            devices.append([f"virtio-blk-device,drive=d{number}"])
        for number, path in enumerate(job.nets):
            words += ["-netdev", f"stream,id=n{number},addr.type=unix,addr.path={path}"]
            devices.append([f"virtio-net-device,netdev=n{number}"])
        for number, name in enumerate(job.taps):
            words += ["-netdev", f"tap,id=t{number},ifname={name},script=no,downscript=no"]
            devices.append([f"virtio-net-device,netdev=t{number}"])
        for number, (first, *others) in enumerate(devices):
            words += ["-device", f"{first},bus=virtio-mmio-bus.{number}"]
            words += [word for other in others for word in ("-device", other)]
        return words

    def linux(self, kernel: Path, initrd: Path, mem: int) -> list[str]:
        words = f"{self.binary} -accel kvm -M microvm,rtc=off -m {mem} -nodefaults -no-user-config -display none"
        return [*words.split(), *f"-serial stdio -kernel {kernel} -initrd {initrd} -append".split(), LINUX]


class BareLoop(Contender):
    """The least that a monitor can do (bare_loop.c): no devices."""

    def command(self, job: Job) -> list[str]:
        return [str(BUILD / "bare_loop"), str(job.image)]

    def lacks(self, job: Job) -> bool:
        return job.console or bool(job.disks or job.nets or job.taps) or job.cpus > 1


class Kvmtool(Contender):
    """kvmtool; untested, as no machine of ours had it. Its devices are on MMIO when told so."""

    def command(self, job: Job) -> list[str]:
        words = f"lkvm run --kernel {job.image} --mem {job.mem} --cpus {job.cpus} --virtio-transport mmio".split()
        words += ["--console", "virtio"] if job.console else ["--console", "serial"]
        return words + [word for disk in job.disks for word in ("--disk", str(disk))]

    def lacks(self, job: Job) -> bool:
        return bool(job.nets or job.taps)

    def linux(self, kernel: Path, initrd: Path, mem: int) -> list[str]:
        words = f"lkvm run --kernel {kernel} --initrd {initrd} --mem {mem} --cpus 1 --console serial".split()
        return [*words, "--params", LINUX]


class Firecracker(Contender):
    """Firecracker; untested, as no machine of ours had it. It takes the image as an ELF kernel, and has no sockets."""

    def command(self, job: Job) -> list[str]:
        kernel, config = job.image.with_suffix(".elf"), job.image.with_suffix(".json")
        kernel.write_bytes(elf(job.image.read_bytes()))
        drives = [
            {"drive_id": f"d{n}", "path_on_host": str(disk), "is_root_device": False, "is_read_only": False}
            for n, disk in enumerate(job.disks)
        ]
        networks = [{"iface_id": f"n{n}", "host_dev_name": name} for n, name in enumerate(job.taps)]
        machine = {"vcpu_count": job.cpus, "mem_size_mib": job.mem}
        boot = {"kernel_image_path": str(kernel), "boot_args": ""}
        parts = {"boot-source": boot, "drives": drives, "machine-config": machine, "network-interfaces": networks}
        config.write_text(json.dumps(parts))
        return ["firecracker", "--no-api", "--config-file", str(config)]

    def lacks(self, job: Job) -> bool:
        return job.console or bool(job.nets)


def elf(image: bytes) -> bytes:
    """The image of a guest in C as an ELF file with one segment (System V ABI, ELF header and program header)."""
    start = 4096
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian
    executable, x86_64, load, all_rights = 2, 62, 1, 7
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, executable, x86_64, 1, ENTRY64, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", load, all_rights, start, LINKED, LINKED, len(image), len(image), start)
    return (head + segment).ljust(start, b"\0") + image


def disk_image(folder: Path, size: int = MIB, name: str = "disk.img") -> Path:
    """A disk without holes, whose bytes are in the page cache and on the disk of the host."""
    path = folder / name
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    return path


def build() -> None:
    """What is compiled: the guests, the bare loop, the library that notes the first KVM_RUN; and a Python for kvmpy."""
    subprocess.run(["make", "-s", "-C", ROOT / "guests", "bench"], check=True)
    BUILD.mkdir(exist_ok=True)
    make_venv()
    for target, source, options in (
        ("bare_loop", "bare_loop.c", []),
        ("net_peer", "net_peer.c", []),
        ("first_run.so", "first_run.c", ["-shared", "-fPIC"]),
    ):
        made, code = BUILD / target, BUILD.parent / source
        if made.exists() and made.stat().st_mtime > code.stat().st_mtime:
            continue
        fresh = BUILD / f"{target}.{os.getpid()}"  # whole files appear at once
        words = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", *options, "-o", fresh, code]
        subprocess.run(words, check=True)
        fresh.rename(made)


def make_venv() -> None:
    """An environment that has this checkout as if it were installed: an editable one takes longer to start."""
    venv = BUILD / "venv"
    python = interpreter()
    if not venv.exists() or (venv / "bin/python").resolve() != python:
        fresh = BUILD / f"venv.{os.getpid()}"
        subprocess.run([python, "-m", "venv", "--without-pip", fresh], check=True)
        shutil.rmtree(venv, ignore_errors=True)
        fresh.rename(venv)
    packages = next(venv.glob("lib/python*/site-packages"))
    paths = [ROOT, *(path for path in sys.path if path.endswith("site-packages"))]
    (packages / "kvmpy.pth").write_text("".join(f"{path}\n" for path in paths))
    script = venv / "bin/kvmpy"
    script.write_text(f"#!{venv}/bin/python\nimport sys\nfrom kvmpy.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)


def interpreter() -> Path:
    """The distribution's Python, as QEMU is the distribution's: others are often built without optimisation. It takes
    one of this version, for which the packages of this checkout are."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = Path("/usr/bin") / name
    return (ours if ours.exists() else Path(sys.executable)).resolve()


def found(aios: tuple[str, ...] = (), *, real_mode: bool = False, unlocked: bool = False) -> Iterator[Contender]:
    """All contenders that this host has; QEMU once for each of `aios`, where the row is about disks; with `real_mode`,
    those that start guests in real mode; with `unlocked`, also kvmpy when it does not lock itself in."""
    yield BareLoop("bare C loop", device=0xD0000000)
    yield Kvmpy("kvmpy", device=0xD0000000, exit_port=0x502)
    yield Kvmpy("kvmpy pure", device=0xD0000000, exit_port=0x502, environment={"KVMPY_PURE": "1"})
    if unlocked:
        yield Kvmpy("kvmpy --sandbox off", device=0xD0000000, exit_port=0x502, sandbox="off")
    if binary := shutil.which("qemu-system-x86_64"):
        for aio in aios or ("threads",):
            yield Qemu(f"QEMU {aio}" if aios else "QEMU", device=0xFEB00000, binary=binary, aio=aio)
    if shutil.which("lkvm"):
        yield Kvmtool("kvmtool", device=0xD2000000)
    if shutil.which("firecracker") and not real_mode:
        yield Firecracker("Firecracker", device=0xC0001000)
