"""Owners of the KVM file descriptors: one class for each kind, one method for each ioctl.

Every method raises KvmError, which names the ioctl, its argument and errno. A descriptor belongs to the process
that opened it: never fork while one is open.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence

from .._kvm_ioctls import ffi, lib
from ..core.errors import HostError, KvmError
from ..core.typed import Any
from .state import CpuidEntry, DescriptorTable, Regs, Segment, Sregs

DEVICE = "/dev/kvm"
API_VERSION = 12  # the only one there is (KVM_GET_API_VERSION)
MAX_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES in arch/x86
MAX_MSRS = 1024
PIC_IMR = 10  # offset of imr in struct kvm_irqchip for a PIC: chip_id, pad, last_irr, irr, imr

# Without these no machine of ours can run; all are in every KVM since Linux 4.12.
REQUIRED = {
    "KVM_CAP_USER_MEMORY": "memory slots",
    "KVM_CAP_SET_TSS_ADDR": "the TSS address",
    "KVM_CAP_EXT_CPUID": "CPUID tables",
    "KVM_CAP_IRQCHIP": "the in-kernel interrupt controllers",
    "KVM_CAP_PIT2": "the in-kernel timer",
    "KVM_CAP_MP_STATE": "multiprocessor state",
    "KVM_CAP_IRQFD": "interrupts through eventfds",
    "KVM_CAP_IOEVENTFD": "doorbells through eventfds",
    "KVM_CAP_IMMEDIATE_EXIT": "leaving KVM_RUN without a race",
}

REMEDIES = {
    errno.ENOENT: "load the kvm_intel or kvm_amd module, or enable VT-x/AMD-V in the firmware (or nesting in the host)",
    errno.EACCES: "add yourself to the kvm group (sudo usermod -aG kvm $USER, then log in again)",
    errno.EPERM: "add yourself to the kvm group (sudo usermod -aG kvm $USER, then log in again)",
    errno.EBUSY: "another hypervisor holds the virtualisation hardware: stop it",
    errno.ENODEV: "the kvm module is loaded but has no hardware to use; see `kvmpy doctor`",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "the host is out of memory; use less with --mem, or stop other machines",
}
# Those are for opening the device and making a VM; of other ioctls, only these mean the same.
ALWAYS = (errno.EMFILE, errno.ENOMEM)


def checked(result: int, ioctl: str, argument: str = "") -> int:
    """The result of a shim call, or KvmError when it is -errno."""
    if result < 0:
        raise KvmError(ioctl, argument, -result, REMEDIES[-result] if -result in ALWAYS else "")
    return result


class Handle:
    """One KVM file descriptor, closed once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _call(self, function: str, *argument: Any, shown: object = "") -> int:
        result: int = getattr(lib, function)(self.fd, *argument)
        return result if result >= 0 else checked(result, function.upper(), str(shown))

    def _get(self, function: str, struct_name: str, seed: bytes = b"") -> bytes:
        """The structure that a KVM_GET_* ioctl fills in; `seed` is what its first bytes say beforehand."""
        size = ffi.sizeof(f"struct kvm_{struct_name}")
        buf = bytearray(size)
        buf[: len(seed)] = seed
        self._call(function, ffi.from_buffer(buf))
        return bytes(buf)

    def _set(self, function: str, data: bytes | bytearray, shown: object = "") -> int:
        return self._call(function, ffi.from_buffer(bytearray(data)), shown=shown)


