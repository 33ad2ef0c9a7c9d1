"""Whether this host's KVM runs kernels, as a guest of one instruction finds out."""

from __future__ import annotations

import os

import pytest
from rig import emulates_kernel_code

from kvmpy.core.errors import KvmError
from kvmpy.kvm.handle import Kvm
from kvmpy.kvm.probe import runs_ring0_natively


def test_the_probe_agrees_with_the_processor(kvm: Kvm) -> None:
    assert runs_ring0_natively(kvm) is not emulates_kernel_code()


def test_the_probe_leaves_nothing_open(kvm: Kvm) -> None:
    runs_ring0_natively(kvm)
    before = os.listdir("/proc/self/fd")

    for _ in range(5):
        runs_ring0_natively(kvm)

    assert os.listdir("/proc/self/fd") == before


def test_the_probe_says_when_no_vm_can_be_made(kvm: Kvm) -> None:
    kvm.close()

    with pytest.raises(KvmError) as caught:
        runs_ring0_natively(kvm)

    assert caught.value.ioctl == "KVM_CREATE_VM"
