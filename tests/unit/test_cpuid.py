"""CPUID tables, read as Linux reads them: the same topology from every leaf that tells one."""

from __future__ import annotations

import pytest

from kvmpy.core.errors import ConfigError
from kvmpy.kvm.state import CpuidEntry
from kvmpy.x86 import cpuid

# KVM_GET_SUPPORTED_CPUID: leaf, index, flags, EAX, EBX, ECX, EDX; the leaves that matter here. Both tell of their
# host's topology, as KVM did before Linux 6.2, and have performance counters.
INTEL = """\
00000000 0 0  00000016 756e6547 6c65746e 49656e69
00000001 0 0  00050657 2a400800 f6fab20f 1fabfbff
00000004 0 1  7c004121 01c0003f 0000003f 00000000
00000004 1 1  7c004122 01c0003f 0000003f 00000000
00000004 2 1  7c004143 03c0003f 000003ff 00000000
00000004 3 1  7c07c163 0280003f 0000afff 00000004
00000004 4 1  00000000 00000000 00000000 00000000
00000005 0 0  00000040 00000040 00000003 00002020
00000006 0 0  00000004 00000000 00000000 00000000
00000007 0 1  00000001 d19f27eb 00000808 ac000400
00000007 1 1  00001d30 00000000 00000000 00000000
0000000a 0 0  08300402 00000000 00000000 00000603
0000000b 0 1  00000001 00000002 00000100 0000002a
0000000b 1 1  00000006 00000020 00000201 0000002a
0000000d 0 1  000002e7 00000a88 00000a88 00000000
00000015 0 0  00000000 00000000 00000000 00000000
00000016 0 0  00000000 00000000 00000000 00000000
80000000 0 0  80000008 00000000 00000000 00000000
80000001 0 0  00000000 00000000 00000121 2c100800
80000008 0 0  0000302e 00000000 00000000 00000000
40000000 0 0  40000001 4b4d564b 564b4d56 0000004d
40000001 0 0  01007efb 00000000 00000000 00000000
"""
AMD = """\
00000000 0 0  00000010 68747541 444d4163 69746e65
00000001 0 0  00830f10 2a400800 fef8320b 178bfbff
00000005 0 0  00000040 00000040 00000003 00000011
00000007 0 1  00000000 219c91a9 00400004 00000000
0000000b 0 1  00000001 00000002 00000100 0000002a
0000000b 1 1  00000007 00000040 00000201 0000002a
0000000d 0 1  00000207 00000340 00000380 00000000
80000000 0 0  80000026 68747541 444d4163 69746e65
80000001 0 0  00830f10 40000000 75c237ff 2fd3fbff
80000007 0 0  00000000 00000000 00000000 00000100
80000008 0 0  00003030 111ed205 0000703f 00000000
8000001d 0 1  00004121 01c0003f 0000003f 00000000
8000001d 1 1  00004122 01c0003f 0000003f 00000000
8000001d 2 1  00004143 01c0003f 000003ff 00000002
8000001d 3 1  0001c163 03c0003f 00003fff 00000001
8000001d 4 1  00000000 00000000 00000000 00000000
8000001e 0 0  0000002a 00000115 00000300 00000000
8000001f 0 0  0001000f 0000016f 000001fd 00000001
80000022 0 0  00000001 00004006 00000000 00000000
80000026 0 1  00010001 00000002 00000100 0000002a
80000026 1 1  00000003 00000008 00000201 0000002a
40000000 0 0  40000001 4b4d564b 564b4d56 0000004d
40000001 0 0  01007efb 00000000 00000000 00000000
"""

Regs = tuple[int, int, int, int]
SIZES = [1, 2, 3, 4, 5, 8, 16, 63, 64, 65, 128, 255]


def parse(dump: str) -> list[CpuidEntry]:
    rows = [line.split() for line in dump.splitlines()]
    return [
        CpuidEntry(int(row[0], 16), int(row[1]), int(row[2]), *(int(value, 16) for value in row[3:])) for row in rows
    ]


class Cpu:
    """A vCPU that executes CPUID from its table, zeros for what is not there."""

    def __init__(
        self, dump: str, apic_id: int, cpus: int, tsc_khz: int | None = 2599998, deadline: bool = True
    ) -> None:
        table = cpuid.for_vcpu(parse(dump), apic_id, cpus, tsc_khz=tsc_khz, tsc_deadline=deadline)
        self.leaves = {(entry.function, entry.index): entry for entry in table}
        assert len(self.leaves) == len(table)

    def __call__(self, leaf: int, index: int = 0) -> Regs:
        entry = self.leaves.get((leaf, index), CpuidEntry(leaf))
        return entry.eax, entry.ebx, entry.ecx, entry.edx