class Kvm(Handle):
    """/dev/kvm: what this host can do, and the maker of VMs."""

    def __init__(self, path: str = DEVICE) -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            number = error.errno or 0
            raise KvmError("open", path, number, REMEDIES.get(number, "")) from None
        try:
            version = self._call("kvm_get_api_version")
        except KvmError as error:
            self.close()
            raise KvmError("KVM_GET_API_VERSION", path, error.errno, f"{path} is not the KVM device") from None
        if version != API_VERSION:
            self.close()
            raise KvmError("KVM_GET_API_VERSION", f"{path} says {version}", errno.ENOSYS, "use Linux 5.4 or later")

    def check(self, capability: str) -> int:
        """What KVM_CHECK_EXTENSION says of a capability, by its name; 0 when it is not there."""
        return self._call("kvm_check_extension", getattr(lib, capability), shown=capability)

    def require(self) -> None:
        """Raise KvmError when a capability that every machine needs is missing."""
        for capability, purpose in REQUIRED.items():
            if not self.check(capability):
                raise KvmError("KVM_CHECK_EXTENSION", capability, errno.ENOSYS, f"this host's KVM lacks {purpose}")

    def run_size(self) -> int:
        """Bytes of the page(s) that each vCPU shares with user space."""
        return self._call("kvm_get_vcpu_mmap_size")

    def supported_cpuid(self) -> list[CpuidEntry]:
        """The CPUID table that this host can give a guest."""
        return _get_cpuid(self, "kvm_get_supported_cpuid")

    def msr_indices(self) -> list[int]:
        """The MSRs that KVM_GET_MSRS can save."""
        buf = bytearray(4 + 4 * MAX_MSRS)
        struct.pack_into("<I", buf, 0, MAX_MSRS)
        self._call("kvm_get_msr_index_list", ffi.from_buffer(buf))
        (count,) = struct.unpack_from("<I", buf)
        return list(struct.unpack_from(f"<{count}I", buf, 4))

    def create_vm(self) -> Vm:
        # EINTR while the host's memory notifiers are busy is a request to try again (virt/kvm/kvm_main.c).
        for _ in range(100):
            fd = lib.kvm_create_vm(self.fd, 0)
            if fd != -errno.EINTR:
                break
        if fd < 0:
            raise KvmError("KVM_CREATE_VM", "", -fd, REMEDIES.get(-fd, ""))
        return Vm(fd, self)


