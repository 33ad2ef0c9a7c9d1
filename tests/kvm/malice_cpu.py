"""Hostile guests that use the processor: faults in every mode, junk in registers, code where none can be."""

from __future__ import annotations

from collections.abc import Iterator

from malice import BUFFERS, HIGH, RAM, Guest, generator, lines, seeds

from kvmpy.core.board import Reason
from kvmpy.x86 import layout

DEVICE = layout.MMIO_DEVICES
NOWHERE = {
    "device": DEVICE,
    "hole": 0xC8000000,
    "end-of-ram": RAM,
    "ioapic": layout.IOAPIC,
    "lapic": layout.LAPIC,
    "hpet": 0xFED00000,
    "ecam": layout.PCI_ECAM,
    "tss-pages": layout.KVM_TSS,
    "last-page": 0xFFFFF000,
    "boot-timer": layout.BOOT_TIMER,
}
# Maps the last 2 MiB of linear addresses to those of RAM.
END_OF_ADDRESSES = f"""
        movq    ${BUFFERS | 0x83:#x}, {BUFFERS + 511 * 8:#x}
        movq    ${BUFFERS + 3:#x}, {BUFFERS + 0x1000 + 511 * 8:#x}
        movq    ${BUFFERS + 0x1003:#x}, {layout.PAGE_TABLES + 511 * 8:#x}
        mov     %cr3, %rax
        mov     %rax, %cr3
"""
STOPS = frozenset({Reason.TRIPLE_FAULT, Reason.CRASH, Reason.TIMEOUT, Reason.HALT, Reason.RESET})


def faults() -> Iterator[Guest]:
    """Guests whose processor cannot go on, or only goes on failing."""
    no_idt = "lidt 4f(%rip)\nud2\n.balign 8\n4: .zero 16"
    yield Guest("triple-long-no-idt", no_idt, seconds=30, ends=STOPS)
    yield Guest(
        "triple-real-no-ivt", "lidt 0x7c40\nmov %cr0, %eax\nor $1, %al\nmov %eax, %cr0\nud2", "real", ends=STOPS
    )
    yield Guest("triple-protected-no-idt", "ud2", "protected", seconds=30, ends=STOPS)
    for name, address in NOWHERE.items():
        yield Guest(f"run-at-{name}", f"long_mode\nmov ${address:#x}, %rax\njmp *%rax")
        yield Guest(f"stack-in-{name}", f"mov ${address + 64:#x}, %rsp\n1: push %rax\ncall 2f\n2: pop %rbx\njmp 1b")
        yield Guest(
            f"page-tables-in-{name}", f"mov ${address & ~0xFFF:#x}, %rax\nmov %rax, %cr3\n1: incl 0x6200\njmp 1b"
        )
        table = f".balign 8\n3: .word 0xfff\n.quad {address:#x}"
        yield Guest(f"idt-in-{name}", f"lidt 3f(%rip)\nsti\nud2\nhlt\n{table}", ends=STOPS)
        load = "mov $0x18, %eax\nmov %eax, %ds\nmov %eax, %ss\nmov $0x20, %eax\nltr %ax"
        yield Guest(f"gdt-in-{name}", f"long_mode\nlgdt 3f(%rip)\n{load}\n1: jmp 1b\n{table}")
    yield Guest(
        "tables-of-themselves",
        f"long_mode\n{_self_mapped()}\nmov ${BUFFERS}, %eax\nmov %rax, %cr3\n1: mov (%rax), %rbx\njmp 1b",
    )
    for name, code in (
        ("loop", "mov $-2, %rax\nmovw $0xfeeb, (%rax)\njmp *%rax"),
        ("stack", "mov $-4, %rsp\n1: jmp 1b"),
        ("fault", "lidt 4f(%rip)\nmov $-1, %rax\nmovb $0xcc, (%rax)\njmp *%rax\n.balign 8\n4: .zero 16"),
        ("popcnt", "mov $-5, %rax\nmovl $0xc3b80ff3, (%rax)\njmp *%rax"),
    ):
        yield Guest(f"{name}-at-the-end-of-addresses", END_OF_ADDRESSES + code)
    yield Guest("jump-not-canonical", "long_mode\nmovabs $0x8000000000000000, %rax\njmp *%rax", ends=STOPS)
    yield Guest("stack-not-canonical", "long_mode\nmovabs $0x8000000000000000, %rsp\npush %rax\n1: jmp 1b", ends=STOPS)
    yield Guest("endless-faults", "long_mode\nlea 1f(%rip), %r15\n1: ud2")
    yield Guest(
        "endless-page-faults", "long_mode\nlea 1f(%rip), %r15\nmovabs $0x7f0000000000, %rax\n1: mov (%rax), %ebx"
    )
    yield Guest("overwrites-itself", f"mov ${HIGH:#x}, %edi\nmov $0x1000, %ecx\nmov $0xf4, %al\nrep stosb")
    yield Guest(
        "overwrites-all-of-ram", f"xor %edi, %edi\nmov ${RAM // 8:#x}, %ecx\nmov $-1, %rax\nrep stosq\n1: jmp 1b"
    )
    yield Guest(
        "fills-ram-beyond-its-end",
        f"long_mode\nmov ${RAM - 4096:#x}, %edi\nmov $0x1000, %ecx\nlea 1f(%rip), %r15\nrep stosq\n1: done",
    )
    for name, at in (
        ("acpi", layout.ACPI_TABLES),
        ("bios", layout.BIOS),
        ("boot", 0x500),
        ("page-tables", layout.PAGE_TABLES),
    ):
        yield Guest(
            f"overwrites-{name}",
            f"mov ${at:#x}, %edi\nmov $0x2000, %ecx\nmov $0xa5a5a5a5, %eax\nrep stosl\n1: in $0x80, %al\njmp 1b",
        )
    for mode in ("real", "protected", "long"):
        stops = frozenset({Reason.HALT, Reason.TIMEOUT})
        yield Guest(f"halt-{mode}", "cli\n1: hlt\njmp 1b", mode, seconds=30, ends=frozenset({Reason.HALT}))
        yield Guest(
            f"halt-awake-{mode}",
            "lidt 0x6100\nsti\n1: hlt\njmp 1b" if mode == "long" else "sti\n1: hlt\njmp 1b",
            mode,
            ends=STOPS,
        )
        yield Guest(f"spin-{mode}", "1: jmp 1b", mode, ends=frozenset({Reason.TIMEOUT}))
        yield Guest(f"pause-{mode}", "1: pause\njmp 1b", mode, ends=stops | STOPS)
    yield Guest("reset-vector", "ljmp $0xffff, $0", "real", seconds=30, ends=frozenset({Reason.RESET}))
    yield Guest("interrupts-of-real-mode", lines(f"int ${n}" for n in range(256)), "real")
    yield Guest("wraps-around-in-real-mode", "mov $0xffff, %ax\nmov %ax, %ds\n1: mov 0xffff, %eax\njmp 1b", "real")
    yield Guest("task-switch", "movl $0x00000067, 0x520\nljmp $0x20, $0", "protected")
    yield Guest(
        "task-switch-to-device",
        f"movl $0x00000067, 0x530\nmovl ${DEVICE >> 24 << 24 | 0x8900 | DEVICE >> 16 & 0xFF:#x}, 0x534\nljmp $0x30, $0",
        "protected",
    )
    yield Guest("compatibility-mode", "push $0x28\nlea 1f(%rip), %rax\npush %rax\nlretq\n1: nop\njmp 1b")