def order(count: int) -> int:
    """get_count_order: bits that number `count` things."""
    return (count - 1).bit_length()


def levels(cpu: Cpu, leaf: int) -> list[tuple[int, int, int, int]]:
    """(type, shift, CPUs, x2APIC id) of each level of an extended topology leaf."""
    found = []
    for index in range(8):
        eax, ebx, ecx, edx = cpu(leaf, index)
        if not ebx & 0xFFFF or not ecx >> 8 & 0xFF:
            break
        found.append((ecx >> 8 & 0xFF, eax & 0x1F, ebx & 0xFFFF, edx))
    return found


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
@pytest.mark.parametrize("cpus", SIZES)
def test_extended_topology_is_one_package_of_single_threaded_cores(dump: str, cpus: int) -> None:
    seen = [levels(Cpu(dump, apic_id, cpus), 0xB) for apic_id in range(cpus)]

    assert seen == [[(1, 0, 1, apic_id), (2, order(cpus), cpus, apic_id)] for apic_id in range(cpus)]
    assert {apic_id >> order(cpus) for apic_id in range(cpus)} == {0}


def test_leaf_1f_is_there_only_where_the_processor_has_it() -> None:
    newer = INTEL.replace("00000000 0 0  00000016", "00000000 0 0  0000001f")

    assert levels(Cpu(newer, 3, 4), 0x1F) == levels(Cpu(newer, 3, 4), 0xB) != []
    assert levels(Cpu(INTEL, 3, 4), 0x1F) == []


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
@pytest.mark.parametrize("cpus", SIZES)
def test_leaf_1_agrees_with_the_topology(dump: str, cpus: int) -> None:
    _, ebx, _, edx = Cpu(dump, cpus - 1, cpus)(1)

    assert ebx >> 24 == cpus - 1
    assert order(ebx >> 16 & 0xFF) == order(cpus)
    assert bool(edx & 1 << 28) == (cpus > 1)
    assert ebx & 0xFFFF == 0x0800  # CLFLUSH size and brand as they were


@pytest.mark.parametrize("cpus", [size for size in SIZES if size <= 64])
def test_intel_package_without_extended_topology_is_the_same(cpus: int) -> None:
    """Linux, parse_legacy(): threads a core = leaf 1's logical CPUs / leaf 4's cores, which must not be more."""
    cpu = Cpu(INTEL, 0, cpus)

    cores = order((cpu(4)[0] >> 26) + 1)

    assert cores == order(cpu(1)[1] >> 16 & 0xFF) == order(cpus)


@pytest.mark.parametrize(("dump", "leaf"), [(INTEL, 4), (AMD, 0x8000001D)], ids=["intel", "amd"])
@pytest.mark.parametrize("cpus", SIZES)
def test_first_caches_are_private_and_the_last_is_everyones(dump: str, leaf: int, cpus: int) -> None:
    cpu = Cpu(dump, 0, cpus)

    sharing = [order((cpu(leaf, index)[0] >> 14 & 0xFFF) + 1) for index in range(4)]

    assert sharing == [0, 0, 0, order(cpus)]
    assert [cpu(leaf, index)[0] & 0x3FFF for index in range(5)] == [0x121, 0x122, 0x143, 0x163, 0]


@pytest.mark.parametrize("cpus", SIZES)
def test_amd_core_count_and_ids_agree_with_the_topology(cpus: int) -> None:
    cpu = Cpu(AMD, cpus - 1, cpus)

    cores, legacy, extended = cpu(0x80000008)[2], cpu(0x80000001)[2], cpu(0x8000001E)

    assert (cores & 0xFF) + 1 == cpus
    assert cores >> 12 & 0xF == order(cpus)
    assert bool(legacy & 1 << 1) == (cpus > 1)
    assert extended == (cpus - 1, cpus - 1, 0, 0)  # APIC id; core id and one thread; one node


