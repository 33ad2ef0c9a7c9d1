"""What `kvmpy doctor` finds on hosts that are made up below a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvmpy import doctor
from kvmpy.cli.doctor import as_json, render
from kvmpy.doctor import Check, Level, Section, can_boot_linux, summary

CPU = "processor\t: 0\nmodel name\t: Fast \x1b[31mProcessor\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"
FINE = [
    Section("Processor", (Check("extensions", Level.OK, "AMD-V (svm)"),)),
    Section("KVM", (Check("/dev/kvm", Level.OK, "can be opened"), Check("ring 0", Level.OK, "native"))),
    Section("Guests", (Check("kernel", Level.OK, "/boot/vmlinuz"), Check("busybox", Level.WARN, "none", "get it"))),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host without anything."""
    for folder in ("proc/sys/vm", "sys/module", "sys/kernel/mm/transparent_hugepage", "dev"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def found(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    ("flags", "level", "text"),
    [
        ("vmx", Level.OK, "Intel VT-x (vmx)"),
        ("svm hypervisor", Level.OK, "AMD-V (svm)"),
        ("hypervisor", Level.WARN, "neither VT-x (vmx) nor AMD-V (svm)"),
        ("svm_lock vmx_something", Level.WARN, "neither VT-x (vmx) nor AMD-V (svm)"),
    ],
)
def test_processor(root: Path, flags: str, level: Level, text: str) -> None:
    (root / "proc/cpuinfo").write_text(CPU.format(flags=flags))

    checks = found(doctor.processor(root))

    assert checks["processor"].found == "Fast Processor, 2 CPUs"
    assert (checks["extensions"].level, checks["extensions"].found) == (level, text)
    assert ("virtual" in checks) is ("hypervisor" in flags)


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [("hypervisor", "enable nested virtualisation"), ("", "enable VT-x or AMD-V (SVM) in the firmware")],
)
def test_processor_without_extensions(root: Path, flags: str, remedy: str) -> None:
    (root / "proc/cpuinfo").write_text(CPU.format(flags=flags))

    assert found(doctor.processor(root))["extensions"].remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("flags", "container", "remedy"),
    [
        ("vmx", "", "sudo modprobe kvm_intel"),
        ("svm", "", "sudo modprobe kvm_amd"),
        ("hypervisor", "", "enable nested virtualisation for this machine"),
        ("vmx", ".dockerenv", "start this container with --device /dev/kvm"),
    ],
)
def test_no_device(root: Path, flags: str, container: str, remedy: str) -> None:
    (root / "proc/cpuinfo").write_text(CPU.format(flags=flags))
    (root / (container or "unused")).touch()

    check = found(doctor.kvm(root, str(root / "dev/kvm")))["/dev/kvm"]

    assert check.level is Level.FAIL
    assert check.found == "there is none"
    assert check.remedy.startswith(remedy)


def test_file_that_is_no_kvm_device(root: Path) -> None:
    device = root / "dev/kvm"
    device.touch()

    check = found(doctor.kvm(root, str(device)))["/dev/kvm"]

    assert check.level is Level.FAIL
    assert "KVM_GET_API_VERSION" in check.found


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_device_without_permission(root: Path) -> None:
    device = root / "dev/kvm"
    device.touch(mode=0)

    check = found(doctor.kvm(root, str(device)))["/dev/kvm"]

    assert check.found == "permission denied"


@pytest.mark.parametrize(("mode", "remedy"), [(0o600, "sudo setfacl -m u:$USER:rw "), (0o660, "sudo usermod -aG ")])
def test_remedy_for_a_missing_permission(root: Path, monkeypatch: pytest.MonkeyPatch, mode: int, remedy: str) -> None:
    device = root / "dev/kvm"
    device.touch()
    device.chmod(mode)
    info = list(device.stat())
    info[5] = 4242  # st_gid
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result(info))

    assert doctor._permission_remedy(str(device)).startswith(remedy)