def _self_mapped() -> str:
    return f"movq ${BUFFERS + 3}, {BUFFERS:#x}\nmovq ${BUFFERS + 3}, {BUFFERS + 8:#x}"


# What an emulator may lack, and what needs a state that is not there.
ODD = {
    "int3": "int3", "into": ".byte 0xce", "icebp": ".byte 0xf1", "ud0": ".byte 0x0f, 0xff, 0xc0", "ud1": ".byte 0x0f, 0xb9, 0xc0",
    "syscall": "syscall", "sysenter": "sysenter", "sysexit": "sysexitl", "sysret": "sysretq", "rsm": "rsm",
    "vmcall": "vmcall", "vmmcall": "vmmcall", "vmxon": "vmxon 0x6000", "vmlaunch": "vmlaunch", "vmrun": "vmrun", "vmload": "vmload",
    "skinit": "skinit", "clgi": "clgi", "stgi": "stgi", "invlpga": "invlpga", "monitor": "monitor", "mwait": "mwait",
    "xsave": "xsave 0x6400", "xrstor": "xrstor 0x6400", "xsetbv": "xsetbv", "xgetbv": "xgetbv", "fxsave": "fxsave 0x6400", "fxrstor": "fxrstor 0x6400",
    "popcnt": "popcnt %eax, %ebx", "crc32": "crc32 %eax, %ebx", "cmpxchg16b": "cmpxchg16b 0x6400", "rdtscp": "rdtscp", "rdpmc": "rdpmc",
    "rdrand": "rdrand %eax", "invpcid": "invpcid 0x6400, %rax", "clac": "clac", "stac": "stac", "swapgs": "swapgs", "wbinvd": "wbinvd", "invd": "invd",
    "lldt": "lldt %ax", "ltr": "ltr %ax", "str": "str %ax", "verr": "verr %ax", "lar": "lar %ax, %bx", "lmsw": "lmsw %ax", "clts": "clts",
    "iret": "iretq", "lret": "lretq", "int-80": "int $0x80", "movbe": "movbe 0x6400, %eax", "avx": "vmovdqu 0x6400, %ymm0", "sse-device": "mov $0xd0000000, %eax\nmovups (%rax), %xmm0",
    "avx-device": "mov $0xd0000000, %eax\nvmovdqu %ymm0, (%rax)", "mmx-device": "mov $0xd0000000, %eax\nmovq (%rax), %mm0", "fld-device": "mov $0xd0000000, %eax\nfldt (%rax)",
    "cmpxchg16b-device": "mov $0xd0000000, %eax\nlock cmpxchg16b (%rax)", "xchg-device": "mov $0xd0000000, %eax\n1: xchg %ecx, (%rax)\nlock incl (%rax)",
    "call-through-device": "mov $0xd0000000, %eax\ncall *(%rax)", "jump-through-device": "mov $0xd0000000, %eax\njmp *(%rax)", "lidt-from-device": "mov $0xd0000000, %eax\nlidt (%rax)\nud2",
}  # fmt: skip