def test_amd_topology_of_the_host_is_gone() -> None:
    assert levels(Cpu(AMD, 1, 2), 0x80000026) == []


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
def test_x2apic_id_keeps_all_its_bits(dump: str) -> None:
    cpu = Cpu(dump, 299, 300)

    assert cpu(0xB, 1)[3] == 299
    assert cpu(1)[1] >> 16 == (299 & 0xFF) << 8 | 255


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
def test_performance_counters_mwait_and_encryption_are_hidden(dump: str) -> None:
    cpu = Cpu(dump, 0, 1)

    hidden = [cpu(leaf) for leaf in (5, 0xA, 0x23, 0x8000001F, 0x80000022)]

    assert hidden == [(0, 0, 0, 0)] * 5
    assert cpu(1)[2] & (1 << 2 | 1 << 3 | 1 << 15) == 0
    assert cpu(1)[3] & 1 << 21 == 0
    assert cpu(7, 1)[0] & 1 << 8 == 0
    assert cpu(0x80000001)[2] & (1 << 23 | 1 << 24 | 1 << 28) == 0


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
@pytest.mark.parametrize("deadline", [False, True])
def test_tsc_deadline_is_what_kvm_says(dump: str, deadline: bool) -> None:
    _, _, ecx, _ = Cpu(dump, 0, 1, deadline=deadline)(1)

    assert bool(ecx & 1 << 24) == deadline
    assert ecx & 1 << 31  # hypervisor
    assert ecx & 1 << 21  # x2APIC


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
def test_other_leaves_are_kvms(dump: str) -> None:
    untouched = {0, 7, 0xD, 0x80000000, 0x80000007, 0x40000001} | ({6} if dump is INTEL else set())
    supported = {(e.function, e.index): e for e in parse(dump) if e.function in untouched and e.index == 0}

    cpu = Cpu(dump, 1, 2)

    assert {key: cpu.leaves[key] for key in supported} == supported


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
def test_supported_table_stays_as_it_was(dump: str) -> None:
    supported = parse(dump)

    cpuid.for_vcpu(supported, 5, 8, tsc_khz=3000000, tsc_deadline=True)

    assert supported == parse(dump)


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
def test_hypervisor_leaf_tells_tsc_and_apic_rate(dump: str) -> None:
    cpu = Cpu(dump, 0, 1, tsc_khz=2599998)

    assert cpu(0x40000000) == (0x40000010, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert cpu(0x40000010) == (2599998, 1000000, 0, 0)


@pytest.mark.parametrize("dump", [INTEL, AMD], ids=["intel", "amd"])
def test_unknown_tsc_rate_is_not_told(dump: str) -> None:
    cpu = Cpu(dump, 0, 1, tsc_khz=None)

    assert cpu(0x40000000)[0] == 0x40000001
    assert cpu(0x40000010) == cpu(0x15) == cpu(0x16) == (0, 0, 0, 0)


def test_amd_gets_no_intel_frequency_leaves() -> None:
    cpu = Cpu(AMD, 0, 1)

    assert cpu(0x15) == cpu(0x16) == (0, 0, 0, 0)


@pytest.mark.parametrize("tsc_khz", [999999, 1995312, 2100000, 2599998, 2893202, 2994375, 3792874, 4299999, 5700123])
def test_tsc_rate_comes_out_of_linux_arithmetic(tsc_khz: int) -> None:
    """Linux, native_calibrate_tsc(): crystal kHz * EBX / EAX, in 32 bits; the crystal is the APIC timer's clock."""
    denominator, numerator, hz, _ = Cpu(INTEL, 0, 1, tsc_khz=tsc_khz)(0x15)

    crystal_khz = hz // 1000
    seen = crystal_khz * numerator // denominator

    assert crystal_khz == 1_000_000
    assert crystal_khz * numerator < 1 << 32
    assert abs(seen - tsc_khz) <= 1 + tsc_khz // 100_000  # 10 ppm


def test_processor_frequency_is_the_tsc_rate() -> None:
    assert Cpu(INTEL, 0, 1, tsc_khz=2599998)(0x16) == (2600, 2600, 100, 0)


def test_a_processor_without_extended_leaves_gets_none() -> None:
    old = "\n".join(line for line in INTEL.splitlines() if not line.startswith("0000000b"))
    old = old.replace("00000000 0 0  00000016", "00000000 0 0  0000000a")

    cpu = Cpu(old, 1, 2)

    assert levels(cpu, 0xB) == []
    assert cpu(0x15) == (0, 0, 0, 0)


def test_cpu_counts_that_interrupts_can_reach() -> None:
    cpuid.check_cpus(1)
    cpuid.check_cpus(255)


@pytest.mark.parametrize("cpus", [-1, 0, 256, 100000])
def test_other_cpu_counts_are_refused_in_one_line(cpus: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{cpus} CPUs.*--cpus$"):
        cpuid.check_cpus(cpus)
