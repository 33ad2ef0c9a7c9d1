"""What a machine stands on: KVM, a VM with its controllers, and RAM; made while other modules still load.

KVM makes whoever adds a timer or a memory slot wait until all processors have seen that: 7 ms in which nobody works.
"""

from __future__ import annotations

import os
import threading

from .config import MachineConfig
from .core.errors import ConfigError, HostError, KvmpyError
from .core.memory import GuestMemory
from .kvm.handle import Kvm, Vm, address_of
from .x86 import cpuid, layout


class Foundation:
    """KVM, a VM and RAM for `config`. They are there from the beginning; when `await_it` has returned, the guest sees
    its RAM and has all controllers."""

    kvm: Kvm
    memory: GuestMemory
    vm: Vm

    def __init__(self, config: MachineConfig) -> None:
        """Begin; nothing is raised before `begun` and `await_it`."""
        self._config = config
        self._error: KvmpyError | None = None
        self._thread: threading.Thread | None = None
        try:
            self._begin()
        except KvmpyError as error:
            self._error = error
            return
        thread = threading.Thread(target=self._finish, name="kvmpy-foundation", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the host has none for it: somebody will tell, who cannot do without
            self._finish()
        else:
            self._thread = thread

    def begun(self) -> tuple[Kvm, GuestMemory, Vm]:
        """What others may build upon; raises ConfigError, HostError or KvmError if it could not be had."""
        if self._thread is None:
            self.await_it()
        return self.kvm, self.memory, self.vm

    def await_it(self) -> None:
        """Raises ConfigError, HostError or KvmError for what went wrong since the beginning."""
        self._join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Give all of it back; safe to call twice."""
        self._join()
        for part in ("vm", "memory", "kvm"):
            if hasattr(self, part):
                getattr(self, part).close()

    def _begin(self) -> None:
        self.kvm = Kvm()
        self.kvm.require()
        cpus, size = self._config.cpus, self._config.mem
        cpuid.check_cpus(cpus)
        limit = cpu_limit(self.kvm)
        if cpus > limit:
            raise ConfigError(f"{cpus} CPUs are more than this host's KVM takes", f"use --cpus {limit} or less")
        _check_memory(size)
        self.memory = GuestMemory.allocate(layout.ram(size), address_of=address_of)
        self.vm = self.kvm.create_vm()
        self.vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        self.vm.set_tss_addr(layout.KVM_TSS)
        self.vm.create_irqchip()
        self.vm.mask_pics()

    def _finish(self) -> None:
        try:
            self.vm.create_pit()
            for slot, region in enumerate(self.memory.regions):
                self.vm.set_memory(slot, region.gpa, region.buf)
        except KvmpyError as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def cpu_limit(kvm: Kvm) -> int:
    """How many vCPUs a machine can have on this host."""
    return min(kvm.check("KVM_CAP_MAX_VCPUS"), kvm.check("KVM_CAP_MAX_VCPU_ID"))


def _check_memory(size: int) -> None:
    """Refuse RAM that the host cannot have: the kernel's OOM killer gives no error message."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > host:
        raise HostError(
            f"{size >> 20} MiB of memory are more than the {host >> 20} MiB of this host", "use less with --mem"
        )
