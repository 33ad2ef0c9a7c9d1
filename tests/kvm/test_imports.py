"""What `kvmpy boot` has imported when the guest executes its first instruction: start-up time is made of this."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SECONDS = 60.0
POWER_OFF = bytes.fromhex("ba0006 b034 ee fa f4")  # mov dx,600h; mov al,34h (SLP_EN, S5); out dx,al; cli; hlt

# `kvmpy boot`, which prints the modules it has imported just before its first vCPU thread starts.
PROGRAM = """
import json, sys
bare = set(sys.modules)
import kvmpy.vcpu
start = kvmpy.vcpu.VcpuThread.start
def report(thread, prepare=None):
    print(json.dumps(sorted(set(sys.modules) - bare)), file=sys.stderr)
    start(thread, prepare)
kvmpy.vcpu.VcpuThread.start = report
from kvmpy.cli import main as run
sys.exit(run(["boot", "--mem", "1M", "--timeout", "30", sys.argv[1]]))
"""

THIRD_PARTY = {"_cffi_backend"}

# Modules of the standard library that take milliseconds, and those of them that are worth it.
SLOW = set(
    """
    annotationlib asyncio bz2 concurrent csv ctypes datetime decimal difflib doctest email ftplib http imaplib inspect
    ipaddress json logging lzma multiprocessing optparse pickle platform pprint pydoc random secrets shutil socket
    sqlite3 ssl statistics subprocess tarfile tempfile traceback unittest urllib uuid xml zipfile zoneinfo
    """.split()
)
WORTH_IT = {
    "datetime",  # the clock chip
    "inspect",  # comes with dataclasses
    "annotationlib",  # comes with dataclasses, from Python 3.14 on
    "json",  # the command line's --json
    "socket",  # --serial unix=
    *("tempfile", "random", "shutil", "bz2", "lzma"),  # the cache of decompressed kernels
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names, dots and all, of what is imported before the first KVM_RUN of a boot sector."""
    image = tmp_path_factory.mktemp("image") / "sector"
    image.write_bytes(POWER_OFF.ljust(510, b"\0") + b"\x55\xaa")
    command = [sys.executable, "-c", PROGRAM, str(image)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return set(json.loads(done.stderr))


def test_third_party_modules(modules: set[str]) -> None:
    packages = {name.split(".")[0] for name in modules} - {"kvmpy"}

    assert packages - set(sys.stdlib_module_names) == THIRD_PARTY


def test_slow_modules_of_the_standard_library(modules: set[str]) -> None:
    packages = {name.split(".")[0] for name in modules}

    assert packages & SLOW <= WORTH_IT


def test_own_modules_that_have_their_time_later(modules: set[str]) -> None:
    later = {"kvmpy.report", "kvmpy.evidence", "kvmpy.hints", "kvmpy.doctor", "kvmpy.testing", "kvmpy.boot.image"}
    linux = {"kvmpy.boot.initramfs", "kvmpy.boot.cpio", "kvmpy.boot.modules"}

    assert modules & (later | linux) == set()
    assert "kvmpy.machine" in modules