class Vm(Handle):
    """A virtual machine: memory slots, interrupt controllers, eventfds."""

    def __init__(self, fd: int, kvm: Kvm) -> None:
        super().__init__(fd)
        self.kvm = kvm
        self._exports: list[Any] = []

    def close(self) -> None:
        super().close()
        for export in self._exports:
            ffi.release(export)
        self._exports = []

    def set_memory(self, slot: int, gpa: int, buf: memoryview, *, log_dirty: bool = False) -> None:
        """Memory slot `slot`: guest range [gpa, gpa+len(buf)) is the bytes of `buf`, which stay mapped until close."""
        export = ffi.from_buffer(buf, require_writable=True)
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot, region.flags = slot, lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region.guest_phys_addr, region.memory_size = gpa, len(buf)
        region.userspace_addr = int(ffi.cast("uintptr_t", export))
        self._call("kvm_set_user_memory_region", region, shown=f"slot {slot}, {len(buf):#x} bytes at {gpa:#x}")
        self._exports.append(export)

    def dirty_log(self, slot: int, size: int) -> bytes:
        """One bit for each 4 KiB page of the slot (`size` bytes) written since the last call."""
        bitmap = ffi.new("char[]", (size // 4096 + 63) // 64 * 8)
        log = ffi.new("struct kvm_dirty_log *")
        log.slot, log.dirty_bitmap = slot, bitmap
        self._call("kvm_get_dirty_log", log, shown=f"slot {slot}")
        return bytes(ffi.buffer(bitmap))

    def set_tss_addr(self, gpa: int) -> None:
        self._call("kvm_set_tss_addr", gpa, shown=f"{gpa:#x}")

    def set_identity_map_addr(self, gpa: int) -> None:
        self._call("kvm_set_identity_map_addr", ffi.new("uint64_t *", gpa), shown=f"{gpa:#x}")

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a local APIC for each vCPU, in the kernel; before the first vCPU."""
        self._call("kvm_create_irqchip")

    def mask_pics(self) -> None:
        """All inputs of both PICs off: a kernel on reduced ACPI does not know that they are there."""
        for chip in (0, 1):
            state = bytearray(self.irqchip(chip))
            state[PIC_IMR] = 0xFF
            self.set_irqchip(state)

    def create_pit(self) -> None:
        """The i8254 timer in the kernel, with port 0x61 answered there as well."""
        config = ffi.new("struct kvm_pit_config *")
        config.flags = lib.KVM_PIT_SPEAKER_DUMMY
        self._call("kvm_create_pit2", config)

    def enable(self, capability: str, *args: int) -> None:
        """KVM_ENABLE_CAP on the VM."""
        cap = ffi.new("struct kvm_enable_cap *")
        cap.cap = getattr(lib, capability)
        for index, value in enumerate(args):
            cap.args[index] = value
        self._call("kvm_enable_cap", cap, shown=capability)

    def irq_line(self, gsi: int, level: int) -> None:
        """Drive input `gsi` of the in-kernel interrupt controllers."""
        result = lib.kvm_irq_line(self.fd, gsi, level)
        if result < 0:
            checked(result, "KVM_IRQ_LINE", f"gsi {gsi}, level {level}")

    def irqfd(self, fd: int, gsi: int, *, resample: int = -1, remove: bool = False) -> None:
        """A write to eventfd `fd` raises `gsi`; with `resample` the line stays up until the guest's EOI, told there."""
        request = ffi.new("struct kvm_irqfd *")
        request.fd, request.gsi = fd, gsi
        if resample >= 0:
            request.flags |= lib.KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = resample
        if remove:
            request.flags |= lib.KVM_IRQFD_FLAG_DEASSIGN
        self._call("kvm_irqfd", request, shown=f"fd {fd}, gsi {gsi}")

    def ioeventfd(
        self, fd: int, address: int, size: int, *, match: int | None = None, pio: bool = False, remove: bool = False
    ) -> None:
        """A guest write of `size` bytes (0: any) to `address` signals eventfd `fd` without an exit to user space."""
        request = ffi.new("struct kvm_ioeventfd *")
        request.fd, request.addr, request.len = fd, address, size
        if match is not None:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            request.datamatch = match
        if pio:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if remove:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        self._call("kvm_ioeventfd", request, shown=f"fd {fd}, {'port' if pio else 'address'} {address:#x}")

    def set_routing(self, irqchip: Iterable[tuple[int, int, int]], msi: Iterable[tuple[int, int, int]] = ()) -> None:
        """The whole GSI routing table: (gsi, chip, pin) to controllers, (gsi, address, data) to messages."""
        entries = [struct.pack("<IIIIII24x", gsi, 1, 0, 0, chip, pin) for gsi, chip, pin in irqchip]
        entries += [
            struct.pack("<IIIIIII20x", gsi, 2, 0, 0, address & 0xFFFFFFFF, address >> 32, data)
            for gsi, address, data in msi
        ]
        self._set("kvm_set_gsi_routing", struct.pack("<II", len(entries), 0) + b"".join(entries))

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver a message-signalled interrupt; False when the guest blocks it."""
        msi = ffi.new("struct kvm_msi *")
        msi.address_lo, msi.address_hi, msi.data = address & 0xFFFFFFFF, address >> 32, data
        return self._call("kvm_signal_msi", msi, shown=f"{address:#x}, {data:#x}") > 0

    def coalesce(self, address: int, size: int, *, pio: bool = False, remove: bool = False) -> None:
        """Writes to [address, address+size) collect in a ring instead of leaving KVM_RUN one by one."""
        zone = ffi.new("struct kvm_coalesced_mmio_zone *")
        zone.addr, zone.size, zone.pio = address, size, int(pio)
        function = "kvm_unregister_coalesced_mmio" if remove else "kvm_register_coalesced_mmio"
        self._call(function, zone, shown=f"{address:#x}+{size:#x}")

    def clock(self) -> int:
        """The guest's kvmclock, in nanoseconds."""
        data = ffi.new("struct kvm_clock_data *")
        self._call("kvm_get_clock", data)
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        data = ffi.new("struct kvm_clock_data *")
        data.clock = nanoseconds
        self._call("kvm_set_clock", data, shown=nanoseconds)

    def irqchip(self, chip: int) -> bytes:
        """State of a controller (0 PIC master, 1 PIC slave, 2 IOAPIC), as struct kvm_irqchip."""
        return self._get("kvm_get_irqchip", "irqchip", struct.pack("<I", chip))

    def set_irqchip(self, state: bytes | bytearray) -> None:
        self._set("kvm_set_irqchip", state)

    def pit(self) -> bytes:
        """State of the timer, as struct kvm_pit_state2."""
        return self._get("kvm_get_pit2", "pit_state2")

    def set_pit(self, state: bytes) -> None:
        self._set("kvm_set_pit2", state)

    def create_vcpu(self, apic_id: int) -> Vcpu:
        fd = self._call("kvm_create_vcpu", apic_id, shown=f"vcpu {apic_id}")
        return Vcpu(fd, self, apic_id)


class Vcpu(Handle):
    """A virtual CPU: KVM_RUN and all of its state. `page` is the kvm_run area that it shares with KVM.

    Every method waits for KVM_RUN to return when another thread is in it.
    """

    def __init__(self, fd: int, vm: Vm, index: int) -> None:
        super().__init__(fd)
        self.index = index
        self.kvm = vm.kvm
        self.page = mmap.mmap(fd, vm.kvm.run_size())

    def close(self) -> None:
        if self.fd >= 0:
            self.page.close()
        super().close()

    def regs(self) -> Regs:
        raw = self._get("kvm_get_regs", "regs")
        return Regs(*struct.unpack("<18Q", raw))

    def set_regs(self, regs: Regs) -> None:
        self._set("kvm_set_regs", struct.pack("<18Q", *vars(regs).values()), shown=f"rip {regs.rip:#x}")

    def sregs(self) -> Sregs:
        return unpack_sregs(self._get("kvm_get_sregs", "sregs"))

    def set_sregs(self, sregs: Sregs) -> None:
        self._set("kvm_set_sregs", pack_sregs(sregs), shown=f"cr0 {sregs.cr0:#x}, efer {sregs.efer:#x}")

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """The CPUID table of this vCPU; before its first instruction, and before MSRs that depend on it."""
        data = struct.pack("<II", len(entries), 0)
        for e in entries:
            data += struct.pack("<IIIIIII12x", e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        self._set("kvm_set_cpuid2", data, shown=f"{len(entries)} entries")

    def cpuid(self) -> list[CpuidEntry]:
        return _get_cpuid(self, "kvm_get_cpuid2")

    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Values by index; an MSR that KVM refuses, and those behind it, are left out."""
        data = bytearray(struct.pack("<II", len(indices), 0))
        for index in indices:
            data += struct.pack("<IIQ", index, 0, 0)
        done = self._call("kvm_get_msrs", ffi.from_buffer(data))
        return {index: value for index, _, value in struct.iter_unpack("<IIQ", data[8 : 8 + 16 * done])}

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> None:
        """Write MSRs in order; raises KvmError that names the first one KVM refuses."""
        pairs = list(values)
        data = struct.pack("<II", len(pairs), 0)
        data += b"".join(struct.pack("<IIQ", index, 0, value) for index, value in pairs)
        done = self._set("kvm_set_msrs", data)
        if done < len(pairs):
            index, value = pairs[done]
            raise KvmError("KVM_SET_MSRS", f"msr {index:#x} = {value:#x}", errno.EINVAL)

    def fpu(self) -> bytes:
        """struct kvm_fpu."""
        return self._get("kvm_get_fpu", "fpu")

    def set_fpu(self, state: bytes) -> None:
        self._set("kvm_set_fpu", state)

    def xsave(self) -> bytes:
        """The XSAVE area: 4 KiB, or what KVM_CAP_XSAVE2 says where a guest can have larger state (AMX)."""
        size = self.kvm.check("KVM_CAP_XSAVE2")
        if size <= ffi.sizeof("struct kvm_xsave"):
            return self._get("kvm_get_xsave", "xsave")
        buf = bytearray(size)
        self._call("kvm_get_xsave2", ffi.from_buffer(buf))
        return bytes(buf)

    def set_xsave(self, state: bytes) -> None:
        self._set("kvm_set_xsave", state)

    def xcrs(self) -> bytes:
        """struct kvm_xcrs."""
        return self._get("kvm_get_xcrs", "xcrs")

    def set_xcrs(self, state: bytes) -> None:
        self._set("kvm_set_xcrs", state)

    def lapic(self) -> bytes:
        """struct kvm_lapic_state: the 1 KiB of the local APIC's registers."""
        return self._get("kvm_get_lapic", "lapic_state")

    def set_lapic(self, state: bytes) -> None:
        self._set("kvm_set_lapic", state)

    def events(self) -> bytes:
        """struct kvm_vcpu_events: pending exceptions, interrupts, NMIs."""
        return self._get("kvm_get_vcpu_events", "vcpu_events")

    def set_events(self, state: bytes) -> None:
        self._set("kvm_set_vcpu_events", state)

    def debugregs(self) -> bytes:
        """struct kvm_debugregs."""
        return self._get("kvm_get_debugregs", "debugregs")

    def set_debugregs(self, state: bytes) -> None:
        self._set("kvm_set_debugregs", state)

    def set_guest_debug(self, control: int, registers: Sequence[int] = (0,) * 8) -> None:
        """KVM_SET_GUEST_DEBUG: `control` is KVM_GUESTDBG_* flags, `registers` DR0-DR7."""
        self._set("kvm_set_guest_debug", struct.pack("<II8Q", control, 0, *registers), shown=f"{control:#x}")

    def mp_state(self) -> int:
        """KVM_MP_STATE_*: 0 runnable, 1 waits for INIT, 3 halted."""
        state = ffi.new("struct kvm_mp_state *")
        self._call("kvm_get_mp_state", state)
        return int(state.mp_state)

    def set_mp_state(self, value: int) -> None:
        state = ffi.new("struct kvm_mp_state *")
        state.mp_state = value
        self._call("kvm_set_mp_state", state, shown=value)

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; only for a VM without in-kernel controllers."""
        request = ffi.new("struct kvm_interrupt *")
        request.irq = vector
        self._call("kvm_interrupt", request, shown=f"vector {vector:#x}")

    def nmi(self) -> None:
        self._call("kvm_nmi")

    def translate(self, virtual: int) -> int | None:
        """The guest-physical address of a virtual one in this vCPU's page tables; None when it is not mapped."""
        request = ffi.new("struct kvm_translation *")
        request.linear_address = virtual
        self._call("kvm_translate", request, shown=f"{virtual:#x}")
        return int(request.physical_address) if request.valid else None

    def tsc_khz(self) -> int:
        return self._call("kvm_get_tsc_khz")

    def set_tsc_khz(self, khz: int) -> None:
        self._call("kvm_set_tsc_khz", khz, shown=khz)

    def runner(self) -> Callable[[int], int]:
        """The bare KVM_RUN for the run loop: called with `fd`, it gives 0 or -errno, and drops the GIL meanwhile."""
        return lib.kvm_run


def prepare_kick(signal_number: int) -> None:
    """Make `signal_number` interrupt KVM_RUN and nothing else, in the whole process."""
    checked(lib.kvmpy_prepare_kick(signal_number), "sigaction", f"signal {signal_number}")


def explain_bus_errors() -> None:
    """End this process with one line and the status of HostError where it touches memory that has gone: a mapped file
    that was truncated, RAM that the host has no room for. No exception can tell that."""
    what = "memory has gone: a kernel or initrd was truncated while it was read, or the host has no room for RAM"
    line = f"kvmpy: {HostError(what, 'start again, with files that nobody writes to')}\n".encode()
    checked(lib.kvmpy_explain_bus_error(line, len(line), HostError.status), "sigaction", "SIGBUS")


def address_of(area: mmap.mmap) -> int:
    """Where in this process a mapping is."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(area)))


def _get_cpuid(handle: Handle, function: str) -> list[CpuidEntry]:
    buf = bytearray(8 + 40 * MAX_CPUID_ENTRIES)
    struct.pack_into("<I", buf, 0, MAX_CPUID_ENTRIES)
    handle._call(function, ffi.from_buffer(buf))
    (count,) = struct.unpack_from("<I", buf)
    return [CpuidEntry(*struct.unpack_from("<7I", buf, 8 + 40 * index)) for index in range(count)]


SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_SEGMENT = struct.Struct("<QIH9Bx")  # struct kvm_segment
_TABLE = struct.Struct("<QH6x")  # struct kvm_dtable
_CONTROL = struct.Struct("<7Q4Q")  # cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap[4]


def pack_sregs(sregs: Sregs) -> bytes:
    """struct kvm_sregs."""
    data = b"".join(_SEGMENT.pack(*vars(getattr(sregs, name)).values()) for name in SEGMENTS)
    data += b"".join(_TABLE.pack(table.base, table.limit) for table in (sregs.gdt, sregs.idt))
    control = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer, sregs.apic_base)
    return data + _CONTROL.pack(*control, *sregs.interrupt_bitmap)


def unpack_sregs(data: bytes) -> Sregs:
    """The inverse of pack_sregs."""
    sregs, at = Sregs(), 0
    for name in SEGMENTS:
        setattr(sregs, name, Segment(*_SEGMENT.unpack_from(data, at)))
        at += _SEGMENT.size
    for name in ("gdt", "idt"):
        setattr(sregs, name, DescriptorTable(*_TABLE.unpack_from(data, at)))
        at += _TABLE.size
    values = _CONTROL.unpack_from(data, at)
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer, sregs.apic_base = values[:7]
    sregs.interrupt_bitmap = tuple(values[7:])
    return sregs
