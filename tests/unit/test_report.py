"""What a crash report says, from evidence made by hand."""

from __future__ import annotations

import json

import pytest

from kvmpy.core.board import Reason, Stop
from kvmpy.core.record import replace
from kvmpy.core.text import printable
from kvmpy.evidence import Activity, Cpu, Evidence, Exits, Instruction, _disassemble, _in_tight_loop, _lead_in
from kvmpy.hints import hints, init_error, wait_status
from kvmpy.kvm import exits
from kvmpy.kvm.state import Regs, Segment, Sregs
from kvmpy.report import facts, numbers, render

LONG_MODE = Sregs(
    cs=Segment(selector=0x10, l=1, present=1),
    cr0=0x80050033,
    cr4=0x6B0,
    efer=0xD01,
)
LINUX = "[    0.000000] Linux version 6.1.0 (builder@host)\n"


def cpu(index: int = 0, activity: Activity = Activity.RUNNING, **fields: object) -> Cpu:
    code = (Instruction(0xFFFFFFFF81000120, b"\x0f\x0b", "ud2"), Instruction(0xFFFFFFFF81000122, b"\xc3", "ret"))
    regs = Regs(rip=0xFFFFFFFF81000120, rsp=0xFFFFC90000003F00, rflags=0x10246)
    cpu = Cpu(index, activity, regs=regs, sregs=LONG_MODE, code=code, stack=tuple(range(6)))
    return replace(cpu, **fields)  # type: ignore[arg-type]


def evidence(stop: Stop | Reason = Reason.TIMEOUT, console: str = LINUX, *cpus: Cpu, **fields: object) -> Evidence:
    """A Linux guest that was given the default command line."""
    stop = stop if isinstance(stop, Stop) else Stop(stop)
    whole = Evidence(
        stop=stop,
        cpus=cpus or (cpu(),),
        console=console,
        protocol="pvh",
        cmdline="console=ttyS0,115200 panic=-1",
        memory=512 << 20,
    )
    return replace(whole, **fields)  # type: ignore[arg-type]


def causes(*arguments: object, **fields: object) -> list[str]:
    return [hint.cause for hint in hints(evidence(*arguments, **fields))]  # type: ignore[arg-type]


# The text.


def test_report_of_a_kernel_that_died() -> None:
    kinds = (Exits("out", 0x3F8, 1, "Serial", 20), Exits("in", 0x1F7, 1, "", 11))
    text = render(
        evidence(
            Stop(Reason.TRIPLE_FAULT, "vcpu 0"), LINUX + "last words\n", cpu(exits=kinds, fatal="KVM_EXIT_SHUTDOWN")
        )
    )

    lines = text.split("\n")
    assert lines[0] == "kvmpy: triple fault (vcpu 0)"
    assert "vcpu 0: running; 64-bit mode, ring 0" in lines
    assert "r15    0000000000000000  rip    ffffffff81000120  rflags 0000000000010246" in text
    assert "0x10246 (PF|ZF|IF|RF)  efer 0xd01 (SCE|LME|LMA|NXE)" in text
    assert "0x80050033 (PE|MP|ET|NE|WP|AM|PG)" in text
    assert "0x6b0 (PSE|PAE|PGE|OSFXSR|OSXMMEXCPT)" in text
    assert "  => ffffffff81000120  0f 0b                      ud2" in lines
    assert "    20 x out port 0x3f8 (byte): Serial" in lines
    assert "    11 x in port 0x1f7 (byte): nothing there" in lines
    assert lines[-1] == "  | last words"


def test_report_fits_a_page() -> None:
    console = (
        "".join(f"Out of memory: line {number}\n" for number in range(200)) + "Initramfs unpacking failed: x\nlogin: "
    )
    before = cpu().code * 2
    kinds = tuple(Exits("in", port, 1, "", 9) for port in range(32))
    busy = [cpu(index, exits=kinds, before=before[:3], code=before + before[:1], loop=True) for index in range(64)]

    lines = render(evidence(Reason.TIMEOUT, console, *busy)).split("\n")

    assert len(lines) <= 64
    assert max(len(line) for line in lines) <= 124
    assert any("login" in line for line in lines[-12:])