@pytest.mark.parametrize(
    ("value", "text"), [("Y", "on: KVM works"), ("1", "on: KVM works"), ("N", "off: KVM is missing")]
)
def test_nested_guests(root: Path, value: str, text: str) -> None:
    parameters = root / "sys/module/kvm_amd/parameters"
    parameters.mkdir(parents=True)
    (parameters / "nested").write_text(f"{value}\n")

    checks = found(doctor.kvm(root, str(root / "dev/kvm")))

    assert checks["module"].found == "kvm_amd"
    assert checks["nested guests"].found.startswith(text)


def test_memory(root: Path) -> None:
    (root / "proc/meminfo").write_text("MemTotal:  1048576 kB\nMemAvailable:   102400 kB\nHugePages_Total:  0\n")
    (root / "proc/sys/vm/overcommit_memory").write_text("2\n")
    (root / "sys/kernel/mm/transparent_hugepage/enabled").write_text("always madvise [never]\n")

    checks = found(doctor.memory(root))

    assert (checks["memory"].level, checks["memory"].found) == (Level.WARN, "100 MiB of 1024 MiB are available")
    assert checks["overcommit"].level is Level.WARN
    assert checks["huge pages"].found == "not for guests' memory, which costs some speed"


def test_host_that_shows_nothing(root: Path) -> None:
    sections = doctor.examine(root, str(root / "dev/kvm"))

    assert not can_boot_linux(sections)
    assert summary(sections)[0] == "No guest runs here: /dev/kvm: there is none."


def test_tool_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passt").write_text("no program")
    (tmp_path / "passt").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert doctor._tool("passt", "networks").found == f"{tmp_path}/passt does not run (OSError)"


def test_tool_that_prints_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passt").write_text("#!/bin/sh\nprintf '\\033[31mpasst 1\\nmore\\n'\n")
    (tmp_path / "passt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")

    assert doctor._tool("passt", "networks").found == "passt 1 (networks)"


# The summary.


def test_host_where_all_is_well() -> None:
    assert can_boot_linux(FINE)
    assert summary(FINE) == ["Linux boots here.", "Try it: kvmpy boot"]


def test_host_without_kernel() -> None:
    sections = [*FINE, Section("More", (Check("kernel", Level.WARN, "no kernel on this host", "get one"),))]

    assert can_boot_linux(sections)
    assert "--kernel" in summary(sections)[1]


def test_host_that_emulates_ring_0() -> None:
    sections = [*FINE, Section("More", (Check("ring 0", Level.FAIL, "emulated", "use another"),))]

    lines = summary(sections)

    assert not can_boot_linux(sections)
    assert lines[0] == "Linux does not boot here: this KVM lacks the processor's help (VT-x, AMD-V)."
    assert lines[-1] == "Way on: use another"


# The command.


def test_text() -> None:
    lines = render(FINE, colour=False)

    assert "  ok    /dev/kvm            can be opened" in lines
    assert "  warn  busybox             none" in lines
    assert "                            -> get it" in lines
    assert lines[-1] == "Try it: kvmpy boot"


def test_colours_are_for_terminals() -> None:
    assert not any("\x1b" in line for line in render(FINE, colour=False))
    assert "\x1b[32mok   \x1b[0m" in "\n".join(render(FINE, colour=True))


def test_json() -> None:
    value = json.loads(json.dumps(as_json(FINE)))

    assert value["can_boot_linux"] is True
    assert value["sections"][2]["checks"][1] == {
        "name": "busybox",
        "level": "warn",
        "found": "none",
        "remedy": "get it",
    }


def test_command_on_this_host_whatever_it_is() -> None:
    command = [sys.executable, "-m", "kvmpy", "doctor", "--json"]

    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    value = json.loads(done.stdout)
    assert done.stderr == ""
    assert done.returncode == (0 if value["can_boot_linux"] else 126)
    assert [section["title"] for section in value["sections"]][:2] == ["Processor", "KVM"]
