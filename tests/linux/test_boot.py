"""Debian's kernels reach userspace by every protocol that applies, on one or more CPUs, without a complaint."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from command import Boot

# What a kernel prints when the machine is not as it should be. An emulated host's CPU (QEMU's TCG) lets guests set XCR0
# behind KVM's back, so that KVM gives them the size of another XSAVE area: QEMU's own guests complain there as well.
COMPLAINTS = r"Firmware (Bug|Warn)|\bBUG\b|WARNING: CPU|MP-BIOS|ACPI.*(Error|Warning)|not respond|nobody cared|stuck"
KNOWN = "fpu__init_system_xstate" if Path("/dev/linux-host").exists() else "$^"

LARGE, BELOW = 3328, 3072  # MiB: RAM of a large machine, and what of it is below the hole under 4 GiB

SURVEY = rf"""
cd /sys/devices/system/cpu
echo "cpus=$(nproc)"
echo "packages=$(cat cpu*/topology/physical_package_id | sort -u)"
echo "cores=$(cat cpu*/topology/core_id | sort -nu | wc -l)"
echo "interrupts=$(sed -n 's/.* //p' /proc/interrupts | tr '\n' ' ')"
echo "now=$(date -u +%s)"
echo "normal=$(grep -A9 'zone  *Normal' /proc/zoneinfo | sed -n 's/.*present *//p')"
echo "complaints=$(dmesg | grep -E '{COMPLAINTS}' | grep -v '{KNOWN}' | tr '\n' '|')"
exit 7
"""


def facts(console: str) -> dict[str, str]:
    """The lines NAME=VALUE of a guest's output."""
    return dict(line.split("=", 1) for line in console.splitlines() if "=" in line)


@pytest.mark.parametrize(
    ("kernel", "option", "protocol", "cpus", "mem"),
    [
        ("cloud", "auto", "pvh", 1, 512),
        ("cloud", "linux64", "linux64", 2, LARGE),
        ("cloud", "decompressor", "decompressor", 4, 512),
        ("amd64", "pvh", "pvh", 4, 512),
        ("amd64", "linux64", "linux64", 1, 512),
        ("amd64", "decompressor", "decompressor", 2, 512),
    ],
)
def test_kernel_reaches_userspace(
    kernel: str, option: str, protocol: str, cpus: int, mem: int, boot: Boot, request: pytest.FixtureRequest
) -> None:
    """With much memory: what does not fit below the hole is the kernel's zone "Normal"."""
    if mem << 20 > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"this host has less than {mem} MiB of memory; scripts/linux-host has --mem")
    before = time.time()

    done = boot(
        *("-k", request.getfixturevalue(kernel), "--boot", option, "-c", str(cpus), "-m", f"{mem}M"),
        *("--json", "--exec", SURVEY),
    )

    outcome = json.loads(done.stdout)
    seen = facts(outcome["console"])
    assert (done.status, outcome["reason"], outcome["protocol"]) == (7, "exit", protocol)
    assert (seen["cpus"], seen["packages"], seen["cores"]) == (str(cpus), "0", str(cpus))
    assert {"ttyS0", "ACPI:Ged"} <= set(seen["interrupts"].split())
    assert before - 2 <= int(seen["now"]) <= time.time() + 1  # RTC
    assert int(seen["normal"]) == max(0, mem - BELOW) << 20 >> 12
    assert seen["complaints"] == ""
    assert outcome["init_ms"] > 0
