"""Says what usually lies behind a boot that failed, with the remedy."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable

from .core.board import Reason
from .core.errors import CannotRunKernels
from .core.record import Record
from .evidence import Activity, Evidence
from .kvm import exits

MAX_HINTS = 3
LAST_WORDS = 400  # bytes of output that tell what the guest did last
POLLING = 8  # equal reads, among the last exits of a CPU, that are called polling
LINUX = ("pvh", "linux64", "decompressor")
BUILT_IN = "leave --initrd out to use the built-in initramfs"


class Hint(Record, frozen=True):
    """A likely cause, and what to do about it."""

    cause: str
    remedy: str = ""


class Trap(Record, frozen=True):
    """What a kernel prints (a regular expression), what that means, and the remedy.

    Both texts may name groups of the expression and `memory`, the guest's in MiB. Every repetition in an expression
    has an upper bound: a guest chooses what it is matched against.
    """

    printed: str
    cause: str
    remedy: str


MORE_MEMORY = "give it more than {memory} MiB with --mem"

# Of several that match, those that come first are shown: causes before what follows from them.
TRAPS = (
    Trap(
        r"This kernel requires (?:an x86-64 CPU|the following features)",
        "this host's processor lacks what the kernel was built for",
        "use a kernel for plain x86-64, or a newer host",
    ),
    Trap(
        r"[Ii]nitramfs[^\n]{0,80}compression method (?P<method>\w{1,20}) not configured",
        "the kernel cannot decompress the initrd: it was built without {method}",
        "compress the initrd otherwise, or not at all (`kvmpy initrd --compress none`)",
    ),
    Trap(
        r"Initramfs unpacking failed: write error",
        "the unpacked initrd does not fit into the guest's memory",
        MORE_MEMORY,
    ),
    Trap(
        r"(?:Initramfs unpacking failed|rootfs image is not initramfs)[: (]{0,3}(?P<why>[^\n)]{0,80})",
        "the initrd could not be unpacked ({why}): it is damaged, cut off, or no cpio archive",
        "check the file (`file`, `lsinitramfs`); " + BUILT_IN,
    ),
    Trap(
        r"initrd extends beyond end of memory",
        "the initrd does not fit into the guest's memory",
        MORE_MEMORY,
    ),
    Trap(
        r"Out of memory|System is deadlocked on memory",
        "the guest ran out of memory",
        MORE_MEMORY,
    ),
    Trap(
        r"Gave up waiting for root|(?:ALERT!|Warning:) [^\n]{1,100} does not exist|dracut-initqueue timeout",
        "the initrd waited for a root device that this machine does not have",
        "give an initrd that holds the whole system; " + BUILT_IN,
    ),
    Trap(
        r"VFS: Unable to mount root fs|VFS: Cannot open root device",
        "the kernel found nothing to start: no initrd with an /init (or what rdinit= names), no root device it knows",
        "`kvmpy initrd` makes an initrd that has one; for root= the driver must be built in, or in the initrd",
    ),
    Trap(
        r"(?:Failed to execute|Requested init|Starting init:) (?P<init>\S{1,80})[^\n]{0,80}?error -(?P<error>\d{1,4})",
        "the kernel could not execute {init}: {meaning}",
        "check that it is in the initrd with all it needs, executable, and for x86-64",
    ),
    Trap(
        r"No working init found|No init found",
        "the kernel found no program to start",
        "put one into the initrd as /init, or name it with --append rdinit=/path",
    ),
    Trap(
        r"Attempted to kill init! exitcode=0x(?P<exitcode>[0-9a-f]{8})",
        "the guest's first process ended: {meaning}",
        "look at its last output; --append rdinit=/bin/sh starts a shell in its place, where the initrd has one",
    ),
    Trap(
        r"IO-APIC \+ timer doesn't work",
        "the kernel's test of the timer interrupt failed, as it does on slow or busy hosts",
        "skip the test with --append no_timer_check",
    ),
    Trap(
        r"PANIC: early exception (?:0x)?(?P<vector>[0-9a-f]{1,2})",
        "the kernel met {meaning} before it could handle any",
        "--append earlyprintk=ttyS0 shows more; a damaged image or another --boot protocol can be the reason",
    ),
    Trap(
        r"-- System halted",
        "the kernel's decompressor gave up: the image is damaged, or does not fit into memory",
        "get the kernel again, or " + MORE_MEMORY,
    ),
    Trap(
        r"BUG: soft lockup|rcu: INFO: \w{1,20} (?:self-)?detected",
        "the guest's CPUs stood still for seconds: the host is overloaded, or emulates its processor",
        "use fewer --cpus, or a host with less to do",
    ),
)

PROMPTS = (
    (r"\(initramfs\) ?$", "a shell of the initrd, which did not find its root device"),
    (r"login: ?$", "a login: the boot itself has succeeded"),
    (r"(?i)password[^:\n]{0,80}: ?$", "a password"),
    (r"(?i)press (?:enter|return|any key)", "a key"),
    (r"[$#] ?$", "a command in its shell: the boot itself has succeeded"),
)

EXCEPTIONS = {  # Intel SDM vol. 3A, 6.3.1
    0: "a division error (#DE)",
    3: "a breakpoint (#BP)",
    6: "an instruction that the processor does not have (#UD)",
    8: "a double fault (#DF)",
    12: "a stack fault (#SS)",
    13: "a general protection fault (#GP)",
    14: "a page fault (#PF)",
}

HARDWARE = (  # where PCs have what guests look for; only ports that no machine of ours can have by default
    (range(0x170, 0x178), "an IDE disk controller"),
    (range(0x1F0, 0x1F8), "an IDE disk controller"),
    (range(0x278, 0x280), "a parallel port"),
    (range(0x2E8, 0x2F0), "COM4"),
    (range(0x2F8, 0x300), "COM2"),
    (range(0x378, 0x380), "a parallel port"),
    (range(0x3B0, 0x3E0), "a VGA card"),
    (range(0x3E8, 0x3F0), "COM3"),
    (range(0x3F0, 0x3F8), "a floppy or IDE disk controller"),
    (range(0x510, 0x518), "QEMU's fw_cfg"),
    (range(0xCF8, 0xD00), "PCI"),
    (range(0x5658, 0x565A), "VMware's backdoor"),
)

# Intel SDM vol. 3C, appendix C (bit 31: failed VM entry) and "VM Instruction Error Numbers"; AMD APM vol. 2, appendix C
# (VMEXIT_INVALID).
ENTRY_FAILURES = {
    0x80000021: "the guest's state is not one that VT-x can run",
    0x80000022: "an MSR cannot be loaded",
    0x80000029: "a machine check came",
    7: "KVM set up the VMCS with invalid controls",
    8: "KVM set up the VMCS with an invalid host state",
    0xFFFFFFFF: "the guest's state is not one that AMD-V can run",
    0xFFFFFFFFFFFFFFFF: "the guest's state is not one that AMD-V can run",
}


def hints(evidence: Evidence) -> list[Hint]:
    """What the evidence points to, most telling first; often nothing."""
    rules = RULES + (AT_TIMEOUT if evidence.stop.reason is Reason.TIMEOUT else ())
    found = [hint for rule in rules if (hint := rule(evidence)) is not None] + _printed(evidence)
    if evidence.native is False:
        return found[:1]  # the rest follows from it
    if not found and evidence.stop.reason is Reason.TIMEOUT:
        found.append(Hint("the guest was still at work when its time was up", "give it more with --timeout"))
    return found[:MAX_HINTS]


def _printed(evidence: Evidence) -> list[Hint]:
    """Of each trap that the console shows, its last occurrence."""
    found = []
    for trap in TRAPS:
        matches = list(re.finditer(trap.printed, evidence.console))
        if matches:
            words = {name: value for name, value in matches[-1].groupdict().items() if value is not None}
            texts = words | {"memory": str(evidence.memory >> 20), "meaning": _meaning(words)}
            found.append(Hint(trap.cause.format(**texts), trap.remedy.format(**texts)))
    return found


def _meaning(words: dict[str, str]) -> str:
    """Numbers that a kernel printed, in words."""
    if "exitcode" in words:
        return wait_status(int(words["exitcode"], 16))
    if "vector" in words:
        vector = int(words["vector"], 16)
        return EXCEPTIONS.get(vector, f"exception {vector}")
    if "error" in words:
        return init_error(int(words["error"]))
    return ""


def wait_status(code: int) -> str:
    """An exit code as the kernel gives it for init: like the status of wait(2)."""
    number = code & 0x7F
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "unknown"
        why = " (it uses instructions that this processor lacks)" if number == signal.SIGILL else ""
        return f"killed by signal {number}, {name}{why}"
    status = code >> 8 & 0xFF
    why = {126: " (a command that cannot be executed)", 127: " (a command that was not found)"}.get(status, "")
    return f"exit status {status}{why}"


def init_error(number: int) -> str:
    """What an errno means when it comes from executing a program."""
    meanings = {
        errno.ENOENT: "there is no such file, or its interpreter (after #!, or ld.so) is missing",
        errno.ENOEXEC: "it is no program for this kernel",
        errno.EACCES: "it is not executable",
        errno.ENOMEM: "there is not enough memory",
    }
    return meanings.get(number, os.strerror(number))


# Rules that look at more than the console.


def _emulation(evidence: Evidence) -> Hint | None:
    cpu = evidence.culprit
    if cpu.suberror != exits.EMULATION:
        if cpu.suberror:
            return Hint(
                "an exception or interrupt could not be delivered: the IDT, the TSS or the stack is not in RAM",
                "a kernel that was loaded wrongly or has overwritten itself does that; try another --boot protocol",
            )
        return None
    if not cpu.code:
        return Hint("the guest jumped to where there is no code", "try another --boot protocol, or get the image again")
    instruction = cpu.code[0].text
    if evidence.native is False:
        error = CannotRunKernels()
        return Hint(f"{error.what}; what it lacks here is `{instruction}`", error.remedy)
    return Hint(
        f"KVM cannot carry out `{instruction}` where it touches a device, or no memory at all",
        "see where its operands point: RAM may end before, or a device's driver use it in an unusual way",
    )


def _entry_failure(evidence: Evidence) -> Hint | None:
    number = evidence.culprit.entry_failure
    if number is None:
        return None
    meaning = ENTRY_FAILURES.get(number, f"reason {number:#x}")
    return Hint(
        f"the processor refused to run the guest: {meaning}",
        "processors before 2010 cannot run real mode; elsewhere it is a bug: report it with all of this",
    )


def _empty(evidence: Evidence) -> Hint | None:
    code = evidence.culprit.code
    if code and not any(b"".join(instruction.data for instruction in code)):
        return Hint(
            "the guest executes memory that holds nothing but zeros",
            "it jumped or returned to a wrong address, or its image belongs elsewhere",
        )
    return None


def _triple_fault(evidence: Evidence) -> Hint | None:
    if evidence.stop.reason is not Reason.TRIPLE_FAULT:
        return None
    if evidence.protocol not in LINUX:
        return Hint("an exception had no handler, nor had the double fault", "set up an IDT that has them")
    if "Linux version" not in evidence.console:
        others = [protocol for protocol in LINUX if protocol != evidence.protocol]
        return Hint(
            f"the kernel died before it could print: it is damaged, or cannot be started by {evidence.protocol}",
            f"`kvmpy inspect KERNEL` tells what it is; try --boot {' or '.join(others)}",
        )
    if re.search(r"reboot: Restarting system|Rebooting", evidence.console[-LAST_WORDS:]):
        return Hint("the guest reset itself by a triple fault", "--append reboot=k makes that a reset like any other")
    return None


def _silent(evidence: Evidence) -> Hint | None:
    if evidence.protocol not in LINUX or evidence.console.strip():
        return None
    words = evidence.cmdline.split()
    if evidence.protocol == "decompressor" and evidence.culprit.activity is Activity.HALTED:
        return Hint(
            "the kernel's decompressor gave up, silently: the image is damaged, or does not fit into memory",
            "get the kernel again, or give the guest more with --mem; --append earlyprintk=ttyS0 shows what it says",
        )
    if not any(word.startswith("console=ttyS0") for word in words):
        return Hint("nothing was printed: the command line names no serial console", "add --append console=ttyS0")
    if any(word.startswith(("earlyprintk=", "earlycon=")) for word in words):
        return Hint("nothing was printed, not even early", "try another --boot protocol, or another kernel")
    return Hint(
        "nothing was printed: the kernel died early, or has no driver for the serial console",
        "--append earlyprintk=ttyS0 shows its first words; `kvmpy inspect KERNEL` tells if SERIAL_8250_CONSOLE is set",
    )


def _halted(evidence: Evidence) -> Hint | None:
    if evidence.stop.reason is not Reason.HALT or _silent(evidence) is not None:
        return None
    if re.search(r"reboot: System halted|Power down", evidence.console[-LAST_WORDS:]):
        return Hint("the guest was halted, not powered off", "use `poweroff` in the guest")
    return Hint("all CPUs are halted with interrupts off: nothing can wake them")


def _bug(evidence: Evidence) -> Hint | None:
    if evidence.stop.reason is Reason.ERROR:
        return Hint("this is a bug in a device, of kvmpy's or your own", "if of kvmpy's, report it with all of this")
    return None


# Rules for a guest that was still there when its time was up.


def _panic_stays(evidence: Evidence) -> Hint | None:
    if "Kernel panic - not syncing" not in evidence.console:
        return None
    return Hint("the kernel panicked, and stands still as it was told to", "--append panic=-1 makes it stop at once")


def _waits(evidence: Evidence) -> Hint | None:
    last = evidence.console[-LAST_WORDS:].rpartition("\n")[2]
    for pattern, what in PROMPTS:
        if re.search(pattern, last):
            return Hint(f"the guest waits for {what}", "use the console, or have the work done by --exec")
    if evidence.console.strip() and all(cpu.activity in (Activity.IDLE, Activity.WAITING) for cpu in evidence.cpus):
        return Hint("the guest was idle: it waits for something that does not come", "its last output may tell what")
    return None


def _quiet(evidence: Evidence) -> Hint | None:
    if evidence.protocol in LINUX and "quiet" in evidence.cmdline.split():
        return Hint("the kernel was told to be quiet", "--append loglevel=7 shows what it does")
    return None


def _polling(evidence: Evidence) -> Hint | None:
    for kind in (kind for cpu in evidence.cpus for kind in cpu.exits):
        if kind.device or kind.what not in ("in", "read") or kind.count < POLLING:
            continue
        if kind.what == "read":
            return Hint(f"the guest keeps reading address {kind.address:#x}, where there is nothing")
        names = [name for ports, name in HARDWARE if kind.address in ports]
        what = f", where PCs have {names[0]}" if names else ""
        return Hint(
            f"the guest keeps reading port {kind.address:#x}{what}: this machine has nothing there",
            "a driver waits for hardware; leave it out, or turn it off on the command line",
        )
    return None


def _spinning(evidence: Evidence) -> Hint | None:
    for cpu in evidence.cpus:
        if cpu.regs is not None and cpu.activity is Activity.RUNNING and cpu.loop:
            waits = any(instruction.text == "pause" for instruction in (*cpu.before, *cpu.code))
            what = "waits for another one, or for time to pass," if waits else "runs"
            return Hint(f"vcpu {cpu.index} {what} in a loop of a few instructions, at rip {cpu.regs.rip:#x}")
    return None


Rule = Callable[[Evidence], Hint | None]
RULES: tuple[Rule, ...] = (_bug, _emulation, _entry_failure, _empty, _triple_fault, _silent, _halted)
AT_TIMEOUT: tuple[Rule, ...] = (_panic_stays, _waits, _quiet, _polling, _spinning)
