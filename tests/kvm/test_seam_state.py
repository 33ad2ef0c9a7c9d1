"""Every piece of vCPU and VM state comes back from KVM as it was set."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from rig import LOAD, SECONDS, Rig, port_read

from kvmpy.kvm.handle import Kvm, Vcpu, pack_sregs, unpack_sregs
from kvmpy.kvm.state import CpuidEntry, DescriptorTable, Regs, Segment, Sregs
from kvmpy.x86 import longmode, msr

APIC_SOFTWARE_ENABLE = 1 << 8
X2APIC_ENABLE = 1 << 10  # IA32_APIC_BASE
SPURIOUS, TASK_PRIORITY = 0xF0, 0x80  # offsets in the local APIC
HALTED, UNINITIALIZED, RUNNABLE = 3, 1, 0  # KVM_MP_STATE_*
USE_32BIT_IDS = 1 << 0  # KVM_X2APIC_API_USE_32BIT_IDS


@pytest.fixture
def vcpu(vm: Rig) -> Iterator[Vcpu]:
    """A vCPU that has not run."""
    return vm.add_vcpu()


def test_regs(vcpu: Vcpu) -> None:
    regs = Regs(*(0x0101010101010101 * n for n in range(1, 18)), rflags=0x246)

    vcpu.set_regs(regs)

    assert vcpu.regs() == regs


def test_sregs_as_bytes() -> None:
    """Each field has a place of its own in struct kvm_sregs."""
    numbers = iter(range(1, 200))
    segments = [Segment(*(next(numbers) for _ in range(12))) for _ in range(8)]
    tables = [DescriptorTable(next(numbers), next(numbers)) for _ in range(2)]
    sregs = Sregs(*segments, *tables, *(next(numbers) for _ in range(7)), (7, 8, 9, 1 << 63))

    data = pack_sregs(sregs)

    assert len(data) == 312
    assert unpack_sregs(data) == sregs


def test_sregs(vm: Rig, vcpu: Vcpu) -> None:
    sregs = vcpu.sregs()
    longmode.long_mode(sregs, vm.mem)
    sregs.ds.base, sregs.es.base, sregs.gs.base = 0x10000, 0x20000, 0x123456789000
    sregs.gs.selector, sregs.gdt.limit, sregs.idt = 0x28, 0x3F, DescriptorTable(0x5000, 0xFFF)
    sregs.cr2, sregs.cr8 = 0x123456, 5

    vcpu.set_sregs(sregs)

    assert vcpu.sregs() == sregs


def test_fpu(vcpu: Vcpu) -> None:
    # struct kvm_fpu: fpr[8][16], fcw, fsw, ftwx, pad, last_opcode, last_ip, last_dp, xmm[16][16]; then mxcsr and pad,
    # which KVM_SET_FPU leaves alone
    registers = b"".join(bytes([n] * 10 + [0] * 6) for n in range(1, 9))
    xmm = b"".join(bytes([0x40 + n] * 16) for n in range(16))
    state = registers + struct.pack("<HHBBHQQ", longmode.FCW, 0, 0xFF, 0, 0, 0, 0) + xmm

    vcpu.set_fpu(state.ljust(len(vcpu.fpu()), b"\0"))

    assert vcpu.fpu()[: len(state)] == state


def test_xsave(vcpu: Vcpu) -> None:
    # SDM vol. 1, 13.4: MXCSR at 24, XMM0 at 160, XSTATE_BV at 512
    xmm0, daz_and_masks = bytes(range(16)), 0x1FC0
    state = bytearray(vcpu.xsave())
    state[160:176] = xmm0
    struct.pack_into("<I", state, 24, daz_and_masks)
    state[512] |= 0b10  # there is SSE state

    vcpu.set_xsave(state)

    assert len(state) >= 4096
    assert vcpu.xsave()[160:176] == xmm0
    assert struct.unpack_from("<I", vcpu.xsave(), 24) == (daz_and_masks,)
    assert vcpu.fpu()[152:168] == xmm0  # the same register, seen the other way


def test_xcrs(vcpu: Vcpu) -> None:
    # struct kvm_xcrs: nr_xcrs, flags, then (xcr, reserved, value)
    x87_and_sse = struct.pack("<IIIIQ", 1, 0, 0, 0, 0b11)
    state = x87_and_sse.ljust(len(vcpu.xcrs()), b"\0")

    vcpu.set_xcrs(state)

    assert vcpu.xcrs()[:24] == x87_and_sse


def test_lapic(vcpu: Vcpu) -> None:
    state = bytearray(vcpu.lapic())
    struct.pack_into("<I", state, SPURIOUS, APIC_SOFTWARE_ENABLE | 0x3F)
    struct.pack_into("<I", state, TASK_PRIORITY, 0x50)

    vcpu.set_lapic(state)

    read_back = vcpu.lapic()
    assert struct.unpack_from("<I", read_back, SPURIOUS) == (APIC_SOFTWARE_ENABLE | 0x3F,)
    assert struct.unpack_from("<I", read_back, TASK_PRIORITY) == (0x50,)


def test_events(vcpu: Vcpu) -> None:
    # struct kvm_vcpu_events: exception (8 bytes), interrupt (4), nmi: injected, pending, masked; ...
    state = bytearray(vcpu.events())
    state[12:15] = bytes((0, 1, 1))
    struct.pack_into("<I", state, 20, 1)  # flags: KVM_VCPUEVENT_VALID_NMI_PENDING

    vcpu.set_events(state)

    assert vcpu.events()[12:15] == bytes((0, 1, 1))


def test_debugregs(vcpu: Vcpu) -> None:
    # struct kvm_debugregs: db[4], dr6, dr7, flags
    values = (0x1000, 0x2000, 0x3000, 0x4000, 0xFFFF0FF0, 0x401)
    state = struct.pack("<6Q", *values).ljust(len(vcpu.debugregs()), b"\0")

    vcpu.set_debugregs(state)

    assert vcpu.debugregs() == state


def test_mp_state(vm: Rig, vcpu: Vcpu) -> None:
    other = vm.add_vcpu()
    assert (vcpu.mp_state(), other.mp_state()) == (RUNNABLE, UNINITIALIZED)

    vcpu.set_mp_state(HALTED)

    assert vcpu.mp_state() == HALTED


def test_msrs(vcpu: Vcpu) -> None:
    values = {
        msr.IA32_LSTAR: 0xFFFF800000001000,
        msr.IA32_PAT: 0x0606060606060606,
        msr.IA32_KERNEL_GS_BASE: 0x1234,
    }

    vcpu.set_msrs(values.items())

    assert vcpu.msrs(list(values)) == values


def test_msrs_stop_at_the_first_that_is_refused(vcpu: Vcpu) -> None:
    unknown = 0xDEAD0000

    assert list(vcpu.msrs([msr.IA32_PAT, unknown, msr.IA32_LSTAR])) == [msr.IA32_PAT]


def test_all_msrs_that_kvm_lists_can_be_read(kvm: Kvm, vcpu: Vcpu) -> None:
    indices = kvm.msr_indices()

    assert msr.IA32_LSTAR in indices
    assert list(vcpu.msrs(indices)) == indices


def test_boot_msrs_are_accepted(vcpu: Vcpu) -> None:
    vcpu.set_msrs(msr.BOOT)

    assert vcpu.msrs([msr.IA32_MTRR_DEF_TYPE]) == {msr.IA32_MTRR_DEF_TYPE: msr.MTRR_ENABLE | msr.MTRR_WRITE_BACK}


def test_cpuid(kvm: Kvm, vcpu: Vcpu) -> None:
    signature = CpuidEntry(0x40000000, 0, 0, 0x40000001, *struct.unpack("<3I", b"kvmpytester!"))
    brand = [
        CpuidEntry(0x80000002 + n, 0, 0, *struct.unpack_from("<4I", b"a brand of 48 bytes".ljust(48), 16 * n))
        for n in range(3)
    ]
    own = {entry.function for entry in [signature, *brand]}

    vcpu.set_cpuid([entry for entry in kvm.supported_cpuid() if entry.function not in own] + [signature, *brand])

    assert [entry for entry in vcpu.cpuid() if entry.function in own] == [signature, *brand]


def test_supported_cpuid_has_the_basic_leaves(kvm: Kvm) -> None:
    functions = {entry.function for entry in kvm.supported_cpuid()}

    assert {0, 1, 7, 0x80000000, 0x80000001} <= functions


def test_tsc_khz(vcpu: Vcpu) -> None:
    khz = vcpu.tsc_khz()

    vcpu.set_tsc_khz(khz)

    assert khz > 0
    assert vcpu.tsc_khz() == khz


def test_translate(vm: Rig, vcpu: Vcpu) -> None:
    sregs = vcpu.sregs()
    longmode.long_mode(sregs, vm.mem)
    vm.mem.write(sregs.cr3 + 8, struct.pack("<Q", 0xA000 | 3))  # the second 512 GiB go where the first do
    vcpu.set_sregs(sregs)

    assert vcpu.translate(0x12345) == 0x12345
    assert vcpu.translate((1 << 39) + 0x12345) == 0x12345
    assert vcpu.translate(1 << 40) is None


def test_single_step(vm: Rig) -> None:
    enable, single_step = 1 << 0, 1 << 1  # KVM_GUESTDBG_*
    vm.load("count")
    vm.vcpu.set_guest_debug(enable | single_step)

    stop = vm.run()

    assert "KVM_EXIT_DEBUG" in stop.detail
    assert vm.vcpu.regs().rip != LOAD


def test_clock(vm: Rig) -> None:
    vm.vm.set_clock(10**15)

    assert 10**15 <= vm.vm.clock() < 10**15 + SECONDS * 10**9


@pytest.mark.parametrize("chip", [0, 1], ids=["master", "slave"])
def test_pic(vm: Rig, chip: int) -> None:
    state = bytearray(vm.vm.irqchip(chip))
    state[8 + 2] = 0x5A  # struct kvm_irqchip: chip_id, pad; kvm_pic_state: last_irr, irr, imr

    vm.vm.set_irqchip(state)

    assert vm.vm.irqchip(chip) == state
    assert vm.vm.irqchip(1 - chip) != state


def test_ioapic(vm: Rig) -> None:
    entry = 0x10000 | 0x44  # masked, vector 0x44
    state = bytearray(vm.vm.irqchip(2))
    struct.pack_into("<Q", state, 8 + 24 + 8 * 7, entry)  # kvm_ioapic_state: redirtbl[7]

    vm.vm.set_irqchip(state)

    assert vm.vm.irqchip(2) == state


def test_pit(vm: Rig) -> None:
    state = bytearray(vm.vm.pit())
    struct.pack_into("<I8xBB", state, 24 * 2, 0x1234, 3, 3)  # channel 2, the speaker's: count, rw_mode, mode

    vm.vm.set_pit(state)

    assert struct.unpack_from("<I8xBB", vm.vm.pit(), 24 * 2) == (0x1234, 3, 3)


def test_pit_answers_the_speaker_port(vm: Rig) -> None:
    vm.perform(port_read(0x61, 1))

    assert [a for a in vm.board.log if a.address == 0x61] == []
    assert len(vm.reports) == 1


def test_enable_takes_effect(vm: Rig) -> None:
    vm.vm.enable("KVM_CAP_X2APIC_API", USE_32BIT_IDS)
    vm.add_vcpu()
    vcpu = vm.add_vcpu()
    sregs = vcpu.sregs()
    sregs.apic_base |= X2APIC_ENABLE
    vcpu.set_sregs(sregs)

    assert struct.unpack_from("<I", vcpu.lapic(), 0x20) == (1,)  # else 1 << 24


def test_capabilities(kvm: Kvm) -> None:
    assert kvm.check("KVM_CAP_NR_MEMSLOTS") >= 32
    assert kvm.check("KVM_CAP_MAX_VCPUS") >= 2


def test_a_usable_kvm_lacks_nothing(kvm: Kvm) -> None:
    kvm.require()


def test_run_area_covers_page_and_io_data(kvm: Kvm, vcpu: Vcpu) -> None:
    assert kvm.run_size() == len(vcpu.page) >= 2 * 4096
