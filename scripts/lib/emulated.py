"""Runs a command in an AMD-V host that QEMU's software CPU emulates under Debian's kernel, on this machine's files."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import lzma
import math
import os
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ["qemu-system-x86", "busybox-static"]
MODULES = ["9p", "9pnet_virtio", "virtio_pci", "virtio_console", "overlay", "kvm_amd"]
EMPTY = ["/run", "/tmp", "/var/tmp"]  # folders that begin empty
PRIVATE = {"TMPDIR", "TMP", "TEMP"}  # environment variables that name folders of this machine only
BOOT_LIMIT = 120  # seconds until the command starts: 3 on an idle machine
MAX_FILES = 1 << 20  # the kernel's own limit for ulimit -n (fs.nr_open)
MIN_MEM = 256  # MiB: with much less the kernel hangs before its first message
MAX_CPUS = 255  # of QEMU's q35 machine without an interrupt remapping unit
LAST_WORDS = 60  # lines of kernel messages shown when the host dies: a panic has about 45
CHUNK = 1 << 16
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Port n of the virtio serial device is /dev/vport0p<n> in the host; port 0 is its terminal, /dev/hvc0.
TERMINAL, STDIN, STDOUT, STDERR, CONTROL, HEARTBEAT = range(6)
BEAT = 0.05  # seconds

# The first process of the host: makes the root file system and becomes RUN.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
for module in /modules/*; do
    case $module in
        *kvm-amd.ko*) insmod "$module" npt=0 ;; # see qemu_command
        *) insmod "$module" ;;
    esac
done
plan9() {{ mount -t 9p -o "$3,trans=virtio,version=9p2000.L,access=any,msize=512000" "$1" "$2"; }}
empty() {{ mount -t tmpfs -o mode=1777 tmpfs "/host$1"; }}
overlay() {{ # the lower folder is relative: not every name can stand in the option
    mkdir -p "/host$1" "/scratch/$2/upper" "/scratch/$2/work"
    cd "/lower$1"
    mount -t overlay -o "lowerdir=.,upperdir=/scratch/$2/upper,workdir=/scratch/$2/work" overlay "/host$1"
    cd /
}}
shown() {{ mkdir -p "/host$1"; mount --bind "/lower$1" "/host$1"; }}
kept() {{ mkdir -p "/host$1"; plan9 "kept$2" "/host$1" rw; }}
plan9 root /host ro,cache=loose
mount --bind /host /lower
mount -t tmpfs tmpfs /scratch
{mounts}
mount -t proc proc /host/proc
mount -t sysfs sysfs /host/sys
mount -t cgroup2 cgroup2 /host/sys/fs/cgroup
mount -t devtmpfs devtmpfs /host/dev
mkdir -p /host/dev/pts /host/dev/shm /host/dev/linux-host
mount -t devpts -o mode=620,ptmxmode=666 devpts /host/dev/pts
mount -t tmpfs tmpfs /host/dev/shm
ln -s /proc/self/fd /host/dev/fd
ln -s fd/0 /host/dev/stdin
ln -s fd/1 /host/dev/stdout
ln -s fd/2 /host/dev/stderr
hostname {name}
ip link set lo up
cp /bin/busybox /run.sh /host/dev/linux-host
exec switch_root /host /dev/linux-host/busybox sh /dev/linux-host/run.sh
"""

# Runs the command in a cgroup, so that what it started can be ended with it. Between it and each port stands a pipe:
# unlike a port it can be opened by its name (/dev/stdout) and by several processes.
RUN = """\
cd /dev/linux-host
until [ -c /dev/vport0p{control} ]; do ./busybox sleep 0.01; done
exec 3>/dev/vport0p{control}
./busybox mkfifo in out err
./busybox cat </dev/vport0p{heartbeat} >/dev/null 3>&- &
./busybox cat </dev/vport0p{stdin} >in 3>&- &
./busybox cat <out >/dev/vport0p{stdout} 3>&- &
out=$!
./busybox cat <err >/dev/vport0p{stderr} 3>&- &
err=$!
exec 4>out 5>err
./busybox mkdir /sys/fs/cgroup/command
echo ready >&3
(
    {prepare}
    ulimit -n {files}
    echo 0 >/sys/fs/cgroup/command/cgroup.procs
    cd {folder}
    exec {command}
) {streams} 3>&- 4>&- 5>&-
status=$?
echo 1 >/sys/fs/cgroup/command/cgroup.kill
exec 4>&- 5>&-
wait $out $err
{drain}
./busybox sync
echo $status >&3
./busybox sleep {limit} # the other side ends this host
"""


