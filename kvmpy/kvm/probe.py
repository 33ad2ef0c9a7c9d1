"""Finds out whether this host's KVM can run kernels, by letting a guest of one instruction try."""

from __future__ import annotations

import errno
import mmap
from contextlib import ExitStack, closing

from ..core.errors import KvmError
from ..core.record import replace
from . import exits
from .handle import Kvm, Vcpu
from .state import DescriptorTable, Regs, Segment

INT3 = b"\xcc"  # Linux has executed one early in every boot since 5.3, to test its own patching
CR0_PE = 1 << 0
CODE, DATA = 0xB, 0x3  # readable code; writable data; both accessed (Intel SDM vol. 3A, 3.4.5.1)
TRIES = 100  # a pending signal makes KVM_RUN return before the guest has run


def runs_ring0_natively(kvm: Kvm) -> bool:
    """Whether guest code in ring 0 runs on the processor (VT-x, AMD-V) rather than in KVM's instruction emulator.

    A KVM without such hardware below it emulates ring 0 with the emulator made for the few instructions that touch
    devices, which no kernel survives; neither versions nor CPU flags tell. The guest executes INT3 with an empty
    IDT: a processor finds no handler for it, none for the faults that follow, and shuts down; the emulator does not
    know INT3. Takes about 3 ms, most of it the making of a VM. Raises KvmError when no VM can be made, or the guest
    does anything else.
    """
    with ExitStack() as stack:
        page = stack.enter_context(mmap.mmap(-1, mmap.PAGESIZE))
        page[: len(INT3)] = INT3
        view = stack.enter_context(memoryview(page))
        vm = stack.enter_context(closing(kvm.create_vm()))
        vm.set_memory(0, 0, view)
        vcpu = stack.enter_context(closing(vm.create_vcpu(0)))
        _enter_protected_mode(vcpu)
        return _shuts_down(vcpu)


def _enter_protected_mode(vcpu: Vcpu) -> None:
    """32-bit, flat, paging off: the mode that needs least of the KVM. Execution starts at address 0."""
    sregs = vcpu.sregs()
    flat = Segment(limit=0xFFFFFFFF, present=1, s=1, db=1, g=1)
    sregs.cs = replace(flat, selector=0x8, type=CODE)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, replace(flat, selector=0x10, type=DATA))
    sregs.idt = DescriptorTable(0, 0)
    sregs.cr0 |= CR0_PE
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs())


def _shuts_down(vcpu: Vcpu) -> bool:
    """Run the guest to its one exit; False when KVM could not emulate the instruction."""
    run = vcpu.runner()
    for _ in range(TRIES):
        result = run(vcpu.fd)
        if result != -errno.EINTR:
            break
    if result < 0:
        raise KvmError("KVM_RUN", "probe", -result)
    reason = exits.IO.unpack_from(vcpu.page)[0]
    if reason not in (exits.EXIT_SHUTDOWN, exits.EXIT_INTERNAL_ERROR):
        raise KvmError("KVM_RUN", f"probe: {exits.describe(vcpu.page)}", errno.EIO)
    return bool(reason == exits.EXIT_SHUTDOWN)
