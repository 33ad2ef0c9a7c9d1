"""A KVM call that fails raises KvmError: the ioctl, its argument, errno, and a remedy only where there is one."""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig import LOAD, RAM, Rig

from kvmpy.core.board import Reason, Stop
from kvmpy.core.errors import KvmError
from kvmpy.kvm.handle import REQUIRED, Kvm
from kvmpy.kvm.state import CpuidEntry, Sregs
from kvmpy.x86 import layout, msr

PAGE = layout.PAGE
NOBODY = 65534


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """The process has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_device(tmp_path: Path) -> None:
    path = tmp_path / "kvm"

    with pytest.raises(KvmError) as raised:
        Kvm(str(path))

    assert (raised.value.ioctl, raised.value.argument, raised.value.errno) == ("open", str(path), errno.ENOENT)
    assert re.fullmatch(
        rf"open\({path}\): No such file or directory; load the kvm_intel or kvm_amd .*", str(raised.value)
    )


@pytest.mark.parametrize("path", ["/dev/null", __file__])
def test_not_a_kvm_device(path: str) -> None:
    before = open_descriptors()

    with pytest.raises(KvmError, match=f"^KVM_GET_API_VERSION.*{path} is not the KVM device$") as raised:
        Kvm(path)

    assert raised.value.errno == errno.ENOTTY
    assert open_descriptors() == before


def test_no_permission(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    program = f"""if True:
        import os
        from kvmpy.core.errors import KvmError
        from kvmpy.kvm.handle import Kvm
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
        else:
            os.chmod({str(device)!r}, 0)
        try:
            Kvm({str(device)!r})
        except KvmError as error:
            print(error)
    """

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert re.fullmatch(rf"open\({device}\): Permission denied; add yourself to the kvm group .*\n", result.stdout)


def test_a_missing_capability_is_named(kvm: Kvm) -> None:
    class Lesser(Kvm):
        def check(self, capability: str) -> int:
            return 0 if capability == "KVM_CAP_IRQFD" else super().check(capability)

    lesser = Lesser()
    with pytest.raises(KvmError, match=r"^KVM_CHECK_EXTENSION\(KVM_CAP_IRQFD\): .*lacks interrupts through eventfds$"):
        lesser.require()
    lesser.close()


def test_required_capabilities_exist(kvm: Kvm) -> None:
    assert [name for name in REQUIRED if not kvm.check(name)] == []


def test_out_of_descriptors(kvm: Kvm) -> None:
    with no_more_descriptors(), pytest.raises(KvmError) as on_open:
        Kvm()
    with no_more_descriptors(), pytest.raises(KvmError) as on_create:
        kvm.create_vm()

    assert (on_open.value.errno, on_create.value.errno) == (errno.EMFILE, errno.EMFILE)
    assert str(on_create.value) == "KVM_CREATE_VM(): Too many open files; raise the limit of open files (ulimit -n)"


def test_closed_handle(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vm.close()
    vm.close()

    with pytest.raises(KvmError) as raised:
        vm.create_irqchip()

    assert (raised.value.ioctl, raised.value.errno) == ("KVM_CREATE_IRQCHIP", errno.EBADF)


def test_overlapping_slots(vm: Rig) -> None:
    with pytest.raises(KvmError) as raised:
        vm.vm.set_memory(5, RAM - PAGE, memoryview(mmap.mmap(-1, 2 * PAGE)))

    assert raised.value.errno == errno.EEXIST
    assert str(raised.value) == f"KVM_SET_USER_MEMORY_REGION(slot 5, 0x2000 bytes at {RAM - PAGE:#x}): File exists"


def test_unaligned_slot(vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_SET_USER_MEMORY_REGION\(slot 1, 0x1000 bytes at 0x10000001\): Invalid"):
        vm.vm.set_memory(1, 0x10000001, memoryview(mmap.mmap(-1, PAGE)))


def test_failed_slot_leaves_the_memory_free(vm: Rig) -> None:
    buf = bytearray(PAGE)

    with pytest.raises(KvmError):
        vm.vm.set_memory(1, 0x10000001, memoryview(buf))

    buf.clear()  # BufferError if the failed call still held it


def test_dirty_log_of_a_slot_that_is_not_there(vm: Rig) -> None:
    with pytest.raises(KvmError) as raised:
        vm.vm.dirty_log(7, RAM)

    assert str(raised.value) == "KVM_GET_DIRTY_LOG(slot 7): No such file or directory"


def test_same_vcpu_twice(vm: Rig) -> None:
    vm.add_vcpu()

    with pytest.raises(KvmError, match=r"^KVM_CREATE_VCPU\(vcpu 0\): File exists$"):
        vm.vm.create_vcpu(0)


def test_vcpu_beyond_the_limit(kvm: Kvm, vm: Rig) -> None:
    limit = kvm.check("KVM_CAP_MAX_VCPU_ID")

    with pytest.raises(KvmError, match=rf"^KVM_CREATE_VCPU\(vcpu {limit}\): Invalid argument$"):
        vm.vm.create_vcpu(limit)


def test_irqchip_twice(vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_CREATE_IRQCHIP\(\): File exists$"):
        vm.vm.create_irqchip()


def test_pit_that_is_not_there(bare_vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_GET_PIT2\(\): No such device or address$"):
        bare_vm.vm.pit()


def test_irq_line_without_irqchip(bare_vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_IRQ_LINE\(gsi 5, level 1\): "):
        bare_vm.vm.irq_line(5, 1)


def test_lapic_without_irqchip(bare_vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_GET_LAPIC\(\): Invalid argument$"):
        bare_vm.add_vcpu().lapic()


def test_refused_msr_is_named_and_those_before_it_are_set(vm: Rig) -> None:
    vcpu = vm.add_vcpu()
    unknown = 0xDEAD0000

    with pytest.raises(KvmError, match=r"^KVM_SET_MSRS\(msr 0xdead0000 = 0x2\): Invalid argument$"):
        vcpu.set_msrs([(msr.IA32_LSTAR, 0x1234), (unknown, 2), (msr.IA32_CSTAR, 1)])

    assert vcpu.msrs([msr.IA32_LSTAR, msr.IA32_CSTAR]) == {msr.IA32_LSTAR: 0x1234, msr.IA32_CSTAR: 0}


def test_impossible_sregs(vm: Rig) -> None:
    paging_without_protection = Sregs(cr0=0x80000000)

    with pytest.raises(KvmError, match=r"^KVM_SET_SREGS\(cr0 0x80000000, efer 0x0\): Invalid argument$"):
        vm.add_vcpu().set_sregs(paging_without_protection)


def test_too_many_cpuid_entries(vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_SET_CPUID2\(1000 entries\): Argument list too long$"):
        vm.add_vcpu().set_cpuid([CpuidEntry(n) for n in range(1000)])


def test_irqfd_that_is_no_eventfd(vm: Rig) -> None:
    with Path("/dev/null").open() as file, pytest.raises(KvmError) as raised:
        vm.vm.irqfd(file.fileno(), 5)

    assert raised.value.ioctl == "KVM_IRQFD"
    assert raised.value.argument.endswith("gsi 5")


def test_doorbell_twice(vm: Rig) -> None:
    fd = os.eventfd(0)
    vm.vm.ioeventfd(fd, 0x500, 2, pio=True)

    with pytest.raises(KvmError, match=rf"^KVM_IOEVENTFD\(fd {fd}, port 0x500\): File exists$"):
        vm.vm.ioeventfd(fd, 0x500, 2, pio=True)
    os.close(fd)


def test_doorbell_that_is_not_there(vm: Rig) -> None:
    fd = os.eventfd(0)

    with pytest.raises(KvmError) as raised:
        vm.vm.ioeventfd(fd, 0xD0000000, 4, remove=True)

    assert str(raised.value) == f"KVM_IOEVENTFD(fd {fd}, address 0xd0000000): No such file or directory"
    os.close(fd)


def test_unknown_mp_state(vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_SET_MP_STATE\(99\): Invalid argument$"):
        vm.add_vcpu().set_mp_state(99)


def test_bad_capability_argument(vm: Rig) -> None:
    with pytest.raises(KvmError, match=r"^KVM_ENABLE_CAP\(KVM_CAP_X2APIC_API\): Invalid argument$"):
        vm.vm.enable("KVM_CAP_X2APIC_API", 0xFF00)


def test_a_vm_that_has_ended_leaves_no_descriptor() -> None:
    before = open_descriptors()

    vm = Rig()
    stop = vm.run("modes", cpus=3)
    vm.close()

    assert stop == Stop(Reason.EXIT)
    assert open_descriptors() == before


def test_failed_vcpu_leaves_no_descriptor(vm: Rig) -> None:
    before = open_descriptors()

    with no_more_descriptors(), pytest.raises(KvmError):
        vm.vm.create_vcpu(0)

    assert open_descriptors() == before


def test_descriptors_are_not_inherited(vm: Rig) -> None:
    vcpu = vm.add_vcpu()

    assert [os.get_inheritable(handle.fd) for handle in (vm.kvm, vm.vm, vcpu)] == [False] * 3


def test_run_without_registers_set_stops_the_machine(bare_vm: Rig) -> None:
    """The reset vector is in no memory slot: KVM reports what it could not fetch, once."""
    bare_vm.mem.write(LOAD, b"\xf4")
    bare_vm.add_vcpu()

    stop = bare_vm.run()

    assert stop.reason in (Reason.CRASH, Reason.TRIPLE_FAULT)
