"""The seccomp filters, run by an interpreter of classic BPF."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from kvmpy.jail.bpf import ALLOW, ERRNO, KILL, X32, X86_64, Instruction, OneOf, With, Without, assemble, program
from kvmpy.jail.policy import FRUITLESS, IOCTLS, ROLE_IOCTLS, ROLES, SYSCALLS, filter_for

I386 = 0x40000003  # AUDIT_ARCH_I386
DENY = ERRNO | errno.EPERM
KVM_RUN = IOCTLS["KVM_RUN"]
SOCKET = FRUITLESS["socket"]
CONDITIONAL = {"ioctl", "mmap", "mprotect", "tgkill", "clone", "clone3", "newfstatat"}
ANY = [0xDEAD_0000_BEEF] * 6

# What would let a guest out that has taken over a thread, by number.
FORBIDDEN = {
    "fork": 57, "vfork": 58, "execve": 59, "link": 86, "symlink": 88, "chmod": 90, "chown": 92, "ptrace": 101,
    "setuid": 105, "setgid": 106, "capset": 126, "personality": 135, "pivot_root": 155, "chroot": 161, "mount": 165,
    "init_module": 175, "creat": 85, "rename": 82, "mkdir": 83, "truncate": 76, "connect": 42, "bind": 49, "listen": 50,
    "setns": 308, "unshare": 272, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "bpf": 321,
    "execveat": 322, "userfaultfd": 323, "memfd_create": 319, "perf_event_open": 298, "open_by_handle_at": 304,
    "io_uring_setup": 425, "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "openat2": 437,
    "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "setrlimit": 160, "keyctl": 250, "add_key": 248,
    "pkey_mprotect": 329, "remap_file_pages": 216, "shmat": 30, "modify_ldt": 154, "arch_prctl": 158, "socketpair": 53,
}  # fmt: skip


def verdict(code: list[Instruction], number: int, arguments: list[int], architecture: int = X86_64) -> int:
    """What a filter says to a system call, by the rules of Documentation/networking/filter.rst."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *padded)
    accumulator = at = 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x06:
            return operand
        else:
            true = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }[operation]
            at += if_true if true else if_false


@pytest.mark.parametrize("role", ROLES)
def test_plain_calls_of_a_role_are_allowed_with_any_arguments(role: str) -> None:
    code = filter_for(role, kill=True)

    verdicts = {name: verdict(code, SYSCALLS[name], ANY) for name in set(ROLES[role].split()) - CONDITIONAL}

    assert set(verdicts.values()) == {ALLOW}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("kill", "outcome"), [(True, KILL), (False, DENY)])
def test_dangerous_calls_are_forbidden_to_all(role: str, kill: bool, outcome: int) -> None:
    code = filter_for(role, kill=kill)

    verdicts = {name: verdict(code, number, [0] * 6) for name, number in FORBIDDEN.items()}

    assert verdicts == dict.fromkeys(FORBIDDEN, outcome)


@pytest.mark.parametrize("role", ROLES)
def test_every_number_that_no_rule_names_is_forbidden(role: str) -> None:
    code = filter_for(role, kill=True)
    named = {SYSCALLS[name] for name in ROLES[role].split()} | set(FRUITLESS.values()) | {SYSCALLS["clone3"]}

    verdicts = {verdict(code, number, [0] * 6) for number in set(range(1024)) - named}

    assert verdicts == {KILL}


@pytest.mark.parametrize("role", ROLES)
def test_calls_that_are_asked_as_a_matter_of_course_fail_and_no_more(role: str) -> None:
    code = filter_for(role, kill=True)

    assert {verdict(code, number, ANY) for number in FRUITLESS.values()} == {ERRNO | errno.EACCES}
    assert verdict(code, SYSCALLS["clone3"], ANY) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("role", ROLES)
def test_other_architectures_and_x32_end_the_process(role: str) -> None:
    code = filter_for(role, kill=False)

    assert verdict(code, SYSCALLS["read"], [], I386) == KILL
    assert verdict(code, SYSCALLS["read"] | X32, []) == KILL
    assert verdict(code, -1, []) == KILL


@pytest.mark.parametrize("role", ROLES)
def test_ioctls_of_a_role_and_no_others(role: str) -> None:
    code = filter_for(role, kill=True)
    numbers = [*IOCTLS.values(), 0, 0x5412, 0x894B, 0x1268, 0xAE81, 0xAEC0]  # TIOCSTI, SIOCGIFNAME..., KVM's unknown

    allowed = {number for number in numbers if verdict(code, SYSCALLS["ioctl"], [3, number, 0]) == ALLOW}

    assert allowed == {IOCTLS[name] for name in ROLE_IOCTLS[role]}


