"""The compiled shim: KVM's ioctls as functions, documented in Documentation/virt/kvm/api.rst of the kernel.

`lib.kvm_X(fd[, argument])` is ioctl KVM_X and returns its result or -errno; `argument` is a number or a pointer to
the ioctl's structure (`ffi.new("struct kvm_X *")`, or `ffi.from_buffer(bytes)` where it crosses as bytes).
Beside the ioctls:

    kvm_irq_line(fd, gsi, level)        KVM_IRQ_LINE without a structure to build
    kvmpy_prepare_kick(signal_number)   install a C handler that does nothing, so that the signal only ends KVM_RUN
    kvmpy_explain_bus_error(text, length, status)  have SIGBUS for memory that has gone write `text` and end the process
    kvmpy_syscall(number, a, b, c, d, e)  any system call, its result or -errno; for kvmpy.jail
    kvmpy_run(fd, cpu, answer)          KVM_RUN until an exit that no cell answers; kvm/fast.py says what it returns
    kvmpy_cell_add(cells, key, cell)    let `cell` (core/cell.py) answer accesses with this key; 0: no room
    kvmpy_stream_*                      the methods of core/outbox.py

`lib.KVM_*` are the constants of <linux/kvm.h>. Every call drops the GIL. Only kvmpy.kvm and
kvmpy.jail import this module.
"""

from typing import Any

class _Lib:
    KVM_EXIT_IO: int
    KVM_EXIT_MMIO: int
    KVM_EXIT_HLT: int
    KVM_EXIT_SHUTDOWN: int
    KVM_EXIT_FAIL_ENTRY: int
    KVM_EXIT_INTERNAL_ERROR: int
    KVM_EXIT_SYSTEM_EVENT: int
    KVM_EXIT_INTR: int
    KVM_EXIT_DEBUG: int
    KVM_MEM_LOG_DIRTY_PAGES: int
    KVM_PIT_SPEAKER_DUMMY: int
    KVM_IRQFD_FLAG_DEASSIGN: int
    KVM_IRQFD_FLAG_RESAMPLE: int
    KVM_IOEVENTFD_FLAG_DATAMATCH: int
    KVM_IOEVENTFD_FLAG_PIO: int
    KVM_IOEVENTFD_FLAG_DEASSIGN: int
    def kvm_create_vm(self, fd: int, argument: int) -> int: ...
    def kvm_run(self, fd: int) -> int: ...
    def kvm_irq_line(self, fd: int, gsi: int, level: int) -> int: ...
    def kvmpy_prepare_kick(self, signal_number: int) -> int: ...
    def kvmpy_explain_bus_error(self, text: bytes, length: int, status: int) -> int: ...
    def kvmpy_syscall(self, number: int, a: int, b: int, c: int, d: int, e: int) -> int: ...
    def kvmpy_run(self, fd: int, cpu: Any, answer: int) -> int: ...
    def __getattr__(self, name: str) -> Any: ...

class _FFI:
    NULL: Any
    def gc(self, cdata: Any, destructor: Any) -> Any: ...
    def new(self, ctype: str, init: Any = ...) -> Any: ...
    def from_buffer(self, buf: Any, require_writable: bool = ...) -> Any: ...
    def buffer(self, cdata: Any, size: int = ...) -> Any: ...
    def cast(self, ctype: str, value: Any) -> Any: ...
    def sizeof(self, ctype: str) -> int: ...
    def release(self, cdata: Any) -> None: ...

ffi: _FFI
lib: _Lib