def test_registers_of_a_guest_that_never_left_real_mode() -> None:
    sregs = Sregs(cs=Segment(selector=0xF000, base=0xF0000), cr0=0x10)
    code = (Instruction(0x7C00, b"\xfa", "cli"),)

    text = render(evidence(Reason.TIMEOUT, "", cpu(regs=Regs(rip=0x7C00), sregs=sregs, code=code), protocol="flat"))

    assert "vcpu 0: running; real mode" in text
    assert "eip    00007c00" in text
    assert "=> 00007c00  fa" in text
    assert "r15" not in text


def test_state_that_a_triple_fault_has_reset_is_not_shown_as_the_guests() -> None:
    reset = cpu(regs=Regs(rip=0xFFF0), sregs=Sregs(cs=Segment(selector=0xF000, base=0xFFFF0000)))

    text = render(evidence(Reason.TRIPLE_FAULT, LINUX, reset))

    assert "its state is lost" in text
    assert "eip" not in text


def test_cpu_that_a_device_holds() -> None:
    kinds = (Exits("write", 0xD0000050, 4, "Blk", 1),)

    text = render(evidence(Reason.TIMEOUT, LINUX, Cpu(0, Activity.BUSY, kinds)))

    assert "vcpu 0: held by a device" in text
    assert "write 0xd0000050 (dword): Blk" in text


def test_many_cpus_take_few_lines() -> None:
    cpus = [
        cpu(0, Activity.IDLE),
        cpu(1),
        *(cpu(index, Activity.IDLE) for index in range(2, 40)),
        *(cpu(index, Activity.WAITING) for index in range(40, 64)),
    ]

    lines = render(evidence(Reason.TIMEOUT, LINUX, *cpus)).split("\n")

    assert "vcpu 1: running; 64-bit mode, ring 0" in lines
    assert "vcpu 0, 2-39: idle, waiting for an interrupt" in lines
    assert "vcpu 40-63: not started" in lines


def test_an_idle_guest_is_told_in_few_words() -> None:
    lines = render(evidence(Reason.TIMEOUT, LINUX + "login: ", cpu(activity=Activity.IDLE))).split("\n")

    assert lines[:4] == [
        "kvmpy: time limit reached",
        "",
        "vcpu 0: idle, waiting for an interrupt; 64-bit mode, ring 0",
        "",
    ]


def test_the_cpu_that_cannot_go_on_comes_first() -> None:
    text = render(evidence(Reason.CRASH, LINUX, cpu(0), cpu(1, fatal="KVM_EXIT_UNKNOWN")))

    assert text.index("vcpu 1:") < text.index("vcpu 0:")
    assert "exit   KVM_EXIT_UNKNOWN" in text


def test_exception_of_a_device_is_shown_with_its_trace() -> None:
    def device() -> None:
        raise ZeroDivisionError("in \x1b[31mread_STATUS")

    with pytest.raises(ZeroDivisionError) as caught:
        device()

    text = render(evidence(Stop(Reason.ERROR, "ZeroDivisionError", cause=caught.value)))

    assert "ZeroDivisionError: in read_STATUS" in text
    assert "test_report.py" in text
    assert "-> this is a bug in a device" in text


def test_facts_are_json() -> None:
    kinds = (Exits("read", 0xD0000000, 4, "", 3),)

    value = json.loads(json.dumps(facts(evidence(Reason.CRASH, LINUX, cpu(exits=kinds), Cpu(1, Activity.BUSY)))))

    first, second = value["vcpus"]
    assert value["reason"] == "crash"
    assert first["registers"]["rip"] == "0xffffffff81000120"
    assert first["segments"]["cs"]["selector"] == "0x10"
    assert first["code"][0] == {"address": "0xffffffff81000120", "bytes": "0f0b", "text": "ud2"}
    assert first["last_exits"] == [{"what": "read", "address": "0xd0000000", "size": 4, "device": "", "count": 3}]
    assert second == {"index": 1, "activity": "busy", "mode": "", "exit": "", "last_exits": []}