def test_the_kernel_sees_only_the_low_half_of_an_ioctls_number() -> None:
    code = filter_for("vcpu", kill=True)

    assert verdict(code, SYSCALLS["ioctl"], [3, KVM_RUN | 1 << 32, 0]) == ALLOW


@pytest.mark.parametrize("name", ["mmap", "mprotect"])
def test_memory_never_becomes_executable(name: str) -> None:
    code = filter_for("process", kill=True)

    assert verdict(code, SYSCALLS[name], [0, 4096, 3]) == ALLOW
    assert verdict(code, SYSCALLS[name], [0, 4096, 7]) == DENY
    assert verdict(code, SYSCALLS[name], [0, 4096, 4 | 1 << 32]) == DENY


def test_signals_go_to_this_process_only() -> None:
    code = filter_for("vcpu", kill=True)

    assert verdict(code, SYSCALLS["tgkill"], [os.getpid(), 1, 9]) == ALLOW
    assert verdict(code, SYSCALLS["tgkill"], [1, 1, 9]) == DENY


def test_descriptors_can_be_examined_but_not_paths() -> None:
    code = filter_for("loop", kill=True)

    assert verdict(code, SYSCALLS["newfstatat"], [5, 0, 0, 0x1000]) == ALLOW  # AT_EMPTY_PATH
    assert verdict(code, SYSCALLS["newfstatat"], [0xFFFFFF9C, 0, 0, 0]) == ERRNO | errno.EACCES


def test_clone_makes_threads_only_and_only_for_the_main_thread() -> None:
    process, vcpu = filter_for("process", kill=True), filter_for("vcpu", kill=True)

    assert verdict(process, SYSCALLS["clone"], [0x3D0F00]) == ALLOW
    assert verdict(process, SYSCALLS["clone"], [17]) == DENY
    assert verdict(vcpu, SYSCALLS["clone"], [0x3D0F00]) == KILL


@pytest.mark.parametrize(("role", "outcome"), [("process", ALLOW), ("loop", ALLOW), ("vcpu", ERRNO | errno.EACCES)])
def test_devices_that_reach_out_may_open_files_but_vcpus_may_not(role: str, outcome: int) -> None:
    code = filter_for(role, kill=False, reaching=True)

    assert verdict(code, 257, [0xFFFFFF9C]) == outcome  # openat
    assert verdict(code, 59, []) == DENY  # execve


def test_devices_that_reach_out_have_sockets_of_the_host_only() -> None:
    code = filter_for("loop", kill=False, reaching=True)

    assert [verdict(code, SOCKET, [family, 1]) for family in (1, 2, 10, 16, 17, 40)] == [ALLOW, *[DENY] * 5]


@pytest.mark.parametrize(("role", "outcome"), [("process", ALLOW), ("loop", DENY), ("vcpu", DENY)])
def test_pairs_of_sockets_are_for_those_that_speak_to_the_guest(role: str, outcome: int) -> None:
    assert verdict(filter_for(role, kill=False, pairs=True), SYSCALLS["socketpair"], [1, 1]) == outcome
    assert verdict(filter_for(role, kill=False), SYSCALLS["socketpair"], [1, 1]) == DENY


def test_the_call_of_an_exit_is_decided_first() -> None:
    code = filter_for("vcpu", kill=True)

    allow = 8 + len(ROLE_IOCTLS["vcpu"]) + 1
    assert code[6] == (0x15, 0, allow - 6, SYSCALLS["ioctl"])
    assert code[8] == (0x15, allow - 9, 0, KVM_RUN)
    assert code[allow] == (0x06, 0, 0, ALLOW)


def test_more_calls_than_a_jump_passes_over() -> None:
    with pytest.raises(ValueError, match="too many"):
        program({}, range(254), {}, KILL)

    assert verdict(program({}, range(253), {}, KILL), 0, []) == ALLOW


def test_conditions() -> None:
    code = program({1: (OneOf(0, (5, 6)), 11), 2: (Without(1, 4), 12), 3: (With(2, 4), 13)}, [4], {5: 14}, 15)

    assert [verdict(code, 1, [value]) for value in (5, 6, 7, 5 << 32)] == [ALLOW, ALLOW, 11, 11]
    assert [verdict(code, 2, [0, value]) for value in (3, 4)] == [ALLOW, 12]
    assert [verdict(code, 3, [0, 0, value]) for value in (3, 4)] == [13, ALLOW]
    assert [verdict(code, number, []) for number in (4, 5, 6)] == [ALLOW, 14, 15]


@pytest.mark.parametrize("role", ROLES)
def test_filters_fit_the_kernel(role: str) -> None:
    code = filter_for(role, kill=True)

    assert len(assemble(code)) == 8 * len(code) <= 8 * 4096  # BPF_MAXINSNS
    assert all(0 <= jump < 256 for step in code for jump in step[1:3])
    assert max(at + 1 + max(step[1:3]) for at, step in enumerate(code[:-1])) < len(code)
