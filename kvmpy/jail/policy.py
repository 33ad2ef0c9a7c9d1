"""What each thread of a locked-in kvmpy may still ask of the kernel.

Found with CPython 3.11 and glibc, by tracing the tests of devices and endings; the reasons are beside what surprises.
Numbers are those of arch/x86/entry/syscalls/syscall_64.tbl, <linux/kvm.h>, <asm-generic/ioctls.h>, <linux/if_tun.h>.
"""

from __future__ import annotations

import errno
import os

from .bpf import ERRNO, KILL, Condition, Instruction, OneOf, With, Without, program

PROT_EXEC = 4
CLONE_THREAD = 0x10000
AT_EMPTY_PATH = 0x1000
AF_UNIX = 1

SYSCALLS = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18,
    "readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35,
    "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51,
    "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "exit": 60, "wait4": 61,
    "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getpgrp": 111, "sigaltstack": 131, "gettid": 186, "futex": 202,
    "sched_getaffinity": 204, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234,
    "waitid": 247, "newfstatat": 262, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281,
    "fallocate": 285, "accept4": 288, "eventfd2": 290, "dup3": 292,
    "pipe2": 293, "preadv": 295, "pwritev": 296, "prlimit64": 302, "seccomp": 317, "getrandom": 318, "membarrier": 324,
    "preadv2": 327, "pwritev2": 328,
    "rseq": 334, "gettimeofday": 96, "time": 201, "getcpu": 309, "clone3": 435, "epoll_pwait2": 441,
}  # fmt: skip

IOCTLS = {
    "KVM_RUN": 0xAE80, "KVM_IRQ_LINE": 0x4008AE61, "KVM_SET_GSI_ROUTING": 0x4008AE6A, "KVM_IRQFD": 0x4020AE76,
    "KVM_IOEVENTFD": 0x4040AE79, "KVM_SIGNAL_MSI": 0x4020AEA5, "TUNSETOFFLOAD": 0x400454D0,
    "KVM_GET_REGS": 0x8090AE81, "KVM_SET_REGS": 0x4090AE82, "KVM_GET_SREGS": 0x8138AE83, "KVM_SET_SREGS": 0x4138AE84,
    "KVM_GET_FPU": 0x81A0AE8C, "KVM_SET_FPU": 0x41A0AE8D, "KVM_GET_XSAVE": 0x9000AEA4, "KVM_GET_XSAVE2": 0x9000AECF,
    "KVM_SET_XSAVE": 0x5000AEA5, "KVM_GET_XCRS": 0x8188AEA6, "KVM_SET_XCRS": 0x4188AEA7, "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89, "KVM_GET_LAPIC": 0x8400AE8E, "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F, "KVM_SET_VCPU_EVENTS": 0x4040AEA0, "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2, "KVM_GET_MP_STATE": 0x8004AE98, "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_TRANSLATE": 0xC018AE85, "KVM_GET_CLOCK": 0x8030AE7C, "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_KVMCLOCK_CTRL": 0xAEAD, "KVM_GET_IRQCHIP": 0xC208AE62, "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_GET_PIT2": 0x8070AE9F, "KVM_SET_PIT2": 0x4070AEA0, "KVM_GET_DIRTY_LOG": 0x4010AE42, "KVM_NMI": 0xAE9A,
    "KVM_GET_TSC_KHZ": 0xAEA3, "KVM_GET_CPUID2": 0xC008AE91,
    "TCGETS2": 0x802C542A, "TCSETS2": 0x402C542B, "TCGETS": 0x5401, "TCSETS": 0x5402,
    "TIOCGPGRP": 0x540F, "TIOCGWINSZ": 0x5413, "FIONBIO": 0x5421, "FIOCLEX": 0x5451,
    "KVM_GET_API_VERSION": 0xAE00, "KVM_CREATE_VM": 0xAE01, "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04, "KVM_CREATE_VCPU": 0xAE41, "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
}  # fmt: skip

MEMORY = "brk madvise mmap mprotect mremap munmap"  # mmap and mprotect have conditions
# C libraries do not expect that these can fail, and take what they get for an answer.
WHO = "getegid geteuid getgid getpgrp getpid gettid getuid"
# Threads end by themselves, or the process when a fault says so.
THREAD = "exit exit_group futex rt_sigaction rt_sigprocmask rt_sigreturn sched_yield sigaltstack restart_syscall"
CLOCKS = "clock_gettime getcpu gettimeofday time"  # where the host's clock cannot be read without a system call
DOORBELLS = "close epoll_ctl eventfd2 read write"  # a driver that sets up a PCI device makes and ends them

# What a vCPU's thread does besides KVM_RUN: the registers of devices, and log lines.
VCPU = f"{THREAD} {WHO} {CLOCKS} {MEMORY} {DOORBELLS} clock_nanosleep ioctl nanosleep tgkill"

# An event loop does the work of devices and the console: it moves bytes between descriptors that are open.
LOOP = f"""
    {VCPU} accept4 dup epoll_pwait epoll_pwait2 epoll_wait fadvise64 fallocate fcntl fdatasync flock
    fstat fsync ftruncate getpeername getrandom getsockname getsockopt lseek newfstatat poll pread64 preadv
    preadv2 pwrite64 pwritev pwritev2 readv recvfrom recvmsg sendmsg sendto setsockopt shutdown wait4 writev
"""