def test_numbers() -> None:
    assert numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.parametrize(
    ("sregs", "rflags", "mode"),
    [
        (Sregs(cr0=0x10), 2, "real mode"),
        (Sregs(cr0=0x11), 1 << 17 | 2, "virtual-8086 mode, ring 3"),
        (Sregs(cr0=0x11), 2, "16-bit protected mode, ring 0, paging off"),
        (Sregs(cr0=0x11, cs=Segment(db=1)), 2, "32-bit protected mode, ring 0, paging off"),
        (Sregs(cr0=0x80000011, cs=Segment(db=1), ss=Segment(dpl=3)), 2, "32-bit protected mode, ring 3"),
        (Sregs(cr0=0x80000011, efer=0x500, cs=Segment(db=1)), 2, "32-bit compatibility mode, ring 0"),
        (Sregs(cr0=0x80000011, efer=0x500, cs=Segment(l=1), ss=Segment(dpl=3)), 2, "64-bit mode, ring 3"),
    ],
)
def test_mode(sregs: Sregs, rflags: int, mode: str) -> None:
    assert cpu(sregs=sregs, regs=Regs(rflags=rflags)).mode == mode


# Terminals.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\nlines", "plain\nlines"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]0;title\x1b\\after", "after"),
        ("\x1bPdcs\x1b\\after", "after"),
        ("\x1bcreset", "reset"),
        ("\x1b(Bset", "set"),
        ("one\r\ntwo\rthree", "one\ntwothree"),
        ("a\x08\x00\x7f\x9b31m", "a\\x08\\x00\\x7f\\x9b31m"),
        ("\u202eabc", "\\u202eabc"),
        ("na\u00efve \u2713", "na\u00efve \u2713"),
        ("\udcff", "\\udcff"),
        ("\x1b", "\\x1b"),
        ("\x1b]never ended", ""),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


# Guest code.


def test_lead_in_ends_at_rip() -> None:
    code = bytes.fromhex("4889e5 4883ec10 c3")  # mov rbp, rsp; sub rsp, 16; ret

    found = _lead_in(b"\x0f" + code, 0x1000, 64)

    assert [instruction.text for instruction in found][-3:] == ["mov rbp, rsp", "sub rsp, 0x10", "ret"]
    assert found[-1].address + len(found[-1].data) == 0x1000 + 1 + len(code)


@pytest.mark.parametrize(
    ("code", "rip", "loops"),
    [
        ("ebfe", 0, True),  # jmp to itself
        ("f390 ebfc", 0, True),  # pause; jmp back
        ("ebfc", 2, True),  # the jmp of the same loop
        ("75fe", 0, True),
        ("e2fe", 0, True),  # loop
        ("90 90 c3", 0, False),
        ("e800000000 ebf9", 0, False),  # a call is no tight loop
        ("eb10", 0, False),
        ("7410 90", 0, False),
        ("ffe0", 0, False),  # jmp rax
    ],
)
def test_tight_loop(code: str, rip: int, loops: bool) -> None:
    assert _in_tight_loop(rip, _disassemble(bytes.fromhex(code), rip, 64)) is loops


# Hints.


@pytest.mark.parametrize(
    ("printed", "cause"),
    [
        (
            "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
            "the kernel found nothing to start",
        ),
        (
            "Initramfs unpacking failed: junk within compressed archive",
            "the initrd could not be unpacked (junk within compressed archive)",
        ),
        (
            "rootfs image is not initramfs (no cpio magic); looks like an initrd",
            "the initrd could not be unpacked (no cpio magic)",
        ),
        (
            "Initramfs unpacking failed: compression method zstd not configured",
            "the kernel cannot decompress the initrd: it was built without zstd",
        ),
        ("Initramfs unpacking failed: write error", "the unpacked initrd does not fit"),
        (
            "Kernel panic - not syncing: No working init found.  Try passing init=",
            "the kernel found no program to start",
        ),
        ("Failed to execute /init (error -2)", "could not execute /init: there is no such file, or its interpreter"),
        (
            "Kernel panic - not syncing: Requested init /sbin/x failed (error -8).",
            "could not execute /sbin/x: it is no program for this kernel",
        ),
        (
            "Starting init: /bin/sh exists but couldn't execute it (error -13)",
            "could not execute /bin/sh: it is not exec",
        ),
        ("Out of memory: Killed process 1 (init)", "the guest ran out of memory"),
        ("Kernel panic - not syncing: System is deadlocked on memory", "the guest ran out of memory"),
        ("Kernel panic - not syncing: IO-APIC + timer doesn't work!", "the kernel's test of the timer interrupt"),
        (
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
            "first process ended: killed by signal 11, SIGSEGV",
        ),
        ("PANIC: early exception 0x0d IP 10:ffffffff81000000 error 0 cr2 0x0", "a general protection fault (#GP)"),
        ("ALERT!  /dev/vda1 does not exist.  Dropping to a shell!", "a root device that this machine does not have"),
        ("\n -- System halted", "the kernel's decompressor gave up"),
        ("This kernel requires an x86-64 CPU, but only detected an i686 CPU.", "lacks what the kernel was built for"),
        ("watchdog: BUG: soft lockup - CPU#1 stuck for 26s!", "CPUs stood still for seconds"),
    ],
)
def test_what_a_kernel_prints(printed: str, cause: str) -> None:
    found = causes(Reason.PANIC, LINUX + printed + "\n")

    assert cause in found[0]


