"""Examines this host: what a machine needs of it, what of that is there, and the remedy for what is not."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from .boot import initramfs, kernels
from .core.errors import CannotRunKernels, KvmError, NotFoundError
from .core.record import Record
from .core.text import printable
from .jail.lock import why_no_namespaces
from .kvm.handle import DEVICE, REMEDIES, REQUIRED, Kvm
from .kvm.probe import runs_ring0_natively

TOOL_TIMEOUT = 5  # seconds
DEFAULT_MEMORY = 512  # MiB that `kvmpy boot` gives a guest
FEW_FILES = 256  # each vCPU takes a descriptor, each device a few
CHECKOUT_TOOL = Path(__file__).parent.parent / "scripts" / "linux-host"
YES, NO = "yes", "no"

# Capabilities whose lack costs something, and what. The required ones are in kvm.handle.
OPTIONAL = {
    "KVM_CAP_TSC_CONTROL": ("TSC scaling", "guests see the host's TSC frequency"),
    "KVM_CAP_TSC_DEADLINE_TIMER": ("TSC deadline", "guests use a slower timer"),
    "KVM_CAP_COALESCED_PIO": ("coalesced ports", "more exits"),
    "KVM_CAP_X2APIC_API": ("x2APIC ids", "at most 255 vCPUs"),
    "KVM_CAP_XSAVE2": ("large XSAVE", "guests cannot have AMX"),
    "KVM_CAP_IRQFD_RESAMPLE": ("level irqfd", "devices cannot share interrupt lines"),
}

# System calls that have no wrapper here (arch/x86/entry/syscalls/syscall_64.tbl), as (number, arguments).
SYS_USERFAULTFD, SYS_IO_URING_SETUP, SYS_LANDLOCK_CREATE_RULESET = 323, 425, 444
UFFD_USER_MODE_ONLY = 1
LANDLOCK_CREATE_RULESET_VERSION = 1


class Level(Enum):
    OK = "ok"
    NOTE = "-"  # a fact, neither good nor bad
    WARN = "warn"  # something will not work, or not as well
    FAIL = "FAIL"  # no Linux will boot


class Check(Record, frozen=True):
    """One finding: `name` of the thing, `found` about it, and the `remedy` where there is something to do."""

    name: str
    level: Level
    found: str
    remedy: str = ""


class Section(Record, frozen=True):
    title: str
    checks: tuple[Check, ...]


def examine(root: Path = Path("/"), device: str = DEVICE) -> list[Section]:
    """All checks of this host, whose /proc, /sys and /dev are below `root`. Changes nothing and needs no privileges."""
    found = {
        "Processor": processor(root),
        "KVM": kvm(root, device),
        "Guests": guests(),
        "Memory and limits": memory(root),
        "Besides": besides(root),
    }
    return [Section(title, tuple(checks)) for title, checks in found.items()]


def can_boot_linux(sections: list[Section]) -> bool:
    return all(check.level is not Level.FAIL for section in sections for check in section.checks)


def summary(sections: list[Section]) -> list[str]:
    """What will and will not work, in a few lines."""
    checks = {check.name: check for section in sections for check in section.checks}
    failed = [check for check in checks.values() if check.level is Level.FAIL]
    if not failed:
        lines = ["Linux boots here."]
        if checks["kernel"].level is Level.OK:
            lines.append("Try it: kvmpy boot")
        else:
            lines.append("There is no kernel that `kvmpy boot` could take by itself; give it one with --kernel.")
        return lines
    if [check.name for check in failed] == ["ring 0"]:
        return [
            "Linux does not boot here: this KVM lacks the processor's help (VT-x, AMD-V).",
            "Small guests that need no more than KVM's emulator work.",
            f"Way on: {failed[0].remedy}",
        ]
    return [f"No guest runs here: {failed[0].name}: {failed[0].found}.", f"Way on: {failed[0].remedy}"]


# Sections.


def processor(root: Path) -> Iterator[Check]:
    info = _read(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    flags = _flags(root)
    count = len(re.findall(r"^processor\s*:", info, re.MULTILINE))
    machine = os.uname().machine
    name = printable(model[1]) if model else machine
    if machine != "x86_64":
        yield Check("processor", Level.FAIL, f"{name}: kvmpy runs guests for x86-64 only", "use an x86-64 machine")
        return
    yield Check("processor", Level.OK, f"{name}, {count} CPUs")
    virtual = "hypervisor" in flags
    if virtual:
        yield Check("virtual", Level.NOTE, "this machine is itself a guest of a hypervisor; its guests are nested")
    if "vmx" in flags or "svm" in flags:
        yield Check("extensions", Level.OK, "Intel VT-x (vmx)" if "vmx" in flags else "AMD-V (svm)")
    else:
        yield Check("extensions", Level.WARN, "neither VT-x (vmx) nor AMD-V (svm)", _extension_remedy(virtual))


def _extension_remedy(virtual: bool) -> str:
    if virtual:
        return (
            "enable nested virtualisation for this machine: in the cloud, choose a type that has it; on a KVM host, "
            "load kvm_intel or kvm_amd with nested=1 and give the machine the CPU model host"
        )
    return "enable VT-x or AMD-V (SVM) in the firmware"


def kvm(root: Path, device: str) -> Iterator[Check]:
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if _exists(root / "sys/module" / name)]
    if modules:
        yield Check("module", Level.OK, ", ".join(modules))
    for module in modules:
        nested = _read(root / "sys/module" / module / "parameters/nested").strip()
        if nested:
            state = "on" if nested in ("1", "Y") else "off"
            yield Check(
                "nested guests", Level.NOTE, f"{state}: KVM {'works' if state == 'on' else 'is missing'} in guests"
            )
    try:
        handle = Kvm(device)
    except KvmError as error:
        yield Check("/dev/kvm", Level.FAIL, *_no_kvm(error, root, device))
        return
    try:
        yield Check("/dev/kvm", Level.OK, "can be opened, API version 12")
        yield from _capabilities(handle)
    finally:
        handle.close()


def _no_kvm(error: KvmError, root: Path, device: str) -> tuple[str, str]:
    """What is wrong with /dev/kvm, and the remedy."""
    if error.errno == errno.ENOENT:
        if _exists(root / ".dockerenv") or _exists(root / "run/.containerenv"):
            return "there is none", "start this container with --device /dev/kvm"
        flags = _flags(root)
        if "vmx" in flags or "svm" in flags:
            return "there is none", f"sudo modprobe {'kvm_intel' if 'vmx' in flags else 'kvm_amd'}"
        return "there is none", _extension_remedy("hypervisor" in flags)
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied", _permission_remedy(device)
    return error.what, error.remedy


def _permission_remedy(device: str) -> str:
    """The command that lets this user in: by group where the device has one for that, else by an ACL."""
    try:
        info = Path(device).stat()
    except OSError:
        return REMEDIES[errno.EACCES]
    if info.st_mode & stat.S_IRGRP and info.st_mode & stat.S_IWGRP and info.st_gid != 0:
        return f"sudo usermod -aG {_group(info.st_gid)} $USER, then log in again"
    return f"sudo setfacl -m u:$USER:rw {device}"


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _capabilities(handle: Kvm) -> Iterator[Check]:
    missing = [purpose for capability, purpose in REQUIRED.items() if not handle.check(capability)]
    if missing:
        yield Check("capabilities", Level.FAIL, f"this KVM lacks {', '.join(missing)}", "use Linux 5.4 or later")
    else:
        yield Check("capabilities", Level.OK, f"{', '.join(REQUIRED.values())}")
    try:
        native = runs_ring0_natively(handle)
    except KvmError as error:
        yield Check("ring 0", Level.FAIL, f"no guest can be run: {error.what}", error.remedy or "see the kernel's log")
    else:
        if native:
            yield Check("ring 0", Level.OK, "kernel code runs on the processor")
        else:
            lacking = CannotRunKernels()
            yield Check(
                "ring 0", Level.FAIL, "kernel code is emulated in software: no Linux survives that", lacking.remedy
            )
    recommended, limit = handle.check("KVM_CAP_NR_VCPUS"), handle.check("KVM_CAP_MAX_VCPUS")
    yield Check("vCPUs", Level.NOTE, f"up to {limit}, {recommended} recommended")
    yield Check("memory slots", Level.NOTE, str(handle.check("KVM_CAP_NR_MEMSLOTS")))
    for capability, (name, consequence) in OPTIONAL.items():
        if handle.check(capability):
            yield Check(name, Level.OK, YES)
        else:
            yield Check(name, Level.NOTE, f"{NO}: {consequence}")


def guests() -> Iterator[Check]:
    try:
        kernel = kernels.find_kernel()
        yield Check("kernel", Level.OK, f"{printable(str(kernel))} is what `kvmpy boot` takes")
    except NotFoundError as error:
        yield Check("kernel", Level.WARN, error.what, error.remedy)
    if initramfs.INIT.is_file():
        yield Check("init", Level.OK, "the built-in initramfs has its first process")
    else:
        yield Check("init", Level.WARN, "the built-in initramfs lacks its first process", "run `make -C guests init`")
    if initramfs.AGENT.is_file():
        yield Check("agent", Level.OK, "`kvmpy run` has what serves it in guests")
    else:
        yield Check("agent", Level.WARN, "`kvmpy run` lacks what serves it in guests", "run `make -C guests agent`")
    busybox = initramfs.find_busybox()
    if busybox:
        yield Check("busybox", Level.OK, f"{printable(str(busybox))} gives guests a shell")
    else:
        yield Check("busybox", Level.WARN, "no static one: guests have no shell", "sudo apt install busybox-static")


def memory(root: Path) -> Iterator[Check]:
    sizes = {
        name: int(kib) >> 10 for name, kib in re.findall(r"^(\w+):\s*(\d+) kB$", _read(root / "proc/meminfo"), re.M)
    }
    if "MemAvailable" in sizes:
        enough = sizes["MemAvailable"] >= DEFAULT_MEMORY
        yield Check(
            "memory",
            Level.OK if enough else Level.WARN,
            f"{sizes['MemAvailable']} MiB of {sizes.get('MemTotal', 0)} MiB are available",
            "" if enough else "give guests less with --mem",
        )
    if _read(root / "proc/sys/vm/overcommit_memory").strip() == "2":
        yield Check(
            "overcommit",
            Level.WARN,
            "off: a guest's memory counts in full from the start",
            "sudo sysctl vm.overcommit_memory=0",
        )
    pages = root / "sys/kernel/mm/transparent_hugepage"
    mode = _chosen(_read(pages / "enabled"))
    if mode == "never":
        yield Check(
            "huge pages",
            Level.NOTE,
            "not for guests' memory, which costs some speed",
            f"echo madvise | sudo tee {pages / 'enabled'}",
        )
    elif mode:
        yield Check("huge pages", Level.OK, f"transparent, also for guests' memory ({mode})")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < FEW_FILES
    yield Check(
        "open files",
        Level.WARN if few else Level.OK,
        f"limit {_limit(files)}",
        "ulimit -n 4096" if few else "",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = locked if locked == resource.RLIM_INFINITY else locked >> 10
    yield Check("locked memory", Level.NOTE, f"limit {_limit(locked)} KiB")


def besides(root: Path) -> Iterator[Check]:
    tun = root / "dev/net/tun"
    if not _exists(tun):
        yield Check("tap devices", Level.NOTE, "no /dev/net/tun", "sudo modprobe tun")
    elif not os.access(tun, os.R_OK | os.W_OK):
        yield Check("tap devices", Level.NOTE, "/dev/net/tun: permission denied")
    else:
        yield Check("tap devices", Level.OK, "/dev/net/tun can be opened")
    yield _tool("passt", "user-mode networking")
    if _exists(CHECKOUT_TOOL):
        yield _tool("qemu-system-x86_64", "scripts/linux-host")
    yield from sandbox(root)
    ring = _syscall(SYS_IO_URING_SETUP, 0, 0)  # 0 entries: refused, by EPERM or ENOSYS where there is none to be had
    yield Check("io_uring", Level.NOTE, NO if ring in (-errno.ENOSYS, -errno.EPERM) else YES)
    fault = _syscall(SYS_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fault >= 0:
        os.close(fault)
    yield Check("userfaultfd", Level.NOTE, YES if fault >= 0 else f"{NO} ({os.strerror(-fault)})")
    if sys.stdin.isatty() and sys.stdout.isatty():
        yield Check("terminal", Level.OK, f"{printable(os.environ.get('TERM', 'of unknown type'))}: Ctrl-a h helps")
    else:
        yield Check("terminal", Level.NOTE, "input or output is none: the console passes bytes as they are")


def sandbox(root: Path) -> Iterator[Check]:
    """What `kvmpy boot --sandbox` can use here."""
    landlock = _syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    yield Check("landlock", Level.NOTE, f"ABI {landlock}" if landlock > 0 else f"{NO} ({os.strerror(-landlock)})")
    actions = _read(root / "proc/sys/kernel/seccomp/actions_avail").strip()
    yield Check("seccomp", Level.NOTE, "filters" if actions else NO)
    why = why_no_namespaces()
    yield Check("namespaces", Level.NOTE, f"{NO} ({why})" if why else "of one's own, with an empty root")
    missing = [
        name for name, there in (("Landlock", landlock > 0), ("seccomp", actions), ("namespaces", not why)) if not there
    ]
    if not missing:
        yield Check("sandbox", Level.OK, "all that --sandbox strict wants")
    elif missing == ["namespaces"]:
        yield Check("sandbox", Level.OK, "complete but for --sandbox strict, which wants namespaces")
    else:
        remedy = "use a kernel with these; boot it with lsm=landlock,... if it only lacks that"
        yield Check("sandbox", Level.WARN, f"incomplete: no {', '.join(missing)}", remedy)


def _tool(name: str, purpose: str) -> Check:
    """Whether a program is there, with the first line it says of its version."""
    path = shutil.which(name)
    if path is None:
        return Check(name, Level.NOTE, f"not installed ({purpose})")
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, Level.NOTE, f"{path} does not run ({type(error).__name__})")
    lines = (done.stdout or done.stderr).decode(errors="replace").splitlines()
    return Check(name, Level.OK, f"{printable(lines[0]) if lines else path} ({purpose})")


# The host, read.


def _read(path: Path) -> str:
    """The text of a file of /proc or /sys; "" when there is none that may be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def _flags(root: Path) -> list[str]:
    match = re.search(r"^flags\s*: (.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].split() if match else []


def _chosen(text: str) -> str:
    """Of `always [madvise] never`, the word in brackets."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def _limit(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else str(value)


def _syscall(number: int, *arguments: int) -> int:
    """A system call's result, or -errno."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *(ctypes.c_long(argument) for argument in arguments))
    return result if result >= 0 else -ctypes.get_errno()