def instructions() -> Iterator[Guest]:
    """One odd instruction each, with exceptions handled and without."""
    for name, code in ODD.items():
        yield Guest(f"odd-{name}", f"long_mode\nxor %eax, %eax\nxor %ecx, %ecx\nlea 9f(%rip), %r15\n{code}\n9: done")
    for seed in seeds(30):
        random = generator("junk", seed)
        mode = ("real", "protected", "long")[seed % 3]
        junk = ", ".join(map(str, random.randbytes(600)))
        yield Guest(f"junk-{mode}-{seed}", f".byte {junk}", mode, seconds=0.05)
    for seed in seeds(10):
        random = generator("sse", seed)
        floats = [
            f".byte 0x0f, {random.choice([0x10, 0x11, 0x28, 0x29, 0x2A, 0x51, 0x58, 0x59, 0x5E, 0xC6, 0xAE, 0xE6])}, {random.randrange(256)}"
            if random.random() < 0.5
            else f".byte {random.randrange(0xD8, 0xE0)}, {random.randrange(0xC0, 0x100)}"
            for _ in range(200)
        ]
        yield Guest(
            f"floats-{seed}",
            "long_mode\nmov $0x206, %eax\nmov %rax, %cr4\n" + lines(f"try {code}" for code in floats) + "\ndone",
        )


# MSRs: architectural ones, MTRRs, AMD's, those of KVM and of Hyper-V, and what is behind each of these.
MSRS = [0, 0x100, 0x200, 0x400, 0x600, 0x800, 0xC80, 0x1000, 0x40000000, 0x40000100, 0x4B564D00, 0xC0000000, 0xC0000080, 0xC0000100, 0xC0010000, 0xC0010100, 0xC0011000, 0xFFFFFF00]  # fmt: skip


def registers() -> Iterator[Guest]:
    """CPUID, MSRs, control and debug registers, with whatever values."""
    for base in MSRS:
        for name, value in (
            ("ones", "mov $-1, %eax\nmov $-1, %edx"),
            ("device", f"mov ${DEVICE | 1:#x}, %eax\nxor %edx, %edx"),
            ("ram", f"mov ${BUFFERS | 3:#x}, %eax\nxor %edx, %edx"),
        ):
            loop = f"mov ${base:#x}, %esi\nmov $256, %ebp\n1: mov %esi, %ecx\ntry rdmsr\n{value}\nmov %esi, %ecx\ntry wrmsr\ninc %esi\ndec %ebp\njnz 1b\nin $0x80, %al\ndone"
            yield Guest(f"msr-{base:x}-{name}", f"long_mode\n{loop}")
    for base in (0, 0x40000000, 0x80000000, 0xC0000000, 0xFFFFFF00):
        yield Guest(
            f"cpuid-{base:x}",
            f"long_mode\nmov ${base:#x}, %esi\nmov $256, %ebp\n1: mov %esi, %eax\nmov %ebp, %ecx\ntry cpuid\ninc %esi\ndec %ebp\njnz 1b\ndone",
        )
    for seed in seeds(12):
        random = generator("control", seed)
        code = []
        for _ in range(60):
            register = random.choice(["cr0", "cr2", "cr3", "cr4", "cr8", "dr0", "dr3", "dr6", "dr7"])
            bits = random.choice(
                [0, -1, 1 << random.randrange(64), random.getrandbits(64), random.getrandbits(32), 0x80050033]
            )
            code.append(
                f"movabs ${bits & (1 << 64) - 1:#x}, %rax\ntry mov %rax, %{register}\ntry mov %{register}, %rbx"
            )
        yield Guest(f"control-{seed}", "long_mode\n" + lines(code) + "\ndone")