def test_remedies_name_the_memory_there_is() -> None:
    found = hints(evidence(Reason.PANIC, LINUX + "Out of memory: Killed process 1 (init)\n", memory=64 << 20))

    assert found[0].remedy == "give it more than 64 MiB with --mem"


def test_text_of_the_guest_is_no_format() -> None:
    found = causes(Reason.PANIC, LINUX + "Initramfs unpacking failed: {memory} {0} %s\n")

    assert "({memory} {0} %s)" in found[0]


def test_hostile_console_is_searched_in_bounded_time() -> None:
    for piece in ("ALERT! ", "initramfs ", "Failed to execute /", "Requested init x ", "Password"):
        hints(evidence(Reason.TIMEOUT, piece * (1 << 17)))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0x100, "exit status 1"),
        (0x7F00, "exit status 127 (a command that was not found)"),
        (0x0B, "killed by signal 11, SIGSEGV"),
        (0x8B, "killed by signal 11, SIGSEGV"),
        (0x04, "killed by signal 4, SIGILL (it uses instructions that this processor lacks)"),
        (0x7F, "killed by signal 127, unknown"),
    ],
)
def test_wait_status(code: int, text: str) -> None:
    assert wait_status(code) == text


def test_init_error_that_has_no_meaning_of_its_own() -> None:
    assert init_error(5) == "Input/output error"


@pytest.mark.parametrize(
    ("cmdline", "remedy"),
    [
        ("panic=-1", "add --append console=ttyS0"),
        ("console=ttyS0", "--append earlyprintk=ttyS0"),
        ("console=ttyS0 earlyprintk=ttyS0", "try another --boot protocol"),
    ],
)
def test_silent_kernel(cmdline: str, remedy: str) -> None:
    found = hints(evidence(Reason.TIMEOUT, "\n", cmdline=cmdline))

    assert "nothing was printed" in found[0].cause
    assert remedy in found[0].remedy


def test_silent_guest_that_is_no_linux_needs_no_console() -> None:
    assert causes(Reason.TRIPLE_FAULT, "", protocol="flat") == ["an exception had no handler, nor had the double fault"]


def test_triple_fault_before_the_first_word() -> None:
    found = hints(evidence(Reason.TRIPLE_FAULT, ""))

    assert "cannot be started by pvh" in found[0].cause
    assert "--boot linux64 or decompressor" in found[0].remedy


def test_triple_fault_as_a_way_to_reboot() -> None:
    assert causes(Reason.TRIPLE_FAULT, LINUX + "reboot: Restarting system\n") == [
        "the guest reset itself by a triple fault"
    ]


def test_instruction_that_a_software_kvm_lacks() -> None:
    found = hints(evidence(Reason.CRASH, "", cpu(suberror=exits.EMULATION, fatal="x"), native=False))

    assert len(found) == 1
    assert "what it lacks here is `ud2`" in found[0].cause
    assert "scripts/linux-host" in found[0].remedy