# The whole process: the main thread starts the others, waits, takes signals, and takes the machine apart.
PROCESS = f"""
    {LOOP} clock_getres clone clone3 dup2 dup3 membarrier pipe2 ppoll
    pselect6 rseq sched_getaffinity seccomp set_robust_list waitid
"""

ROLES = {"process": PROCESS, "loop": LOOP, "vcpu": VCPU, "reporter": PROCESS}

AT_WORK = (
    "KVM_RUN",
    "KVM_IRQ_LINE",
    "KVM_SET_GSI_ROUTING",
    "KVM_IRQFD",
    "KVM_IOEVENTFD",
    "KVM_SIGNAL_MSI",
    "TUNSETOFFLOAD",
)
BUILDING = (
    "KVM_GET_API_VERSION", "KVM_CREATE_VM", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE", "KVM_CREATE_VCPU",
    "KVM_SET_USER_MEMORY_REGION",
)  # fmt: skip
STREAMS = ("TCGETS", "TCSETS", "TCGETS2", "TCSETS2", "TIOCGPGRP", "TIOCGWINSZ", "FIONBIO", "FIOCLEX")
ROLE_IOCTLS = {
    "vcpu": (*AT_WORK, "TCGETS"),
    "loop": (*AT_WORK, *STREAMS),
    "process": tuple(name for name in IOCTLS if name not in BUILDING),
    "reporter": tuple(IOCTLS),  # it may have to try whether this KVM runs kernel code
}

# Asked by Python, glibc and their like as a matter of course, and harmless when refused: files that are
# not to be found, /proc/sys/vm/overcommit_memory when a heap shrinks, the name of a thread. No reason to end a machine.
FRUITLESS = {
    "open": 2, "stat": 4, "lstat": 6, "access": 21, "socket": 41, "kill": 62, "getcwd": 79, "unlink": 87,
    "readlink": 89, "prctl": 157, "getdents64": 217, "openat": 257, "unlinkat": 263,
    "readlinkat": 267, "faccessat": 269, "prlimit64": 302, "statx": 332, "faccessat2": 439,
}  # fmt: skip


# What devices need that open files or sockets on behalf of their guests: shared folders, and streams that it dials.
REACHING = {
    "open": 2, "stat": 4, "lstat": 6, "access": 21, "socket": 41, "connect": 42, "truncate": 76, "getcwd": 79,
    "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90,
    "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "umask": 95, "statfs": 137, "fstatfs": 138, "setxattr": 188,
    "lsetxattr": 189, "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194,
    "llistxattr": 195, "flistxattr": 196, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    "getdents64": 217, "openat": 257, "mkdirat": 258, "fchownat": 260, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269,
    "sync_file_range": 277, "utimensat": 280, "syncfs": 306, "renameat2": 316, "copy_file_range": 326, "statx": 332,
    "faccessat2": 439, "fchmodat2": 452,
}  # fmt: skip


def filter_for(role: str, *, kill: bool, reaching: bool = False, pairs: bool = False) -> list[Instruction]:
    """The seccomp filter of a role. What nothing here needs is refused with EPERM, or with `kill` ends the process.

    With `reaching`, all but vCPUs may open files and UNIX sockets; with `pairs`, the main thread and those that it
    starts for itself may make pairs of sockets, by which a program speaks to the guest's.
    """
    more = set(REACHING.values()) if reaching and role != "vcpu" else set()
    refuse = ERRNO | errno.EPERM
    names = ROLES[role].split() + (["socketpair"] if pairs and role == "process" else [])
    conditions: dict[str, tuple[Condition, int]] = {
        "ioctl": (OneOf(1, tuple(IOCTLS[name] for name in ROLE_IOCTLS[role])), refuse),
        "mmap": (Without(2, PROT_EXEC), refuse),
        "mprotect": (Without(2, PROT_EXEC), refuse),
        "tgkill": (OneOf(0, (os.getpid(),)), refuse),
        "clone": (With(0, CLONE_THREAD), refuse),
        "newfstatat": (With(3, AT_EMPTY_PATH), ERRNO | errno.EACCES),  # how glibc does fstat
    }
    conditional = {SYSCALLS[name]: check for name, check in conditions.items() if name in names}
    conditional = {number: check for number, check in conditional.items() if number not in more}
    if REACHING["socket"] in more:
        more.remove(REACHING["socket"])
        conditional[REACHING["socket"]] = (OneOf(0, (AF_UNIX,)), refuse)
    plain = sorted({SYSCALLS[name] for name in names if name not in conditions and name != "clone3"} | more)
    refused = dict.fromkeys(set(FRUITLESS.values()) - more - set(conditional), ERRNO | errno.EACCES)
    refused[SYSCALLS["clone3"]] = ERRNO | errno.ENOSYS  # its flags are in memory; glibc then takes clone
    return program(conditional, plain, refused, KILL if kill else refuse)
