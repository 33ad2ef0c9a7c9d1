"""What `kvmpy boot` has imported when the guest executes its first instruction: start-up time is made of this."""

from __future__ import annotations

import subprocess
import sys

import pytest

SECONDS = 60.0
POWER_OFF = bytes.fromhex("ba0006 b034 ee fa f4")  # mov dx,600h; mov al,34h (SLP_EN, S5); out dx,al; cli; hlt

# `kvmpy boot`, which prints the modules it has imported just before its first vCPU thread starts.
PROGRAM = """
import sys
sys.path += sys.argv.pop().split(":")
bare = set(sys.modules)
import kvmpy.vcpu
start = kvmpy.vcpu.VcpuThread.start
def report(thread, prepare=None):
    print(*sorted(set(sys.modules) - bare), file=sys.stderr)
    start(thread, prepare)
kvmpy.vcpu.VcpuThread.start = report
from kvmpy.cli import main as run
sys.exit(run(["boot", "--mem", "1M", "--timeout", "30", sys.argv[1]]))
"""

THIRD_PARTY = {"_cffi_backend"}

# Modules of the standard library that take a good part of a millisecond or more.
SLOW = set(
    """
    annotationlib argparse ast asyncio bz2 concurrent csv ctypes dataclasses datetime decimal difflib doctest email enum
    ftplib gettext http imaplib importlib inspect ipaddress json locale logging lzma multiprocessing optparse pathlib
    pickle platform pprint pydoc random re secrets shutil signal socket sqlite3 ssl statistics string subprocess tarfile
    tempfile traceback typing unittest urllib uuid warnings xml zipfile zoneinfo zlib
    """.split()
)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names, dots and all, of what is imported before the first KVM_RUN of a boot sector."""
    image = tmp_path_factory.mktemp("image") / "sector"
    image.write_bytes(POWER_OFF.ljust(510, b"\0") + b"\x55\xaa")
    # Without site, since what .pth files import would not be missed.
    command = [sys.executable, "-S", "-c", PROGRAM, str(image), ":".join(sys.path)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return set(done.stderr.split())


def test_third_party_modules(modules: set[str]) -> None:
    packages = {name.split(".")[0] for name in modules} - {"kvmpy"}

    assert packages - set(sys.stdlib_module_names) == THIRD_PARTY


def test_slow_modules_of_the_standard_library(modules: set[str]) -> None:
    packages = {name.split(".")[0] for name in modules}

    assert packages & SLOW == set()


def test_own_modules_that_have_their_time_later(modules: set[str]) -> None:
    later = {"kvmpy.report", "kvmpy.evidence", "kvmpy.hints", "kvmpy.doctor", "kvmpy.testing", "kvmpy.boot.image"}
    linux = {"kvmpy.boot.initramfs", "kvmpy.boot.cpio", "kvmpy.boot.modules"}

    assert modules & (later | linux) == set()
    assert "kvmpy.machine" in modules