def test_instruction_that_kvm_cannot_emulate_on_a_device() -> None:
    found = hints(evidence(Reason.CRASH, LINUX, cpu(suberror=exits.EMULATION, fatal="x"), native=True))

    assert "KVM cannot carry out `ud2`" in found[0].cause


def test_jump_into_nothing() -> None:
    found = causes(Reason.CRASH, LINUX, cpu(suberror=exits.EMULATION, fatal="x", code=()), native=True)

    assert found[0] == "the guest jumped to where there is no code"


@pytest.mark.parametrize(
    ("number", "meaning"),
    [
        (0x80000021, "not one that VT-x can run"),
        (0xFFFFFFFF, "not one that AMD-V can run"),
        (0x1234, "reason 0x1234"),
    ],
)
def test_failed_entry(number: int, meaning: str) -> None:
    found = causes(Reason.CRASH, LINUX, cpu(entry_failure=number, fatal="x"))

    assert meaning in found[0]


def test_zeros_as_code() -> None:
    zeros = tuple(Instruction(at, b"\0\0", "add byte ptr [rax], al") for at in range(0, 8, 2))

    assert causes(Reason.TIMEOUT, LINUX, cpu(code=zeros))[0] == (
        "the guest executes memory that holds nothing but zeros"
    )


def test_decompressor_that_halts_without_a_word() -> None:
    for reason in (Reason.HALT, Reason.CRASH):
        found = causes(reason, "", cpu(activity=Activity.HALTED), protocol="decompressor")

        assert found == [
            "the kernel's decompressor gave up, silently: the image is damaged, or does not fit into memory"
        ]


def test_halted_guest() -> None:
    still = cpu(activity=Activity.HALTED)

    assert causes(Reason.HALT, LINUX, still) == ["all CPUs are halted with interrupts off: nothing can wake them"]
    assert causes(Reason.HALT, LINUX + "reboot: System halted\n", still) == ["the guest was halted, not powered off"]


@pytest.mark.parametrize(
    ("last", "what"),
    [
        ("debian login: ", "a login"),
        ("(initramfs) ", "a shell of the initrd"),
        ("~ # ", "a command in its shell"),
        ("Password: ", "a password"),
        ("Press Enter for maintenance", "a key"),
    ],
)
def test_guest_that_waits_for_somebody(last: str, what: str) -> None:
    found = causes(Reason.TIMEOUT, LINUX + last, cpu(activity=Activity.IDLE))

    assert found[0].startswith(f"the guest waits for {what}")


def test_prompt_means_nothing_unless_the_time_was_up() -> None:
    assert causes(Reason.PANIC, LINUX + "login: ") == []


def test_idle_guest_without_a_prompt() -> None:
    found = causes(Reason.TIMEOUT, LINUX, cpu(activity=Activity.IDLE), cpu(1, Activity.WAITING))

    assert found == ["the guest was idle: it waits for something that does not come"]


def test_panic_that_stays() -> None:
    found = hints(evidence(Reason.TIMEOUT, LINUX + "Kernel panic - not syncing: Fatal exception\n"))

    assert "panic=-1" in found[0].remedy


def test_polling_of_hardware_that_is_not_there() -> None:
    kinds = (Exits("in", 0x3FD, 1, "Serial", 16), Exits("in", 0x1F7, 1, "", 16))

    found = causes(Reason.TIMEOUT, LINUX, cpu(exits=kinds))

    assert "reading port 0x1f7, where PCs have an IDE disk controller" in found[0]


def test_spinning_cpu() -> None:
    pause = (Instruction(0, b"\xf3\x90", "pause"),)

    assert "vcpu 0 runs in a loop" in causes(Reason.TIMEOUT, LINUX, cpu(loop=True))[0]
    assert "vcpu 0 waits for another one" in causes(Reason.TIMEOUT, LINUX, cpu(loop=True, before=pause))[0]


def test_guest_that_was_just_slow() -> None:
    found = hints(evidence(Reason.TIMEOUT, LINUX))

    assert [hint.remedy for hint in found] == ["give it more with --timeout"]


def test_quiet_kernel() -> None:
    found = hints(evidence(Reason.TIMEOUT, "short\n", cmdline="console=ttyS0 quiet"))

    assert "--append loglevel=7" in found[0].remedy