class HostError(Exception):
    """There is no host to run on, or no more; `status` is what linux-host then ends with."""

    def __init__(self, message: str, status: int = 126) -> None:
        super().__init__(message)
        self.status = status


def run(command: list[str], rw: list[str], cpus: int, mem: str, deadline: float, verbose: bool) -> int:
    """Runs `command`, keeping what it writes below the folders `rw`. Returns its exit status.

    `deadline` is on the clock of time.monotonic(): TimeoutError then. Raises HostError besides.
    """
    script("lib/packages", *PACKAGES, deadline=deadline)
    kernel = Path(os.fsdecode(script("fetch-kernel", "amd64", deadline=deadline).rstrip(b"\n")))
    kept = kept_folders(rw)
    near, far = zip(*(socket.socketpair() for _ in range(HEARTBEAT + 1)), strict=True)
    with open(os.memfd_create("initrd"), "wb") as initrd, contextlib.ExitStack() as cleanup:
        for port in near + far:
            cleanup.enter_context(port)
        initrd.write(archive(initrd_files(kernel, command, kept)))
        initrd.flush()
        descriptors = [port.fileno() for port in far]
        qemu = subprocess.Popen(
            qemu_command(kernel_image(kernel), initrd.fileno(), kept, descriptors, cpus, mem, verbose),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[initrd.fileno(), *descriptors],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        cleanup.callback(end, qemu)
        for port in far:
            port.close()
        return serve(qemu, near, deadline, verbose)


def script(name: str, *arguments: str, deadline: float) -> bytes:
    """The output of a script of this checkout, which has told on stderr why it failed when HostError is raised."""
    try:
        done = subprocess.run([CHECKOUT / "scripts" / name, *arguments], stdout=subprocess.PIPE, timeout=left(deadline))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if done.returncode:
        raise HostError("no host to emulate without the above")
    return done.stdout


def serve(qemu: subprocess.Popen[bytes], ports: Sequence[socket.socket], deadline: float, verbose: bool) -> int:
    """Carries the command's input and output until its exit status comes, which it returns."""
    words: collections.deque[bytes] = collections.deque(maxlen=LAST_WORDS)
    failures: list[OSError] = []

    def listen() -> None:
        for line in qemu.stdout or ():
            if b"TCG doesn't support requested feature" in line:
                continue
            words.append(line)
            if verbose:
                os.write(2, line)

    def deliver(port: socket.socket, target: int) -> None:
        try:
            while data := port.recv(CHUNK):
                while data:
                    data = data[os.write(target, data) :]
        except OSError as error:  # nobody reads what the command writes
            failures.append(error)
            with contextlib.suppress(OSError):
                ports[CONTROL].shutdown(socket.SHUT_RDWR)

    def feed(port: socket.socket) -> None:
        with contextlib.suppress(OSError):  # what cannot be read is empty, and a host that ended takes no more
            while data := os.read(0, CHUNK):
                port.sendall(data)
        with contextlib.suppress(OSError):
            port.shutdown(socket.SHUT_WR)

    def beat() -> None:
        """Interrupt the host again and again: QEMU 7.2 may lose an interrupt that comes while a guest is entered or
        left (svm_helper.c changes the pending ones without a lock), and notices it at the next one. A host that waits
        for its timer alone would wait for ever."""
        with contextlib.suppress(OSError):
            while True:
                ports[HEARTBEAT].sendall(b".")
                time.sleep(BEAT)

    def message(until: float) -> bytes:
        ports[CONTROL].settimeout(left(until))
        return control.readline()

    def died(how: str, status: int) -> HostError:
        said = b"".join(words).decode(errors="replace")
        return HostError(f"the emulated host {how}; its last messages:\n{said}", status)

    listener = start(listen)
    start(beat)
    control = ports[CONTROL].makefile("rb")
    boot_deadline = time.monotonic() + BOOT_LIMIT
    try:
        started = message(min(deadline, boot_deadline))
    except TimeoutError:
        if deadline <= boot_deadline:
            raise
        raise died(f"did not start within {BOOT_LIMIT} s", 126) from None
    terminal = has_terminal()
    with raw_terminal() if started and terminal else contextlib.nullcontext():
        deliveries = [start(deliver, ports[port], target) for port, target in ((TERMINAL, 1), (STDOUT, 1), (STDERR, 2))]
        start(feed, ports[TERMINAL if terminal else STDIN])
        status = message(deadline)
        end(qemu)  # all that the command wrote is in the sockets
        for delivery in [*deliveries, listener]:
            delivery.join(left(deadline))
            if delivery.is_alive():
                raise TimeoutError
    for failure in failures:
        if failure.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        raise HostError(f"cannot write the command's output: {failure.strerror}")
    if not status:
        raise died("died", 255) if started else died("did not start", 126)
    return int(status)


def start(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def left(deadline: float) -> float | None:
    return None if deadline == math.inf else max(deadline - time.monotonic(), 0.001)


def end(child: subprocess.Popen[bytes]) -> None:
    """Kills the process group that `child` leads, unless `child` has ended by itself."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def has_terminal() -> bool:
    return os.isatty(0) and os.isatty(1)


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Leaves every key to the terminal of the emulated host."""
    settings = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSANOW, settings)


def search_path() -> str:
    return f"{CHECKOUT}/.venv/bin:{os.environ.get('PATH') or os.defpath}"


def caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def kept_folders(rw: list[str]) -> list[Path]:
    """The folders whose files the emulated host changes, none inside another."""
    return outermost(Path.cwd(), caches() / "kvmpy", *map(Path, rw))


def outermost(*folders: Path) -> list[Path]:
    found = dict.fromkeys(folder.resolve() for folder in folders)
    return [folder for folder in found if found.keys().isdisjoint(folder.parents)]


def mounts(kept: list[Path]) -> str:
    """The lines of INIT that lay other file systems over the root, outer folders first."""
    steps: dict[Path, str] = {}
    venv = CHECKOUT / ".venv"  # kept, it would be read without caching, and Python start half as fast
    for number, folder in enumerate([*outermost(Path.home(), caches()), venv]):
        steps[folder] = f"overlay {shlex.quote(str(folder))} {number}"
    empty = [Path(folder).resolve() for folder in EMPTY]
    if not set(empty).isdisjoint(CHECKOUT.parents):
        steps[CHECKOUT] = f"shown {shlex.quote(str(CHECKOUT))}"
    for folder in empty:
        steps[folder] = f"empty {shlex.quote(str(folder))}"
    for folder in [folder for folder in steps if folder != venv and {folder, *folder.parents} & set(kept)]:
        del steps[folder]
    for number, folder in enumerate(kept):
        steps[folder] = f"kept {shlex.quote(str(folder))} {number}"
    return "\n".join(steps[folder] for folder in sorted(steps, key=lambda folder: len(folder.parts)) if folder.is_dir())


def run_script(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in PRIVATE} | {"PATH": search_path()}
    busybox = "/dev/linux-host/busybox"
    assignments = [f"{name}={value}" for name, value in environment.items()]
    launcher = [busybox, "env", "-i", *assignments, "/bin/sh", "-c", 'exec "$@"', "linux-host", *command]
    prepare, drain, streams, session = ":", ":", "<in >&4 2>&5", [busybox, "setsid"]
    if has_terminal():
        size = os.get_terminal_size(0)
        prepare = f"./busybox stty rows {size.lines} cols {size.columns}"
        drain = "./busybox stty sane </dev/hvc0"
        streams = f"</dev/hvc0 >/dev/hvc0 2>{'/dev/hvc0' if os.isatty(2) else '&5'}"
        session.append("-c")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return RUN.format(
        stdin=STDIN,
        stdout=STDOUT,
        stderr=STDERR,
        control=CONTROL,
        heartbeat=HEARTBEAT,
        prepare=prepare,
        files=files if 0 < files < MAX_FILES else MAX_FILES,
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join(session + launcher),
        streams=streams,
        drain=drain,
        limit=BOOT_LIMIT,
    )


def initrd_files(kernel: Path, command: list[str], kept: list[Path]) -> Iterator[tuple[str, int, bytes]]:
    """Path, mode and content of all that the first process needs."""
    for folder in ("bin", "dev", "host", "lower", "modules", "proc", "scratch"):
        yield folder, stat.S_IFDIR | 0o755, b""
    busybox = shutil.which("busybox")
    assert busybox
    yield "bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes()
    for number, module in enumerate(modules(kernel)):
        content = module.read_bytes()
        if module.suffix == ".xz":
            content = lzma.decompress(content)
        yield f"modules/{number:02}-{module.name}", stat.S_IFREG | 0o644, content
    init = INIT.format(mounts=mounts(kept), name=shlex.quote(os.uname().nodename))
    yield "init", stat.S_IFREG | 0o755, os.fsencode(init)
    yield "run.sh", stat.S_IFREG | 0o644, os.fsencode(run_script(command))


def modules(kernel: Path) -> list[Path]:
    """The files of MODULES and of those they need, in the order to load them."""
    folder = next(kernel.glob("lib/modules/*"))
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        file, others = line.split(":")
        needs[Path(file).name.partition(".")[0].replace("-", "_")] = [*reversed(others.split()), file]
    files = [file for name in MODULES for file in needs.get(name, [])]  # what has no entry is built in
    return [folder / file for file in dict.fromkeys(files)]


def archive(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the newc format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    parts = []
    for inode, (name, mode, content) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        parts += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]
    return b"".join(parts)


def kernel_image(kernel: Path) -> Path:
    """The kernel as an ELF file made from its bzImage once: decompressing it costs the emulated CPU 3 s."""
    image = next(kernel.glob("boot/vmlinuz-*"))
    unpacked = image.with_name(image.name.replace("vmlinuz", "vmlinux", 1))
    if unpacked.exists():
        return unpacked
    content = image.read_bytes()
    setup_sects = content[0x1F1] or 4  # Documentation/arch/x86/boot.rst, the real-mode header
    payload_offset, payload_length = struct.unpack_from("<II", content, 0x248)
    begin = (setup_sects + 1) * 512 + payload_offset
    temporary = unpacked.with_name(f".{unpacked.name}.{os.getpid()}")
    try:
        temporary.write_bytes(lzma.LZMADecompressor().decompress(content[begin : begin + payload_length]))
        temporary.replace(unpacked)
    except (OSError, lzma.LZMAError):  # a cache that cannot be written, a kernel that is not compressed by xz
        return image
    finally:
        temporary.unlink(missing_ok=True)
    return unpacked


def qemu_command(
    kernel: Path, initrd: int, kept: list[Path], ports: list[int], cpus: int, mem: str, verbose: bool
) -> list[str]:
    """QEMU with these ports and folders.

    QEMU 7.2 does not emulate nested paging faithfully when something else happens at the same time: a guest could be
    left with the registers and the page table of the host, and stood still. So KVM shadows the guest's page tables
    instead (npt=0), which costs nothing here; and there is one processor unless the caller wants more.
    """
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # multi: one thread for each CPU
    command += ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC", "-smp", str(cpus), "-m", mem]
    options = "panic=-1 console=ttyS0 tsc=reliable no_timer_check cryptomgr.notests" + ("" if verbose else " quiet")
    command += ["-kernel", str(kernel), "-initrd", f"/proc/self/fd/{initrd}", "-append", options, "-serial", "stdio"]
    command += ["-device", "virtio-serial-pci"]
    for number, descriptor in enumerate(ports):
        kind = "virtconsole" if number == TERMINAL else "virtserialport"
        command += ["-chardev", f"socket,id=port{number},fd={descriptor}"]
        command += ["-device", f"{kind},nr={number},chardev=port{number}"]
    shares = [("root", "/", ",readonly=on"), *((f"kept{n}", str(folder), "") for n, folder in enumerate(kept))]
    for tag, folder, access in shares:
        path = folder.replace(",", ",,")  # QEMU's escape
        command += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{access}"]
        command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return command
