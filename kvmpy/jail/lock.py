"""Locks this process in, step by step: each mechanism is one method that says in words what it has done."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

from .._kvm_ioctls import ffi, lib
from ..core.errors import HostError
from ..core.typed import TYPE_CHECKING
from .bpf import assemble
from .policy import filter_for

if TYPE_CHECKING:
    from pathlib import Path

LEVELS = ("strict", "default", "off")

# System calls that Python has no names for, with their constants (<linux/prctl.h>, landlock.h, seccomp.h, ...).
PRCTL, PIVOT_ROOT, MOUNT, UMOUNT2, UNSHARE, PRLIMIT64, SECCOMP = 157, 155, 165, 166, 272, 302, 317
CAPGET, CAPSET = 125, 126
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
RLIMIT_FSIZE, RLIMIT_CORE, RLIMIT_NOFILE = 1, 4, 7
CAPABILITY_VERSION_3 = 0x20080522
# CAP_CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID: what root needs to be root in a shared folder
FILE_CAPABILITIES = 0b11111
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
MNT_DETACH = 2
SECCOMP_SET_MODE_FILTER, SECCOMP_GET_ACTION_AVAIL = 1, 2
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 4
KILL_PROCESS = 0x80000000
LANDLOCK_CREATE_RULESET_VERSION = 1

# What a Landlock ABI adds to what can be forbidden: (first ABI, file system, network, scopes). All of it is.
LANDLOCK = ((1, 0x1FFF, 0, 0), (2, 0x2000, 0, 0), (3, 0x4000, 0, 0), (4, 0, 3, 0), (5, 0x8000, 0, 0), (6, 0, 0, 3))
LEAVING = 1000  # milliseconds
# What a device does in a folder that it shares: LANDLOCK_ACCESS_FS_READ_FILE and _READ_DIR; besides, all that changes
# something but making devices, sockets and FIFOs.
LANDLOCK_RULE_PATH_BENEATH = 1
READING, CHANGING = 0xC, 0x71BE
REFER = 2  # the first ABI that can allow a rename from one folder to another
OUTPUT = 16 << 30  # bytes that files may grow: consoles, captures, logs
SPARE_FILES = 1024  # descriptors that may be opened in addition: doorbells and vectors of drivers, clients of sockets

Enter = Callable[[str], None]  # called on a thread when it starts, with its role: see policy.ROLES


class Unavailable(Exception):
    """This host lacks a mechanism, or forbids it; the text says which and why."""


class Jail:
    """`lock` gives up what a machine that is complete does not need, `enter` what a thread does not.

    At level "strict", what cannot be had is an error, and what no rule allows ends the process; at "default" it is
    left out and told in `missing`, and a forbidden call fails with EPERM. `in_force` says what has been done.
    """

    def __init__(
        self,
        level: str,
        *,
        reaching: bool = False,
        folders: Sequence[tuple[Path, bool]] = (),
        pairs: bool = False,
        longest: int = 0,
    ) -> None:
        """`reaching`: devices open files or UNIX sockets while the guest runs, files only in `folders`, each with
        whether they change it. Then descriptors have no limit, root keeps what it may do to files, and level "strict"
        cannot be. `pairs`: the main thread and its like make pairs of sockets. `longest`: bytes of the longest disk.
        """
        self.level = level
        self.in_force: list[str] = []
        self.missing: list[str] = []
        self._reaching, self._folders, self._pairs, self._longest = reaching, folders, pairs, longest

    def lock(self, role: str = "process") -> None:
        """For the main thread, before it starts others.

        Raises HostError at level "strict"; nobody must go on then.
        """
        steps: list[Callable[[], str]] = [_no_new_privileges, self._limits]
        if self.level == "strict":
            steps.append(_empty_world)
        steps += [
            lambda: _few_capabilities(FILE_CAPABILITIES if self._reaching else 0),
            _not_dumpable,
            lambda: _landlock(self._folders),
            lambda: self._seccomp(role, everybody=True),
        ]
        for step in steps:
            try:
                self.in_force.append(step())
            except Unavailable as error:
                if self.level == "strict":
                    raise HostError(f"the sandbox is incomplete: {error}", "use --sandbox default") from None
                self.missing.append(str(error))

    def enter(self, role: str) -> None:
        """Narrow the calling thread to its role; what the whole process could not have, it does without, too."""
        try:
            self._seccomp(role)
        except Unavailable:
            if self.level == "strict":
                raise

    def _limits(self) -> str:
        limits = {RLIMIT_CORE: 0}
        if not self._reaching:
            files = list(map(int, os.listdir("/proc/self/fd")))
            limits[RLIMIT_NOFILE] = max(files, default=0) + SPARE_FILES
        if not any(changes for _, changes in self._folders):
            limits[RLIMIT_FSIZE] = max(self._longest, _longest_open()) + OUTPUT
        for resource, wanted in limits.items():
            _limit(resource, wanted)
        return "rlimits"

    def _seccomp(self, role: str, *, everybody: bool = False) -> str:
        code = _filter(role, self.level == "strict", self._reaching, self._pairs)
        buffer = ffi.from_buffer(code)
        header = bytearray(struct.pack("<H6xQ", len(code) // 8, _address(buffer)))  # struct sock_fprog
        flags = SECCOMP_FILTER_FLAG_SPEC_ALLOW | (SECCOMP_FILTER_FLAG_TSYNC if everybody else 0)
        _call("seccomp", SECCOMP, SECCOMP_SET_MODE_FILTER, flags, _address(ffi.from_buffer(header)))
        return "seccomp"


@cache
def _filter(role: str, kill: bool, reaching: bool, pairs: bool) -> bytes:
    return assemble(filter_for(role, kill=kill, reaching=reaching, pairs=pairs))


def _no_new_privileges() -> str:
    _call("no_new_privs", PRCTL, PR_SET_NO_NEW_PRIVS, 1)
    return "no_new_privs"


def _limit(resource: int, wanted: int) -> None:
    """Both limits, soft and hard; never more than the hard one was."""
    old = bytearray(16)
    _call("prlimit", PRLIMIT64, 0, resource, 0, _address(ffi.from_buffer(old)))
    value = min(wanted, struct.unpack_from("<Q", old, 8)[0])
    new = bytearray(struct.pack("<QQ", value, value))
    _call("prlimit", PRLIMIT64, 0, resource, _address(ffi.from_buffer(new)))


def _longest_open() -> int:
    """Bytes of the longest file that is open."""
    longest = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the folder itself
            longest = max(longest, os.fstat(int(name)).st_size)
    return longest


def _empty_world() -> str:
    """Namespaces of our own, with nothing in them; a step for a process of one thread."""
    for _ in range(LEAVING):  # what Python has joined may not have left the process yet
        if len(os.listdir("/proc/self/task")) == 1:
            break
        time.sleep(0.001)
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    _call("user namespaces", UNSHARE, flags)
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise Unavailable(f"user namespaces: {error.strerror}") from None
    root, tmpfs, options = (bytearray(text + b"\0") for text in (b"/", b"tmpfs", b"size=4k,nr_inodes=2,mode=555"))
    here, place = bytearray(b".\0"), bytearray(b"/proc\0")  # any folder can be covered
    at = {name: _address(ffi.from_buffer(text)) for name, text in (("/", root), (".", here), ("place", place))}
    kind, data = _address(ffi.from_buffer(tmpfs)), _address(ffi.from_buffer(options))
    _call("mount namespace", MOUNT, 0, at["/"], 0, MS_REC | MS_PRIVATE)
    _call("empty root", MOUNT, kind, at["place"], kind, MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, data)
    try:
        os.chdir("/proc")
    except OSError as error:
        raise Unavailable(f"empty root: {error.strerror}") from None
    _call("empty root", PIVOT_ROOT, at["."], at["."])
    _call("empty root", UMOUNT2, at["."], MNT_DETACH)
    os.chdir("/")
    return "namespaces with an empty root"


def _few_capabilities(kept: int) -> str:
    """All gone but those of `kept` (a mask) that there are."""
    header = bytearray(struct.pack("<Ii", CAPABILITY_VERSION_3, 0))
    data = bytearray(24)  # effective, permitted, inheritable, in two halves
    if kept:
        _call("capget", CAPGET, _address(ffi.from_buffer(header)), _address(ffi.from_buffer(data)))
        effective, permitted = struct.unpack_from("<II", data)
        data[:] = struct.pack("<6I", effective & kept, permitted & kept, 0, 0, 0, 0)
    _call("capset", CAPSET, _address(ffi.from_buffer(header)), _address(ffi.from_buffer(data)))
    return "capabilities for files only" if kept else "no capabilities"


def _not_dumpable() -> str:
    _call("dumpable", PRCTL, PR_SET_DUMPABLE, 0)
    return "not dumpable"


def _landlock(folders: Sequence[tuple[Path, bool]]) -> str:
    """No files but below `folders`, no TCP ports, abstract sockets, signals; for this thread and those it starts."""
    abi = landlock_abi()
    if not abi:
        raise Unavailable("Landlock is not in this kernel, or not enabled (lsm=landlock,...)")
    if abi < REFER and any(changes for _, changes in folders):
        raise Unavailable("Landlock of this kernel would keep guests from renaming files")
    fields = zip(*((fs, net, scope) for first, fs, net, scope in LANDLOCK if abi >= first), strict=True)
    handled, network, scopes = map(sum, fields)
    attributes = bytearray(struct.pack("<QQQ", handled, network, scopes))
    length = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _call("Landlock", LANDLOCK_CREATE_RULESET, _address(ffi.from_buffer(attributes)), length)
    try:
        for path, changes in folders:
            _allow(ruleset, path, (CHANGING if changes else READING) & handled)
        _call("Landlock", LANDLOCK_RESTRICT_SELF, ruleset)
    finally:
        os.close(ruleset)
    return f"Landlock ABI {abi}"


def _allow(ruleset: int, folder: Path, access: int) -> None:
    try:
        fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"Landlock: {folder}: {error.strerror}") from None
    try:
        rule = bytearray(struct.pack("<Qi", access, fd))  # struct landlock_path_beneath_attr
        address = _address(ffi.from_buffer(rule))
        _call("Landlock", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, address)
    finally:
        os.close(fd)


# What is there; for `kvmpy doctor`.


def landlock_abi() -> int:
    """Which version of Landlock the kernel has; 0: none."""
    return max(0, int(lib.kvmpy_syscall(LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION, 0, 0)))


def has_seccomp() -> bool:
    """Whether the kernel has filters that can end a process."""
    action = bytearray(struct.pack("<I", KILL_PROCESS))
    address = _address(ffi.from_buffer(action))
    return int(lib.kvmpy_syscall(SECCOMP, SECCOMP_GET_ACTION_AVAIL, 0, address, 0, 0)) == 0


def why_no_namespaces() -> str:
    """What keeps this process from having namespaces of its own, "" if nothing does; tried in a child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        words = "it failed"
        try:
            _empty_world()
            words = ""
        except Unavailable as error:
            words = str(error)
        finally:
            os.write(writing, words.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def _call(what: str, number: int, *arguments: int) -> int:
    """A system call; raises Unavailable."""
    a, b, c, d, e = (*arguments, *[0] * (5 - len(arguments)))
    result = int(lib.kvmpy_syscall(number, a, b, c, d, e))
    if result < 0:
        raise Unavailable(f"{what}: {os.strerror(-result)}")
    if result > 0 and number == SECCOMP:  # TSYNC: a thread that has a filter of its own
        raise Unavailable(f"{what}: {os.strerror(errno.ESRCH)}")
    return result


def _address(buffer: object) -> int:
    return int(ffi.cast("uintptr_t", buffer))
