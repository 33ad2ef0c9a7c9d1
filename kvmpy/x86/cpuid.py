"""What CPUID answers on each vCPU: what KVM supports, with this machine's topology, APIC ids and clock rates.

One package of `cpus` cores without hyper-threads, APIC ids from 0 on. Taken away from what KVM offers:
- performance monitoring: a guest with counters keeps one running on every CPU for its NMI watchdog, each re-arming
  of which is an exit, and the counters are no part of a saved machine;
- MONITOR/MWAIT, which KVM would only treat as no-operations;
- memory encryption (0x8000001F): a kernel that sees it reads an MSR that only encrypted guests have.

Leaves: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; KVM's own: Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ..core.errors import ConfigError
from ..core.record import replace
from ..kvm.state import CpuidEntry

# APIC ids 0 to 254. x2APIC ids go further, but the redirection entries of KVM's IOAPIC, like plain MSI addresses, hold
# eight bits, and Linux starts no CPU that interrupts cannot reach. KVM_FEATURE_MSI_EXT_DEST_ID (0x40000001 EAX bit 15)
# would promise 15 bits in both; only an IOAPIC in user space (KVM_CAP_SPLIT_IRQCHIP) can keep that promise.
MAX_CPUS = 255

APIC_BUS_KHZ = 1_000_000  # KVM's APIC timer counts nanoseconds (KVM_CAP_X86_APIC_BUS_CYCLES_NS, default)

INDEXED = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

INTEL = b"GenuineIntel"
AMD = (b"AuthenticAMD", b"HygonGenuine")

# Leaf 1.
ECX_DTES64, ECX_MONITOR, ECX_PDCM = 1 << 2, 1 << 3, 1 << 15
ECX_TSC_DEADLINE, ECX_HYPERVISOR = 1 << 24, 1 << 31
EDX_DS, EDX_HTT = 1 << 21, 1 << 28
# Leaf 7, subleaf 1.
EAX_ARCH_PERFMON_EXT = 1 << 8
# Leaf 0x80000001.
ECX_CMP_LEGACY, ECX_PERFCTR_CORE, ECX_PERFCTR_NB = 1 << 1, 1 << 23, 1 << 24
ECX_PERFCTR_LLC = 1 << 28

# Leaves that describe the host's topology, and leaves of what is taken away: without an entry, CPUID answers zeros.
HOST_TOPOLOGY = (0xB, 0x1F, 0x8000001E, 0x80000026)
TAKEN = (0x5, 0xA, 0x23, 0x8000001F, 0x80000022)

LEVEL_THREAD, LEVEL_CORE = 1 << 8, 2 << 8  # leaf 0xB, ECX
PRIVATE_CACHES = 2  # levels 1 and 2 belong to one core; what comes behind them is everyone's


def check_cpus(cpus: int) -> None:
    """Raise ConfigError unless a guest can have that many CPUs."""
    if cpus < 1:
        raise ConfigError(f"{cpus} CPUs", "give at least 1 with --cpus")
    if cpus > MAX_CPUS:
        raise ConfigError(
            f"{cpus} CPUs: interrupts of the in-kernel IOAPIC reach no more than {MAX_CPUS}",
            f"give at most {MAX_CPUS} with --cpus",
        )


def for_vcpu(
    supported: Sequence[CpuidEntry], apic_id: int, cpus: int, *, tsc_khz: int | None, tsc_deadline: bool
) -> list[CpuidEntry]:
    """The table for KVM_SET_CPUID2 of the vCPU with `apic_id`, one of `cpus` with ids from 0 on.

    `supported` is KVM_GET_SUPPORTED_CPUID, left as it is; `tsc_khz` KVM_GET_TSC_KHZ, None where KVM cannot tell;
    `tsc_deadline` KVM_CAP_TSC_DEADLINE_TIMER, which not every KVM puts into the table (it needs the in-kernel APIC).
    """
    table = Table(supported)
    width = (cpus - 1).bit_length()  # bits of the APIC id that tell cores apart
    table.drop(*HOST_TOPOLOGY, *TAKEN)
    _features(table, apic_id, cpus, tsc_deadline)
    _caches(table, width)
    for leaf in (0xB, 0x1F):
        if leaf <= table.last:
            _levels(table, leaf, apic_id, cpus, width)
    if table.vendor in AMD:
        _amd(table, apic_id, cpus, width)
    if tsc_khz:
        _clocks(table, tsc_khz)
    return list(table.entries.values())


class Table:
    """Copies of CPUID entries by (leaf, subleaf)."""

    def __init__(self, entries: Sequence[CpuidEntry]) -> None:
        self.entries = {(entry.function, entry.index): replace(entry) for entry in entries}
        zero = self.entries.get((0, 0), CpuidEntry(0))
        self.last = zero.eax  # highest basic leaf
        self.vendor = b"".join(part.to_bytes(4, "little") for part in (zero.ebx, zero.edx, zero.ecx))
        self.last_extended = self.entries.get((0x80000000, 0), CpuidEntry(0)).eax

    def of(self, leaf: int) -> list[CpuidEntry]:
        """All subleaves that are there."""
        return [entry for entry in self.entries.values() if entry.function == leaf]

    def put(self, entry: CpuidEntry) -> None:
        self.entries[entry.function, entry.index] = entry

    def drop(self, *leaves: int) -> None:
        self.entries = {key: entry for key, entry in self.entries.items() if entry.function not in leaves}


def _features(table: Table, apic_id: int, cpus: int, tsc_deadline: bool) -> None:
    for entry in table.of(1):
        # Bits 23-16: logical CPUs of the package; 31-24: initial APIC id. Leaf 0xB has all bits of both.
        entry.ebx = entry.ebx & 0xFFFF | min(cpus, 255) << 16 | (apic_id & 0xFF) << 24
        entry.ecx &= ~(ECX_DTES64 | ECX_MONITOR | ECX_PDCM | ECX_TSC_DEADLINE)
        entry.ecx |= ECX_HYPERVISOR | (ECX_TSC_DEADLINE if tsc_deadline else 0)
        entry.edx &= ~(EDX_DS | EDX_HTT)
        entry.edx |= EDX_HTT if cpus > 1 else 0
    for entry in table.of(7):
        if entry.index == 1:
            entry.eax &= ~EAX_ARCH_PERFMON_EXT


def _caches(table: Table, width: int) -> None:
    """Leaves 4 (Intel) and 0x8000001D (AMD): how many APIC ids share each cache, and (Intel) the package."""
    for entry in table.of(4) + table.of(0x8000001D):
        if entry.eax & 0x1F == 0:  # no more caches
            continue
        level = entry.eax >> 5 & 7
        sharing = 0 if level <= PRIVATE_CACHES else (1 << width) - 1
        entry.eax = entry.eax & 0x3FFF | min(sharing, 0xFFF) << 14
        if entry.function == 4:
            entry.eax |= min((1 << width) - 1, 0x3F) << 26


def _levels(table: Table, leaf: int, apic_id: int, cpus: int, width: int) -> None:
    """Extended topology: one thread a core, all cores in one package."""
    table.put(CpuidEntry(leaf, 0, INDEXED, eax=0, ebx=1, ecx=LEVEL_THREAD | 0, edx=apic_id))
    table.put(CpuidEntry(leaf, 1, INDEXED, eax=width, ebx=cpus, ecx=LEVEL_CORE | 1, edx=apic_id))
    table.put(CpuidEntry(leaf, 2, INDEXED, ecx=2, edx=apic_id))


def _amd(table: Table, apic_id: int, cpus: int, width: int) -> None:
    for entry in table.of(0x80000001):
        entry.ecx &= ~(ECX_CMP_LEGACY | ECX_PERFCTR_CORE | ECX_PERFCTR_NB | ECX_PERFCTR_LLC)
        entry.ecx |= ECX_CMP_LEGACY if cpus > 1 else 0
    for entry in table.of(0x80000008):
        entry.ecx = min(cpus - 1, 0xFF) | width << 12  # cores, and their bits in the APIC id
    if table.last_extended >= 0x8000001E:
        table.put(CpuidEntry(0x8000001E, eax=apic_id, ebx=apic_id & 0xFF))  # core id; one thread a core, one node


def _clocks(table: Table, tsc_khz: int) -> None:
    """Clock rates, so that nobody measures them; Linux on KVM takes kvmclock's word first."""
    if table.vendor == INTEL and table.last >= 0x16:
        numerator, denominator = _tsc_ratio(tsc_khz)
        # "Crystal" is what the APIC timer counts: Linux takes it for that.
        table.put(CpuidEntry(0x15, eax=denominator, ebx=numerator, ecx=APIC_BUS_KHZ * 1000))
        mhz = round(tsc_khz / 1000)
        table.put(CpuidEntry(0x16, eax=mhz, ebx=mhz, ecx=100))  # base, maximum and bus frequency
    for entry in table.of(0x40000000):
        entry.eax = max(entry.eax, 0x40000010)
        table.put(CpuidEntry(0x40000010, eax=tsc_khz, ebx=APIC_BUS_KHZ))  # the timing leaf that VMware began


@cache
def _tsc_ratio(tsc_khz: int) -> tuple[int, int]:
    """(numerator, denominator) of TSC to APIC bus for leaf 0x15, to 120 ppm at worst and mostly better than 1 ppm.

    Linux multiplies the crystal's kHz by the numerator in 32 bits (native_calibrate_tsc), which bounds it.
    """

    def denominator(numerator: int) -> int:
        return max(1, round(numerator * APIC_BUS_KHZ / tsc_khz))

    numerators = range(1, 0xFFFFFFFF // APIC_BUS_KHZ + 1)
    best = min(numerators, key=lambda n: abs(n * APIC_BUS_KHZ / denominator(n) - tsc_khz))
    return best, denominator(best)
