"""The pytest plugin with guests of a few bytes: what the report of a failure has, and tests in parallel."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60.0
# For 7C00h, real mode: mov dx,3F8h; mov si,7C20h; cld; lodsb; test al,al; jz +3; out dx,al; jmp -8; jmp $
SAY = bytes.fromhex("baf803 be207c fc ac 84c0 7403 ee ebf8 ebfe")
WORDS = (
    b"fine so far\r\nBUG: unable to handle page fault for address: 0000000000000042\r\nRIP: 0010:broken+0x7/0x10\r\n"
    b"---[ end trace 0000000000000000 ]---\r\nand on\r\n"
)
CONFTEST = "from kvmpy import pytest_plugin\npytest_plugin.why_not = lambda: ''  # no Linux, but these run anywhere\n"
TESTS = """
import pytest

OPTIONS = {"kernel": "IMAGE", "mem": "1M"}

@pytest.mark.requires_kvm
@pytest.mark.parametrize("kvm_machine", [OPTIONS] * 3, indirect=True)
def test_passes(kvm_machine):
    kvm_machine.wait_for_console("and on")
    assert kvm_machine.config.cpus == 1

@pytest.mark.parametrize("kvm_machine", [OPTIONS], indirect=True)
def test_fails(kvm_machine):
    kvm_machine.wait_for_console("and on")
    assert False

def test_two(kvm_machine_factory):
    for machine in [kvm_machine_factory(**OPTIONS) for _ in range(2)]:
        machine.wait_for_console("and on")
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_shows_the_guest_also_in_parallel(tmp_path: Path, workers: int) -> None:
    image = tmp_path / "sector.bin"
    image.write_bytes((SAY.ljust(32, b"\x90") + WORDS).ljust(510, b"\0") + b"\x55\xaa")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_demo.py").write_text(TESTS.replace("IMAGE", str(image)))
    plugins = ["-p", "no:kvmpy", "-p", "kvmpy.pytest_plugin", "-p", "no:cacheprovider", "--strict-markers"]
    words = [*plugins, *(["-p", "xdist", "-n", str(workers)] if workers else []), "-c", "/dev/null"]

    command = [sys.executable, "-m", "pytest", *words, "--rootdir", str(tmp_path), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout

    assert "1 failed, 4 passed" in output
    assert re.search(
        r"-+ kvmpy: state of machine -+\nkvmpy: stopped by the user \(it runs; the test has failed\)", output
    )
    assert "RIP" in output or "rip" in output
    assert "last exits, the latest first" in output
    oops = re.search(r"-+ kvmpy: oops of machine -+\n(.*?)\n-+ kvmpy", output, re.DOTALL)
    assert oops is not None
    assert oops[1].splitlines() == WORDS.decode().splitlines()[1:4]
    assert re.search(r"-+ kvmpy: console of machine -+\nfine so far\n(.*\n)+and on\n", output)
