"""CPU state as plain values, named as in <linux/kvm.h>."""

from __future__ import annotations

from ..core.record import Record, fresh


class Regs(Record):
    """struct kvm_regs: the general registers."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


class Segment(Record):
    """struct kvm_segment: a segment register with its hidden part."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the name in the API
    g: int = 0
    avl: int = 0
    unusable: int = 0


class DescriptorTable(Record):
    """struct kvm_dtable: GDTR or IDTR."""

    base: int = 0
    limit: int = 0


class Sregs(Record):
    """struct kvm_sregs: segments, control registers, EFER, APIC base."""

    cs: Segment = fresh(default_factory=Segment)
    ds: Segment = fresh(default_factory=Segment)
    es: Segment = fresh(default_factory=Segment)
    fs: Segment = fresh(default_factory=Segment)
    gs: Segment = fresh(default_factory=Segment)
    ss: Segment = fresh(default_factory=Segment)
    tr: Segment = fresh(default_factory=Segment)
    ldt: Segment = fresh(default_factory=Segment)
    gdt: DescriptorTable = fresh(default_factory=DescriptorTable)
    idt: DescriptorTable = fresh(default_factory=DescriptorTable)
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    interrupt_bitmap: tuple[int, ...] = (0, 0, 0, 0)


class CpuidEntry(Record):
    """struct kvm_cpuid_entry2: what CPUID answers for one leaf (`function`) and subleaf (`index`)."""

    function: int
    index: int = 0
    flags: int = 0  # 1: the index matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
