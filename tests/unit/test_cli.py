"""The command line without a guest: every mistake is one line and its exit status, and little is imported."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from kvmpy import cli

SECONDS = 60.0
NOBODY = 65534
DEVICE = Path("/dev/kvm")
BOOT_SECTOR = b"\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa"

# A process without privileges: what it will need is imported before they are given up, since a user's Python, like
# root's, may be where nobody else can read it.
UNPRIVILEGED = f"""
import ctypes, grp, os, sys
import kvmpy.cli.boot, kvmpy.cli.doctor, kvmpy.cli.inspect, kvmpy.report
if os.getuid() == 0:
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(kvmpy.cli.main(sys.argv[1:]))
"""


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


def run(command: Sequence[str | bytes], **options: object) -> Done:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    settings |= options
    done = subprocess.run(command, timeout=SECONDS, **settings)  # type: ignore[call-overload]
    return Done(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def kvmpy(*words: object, **options: object) -> Done:
    words = tuple(word if isinstance(word, bytes) else str(word) for word in words)
    return run([sys.executable, "-m", "kvmpy", *words], **options)  # type: ignore[list-item]


def assert_refused(done: Done, status: int, message: str) -> None:
    """One line that says `message`, this status, and nothing else."""
    assert done.stderr.startswith(f"kvmpy: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert done.stdout == ""
    assert done.status == status


@pytest.fixture
def sector(tmp_path: Path) -> Path:
    """A boot sector, which any KVM could run."""
    path = tmp_path / "sector"
    path.write_bytes(BOOT_SECTOR)
    return path


# Options.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mem", "0"], 'invalid size "0"; a machine has 1M to '),
        (["--mem", "-1"], 'invalid size "-1"; use e.g. 512M or 2G'),
        (["--mem", "512X"], 'invalid size "512X"; use e.g. 512M or 2G'),
        (["--mem", "1.5G"], 'invalid size "1.5G"; use e.g. 512M or 2G'),
        (["--mem", "1_000"], 'invalid size "1_000"; use e.g. 512M or 2G'),
        (["--mem", "\u0665\u0661\u0662"], 'invalid size "\u0665\u0661\u0662"; use e.g. 512M or 2G'),
        (["--mem", ""], 'invalid size ""; use e.g. 512M or 2G'),
        (["--mem", " 512"], 'invalid size " 512"; use e.g. 512M or 2G'),
        (["--mem", "0x200"], 'invalid size "0x200"; use e.g. 512M or 2G'),
        (["--mem", "512MB "], 'invalid size "512MB "; use e.g. 512M or 2G'),
        (["--mem", "999999999T"], 'invalid size "999999999T"; a machine has 1M to '),
        (["--mem", "9" * 100], 'invalid size "9'),
        (["--mem", "1048577B"], 'invalid size "1048577B"; memory comes in whole pages of 4K'),
        (["--mem"], "argument -m/--mem: expected one argument; see `kvmpy boot --help`"),
        (["--cpus", "0"], 'invalid number of CPUs "0"; use a whole number from 1 to '),
        (["--cpus", "100000"], 'invalid number of CPUs "100000"; use a whole number from 1 to '),
        (["--cpus", "x"], 'invalid number of CPUs "x"; '),
        (["--cpus", "-1"], 'invalid number of CPUs "-1"; '),
        (["--cpus", "1.0"], 'invalid number of CPUs "1.0"; '),
        (["--cpus", "\u0663"], 'invalid number of CPUs "\u0663"; '),
        (["--timeout", "x"], 'invalid time limit "x"; use seconds, e.g. 10 or 0.5'),
        (["--timeout", "0"], 'invalid time limit "0"; '),
        (["--timeout", "-5"], 'invalid time limit "-5"; '),
        (["--timeout", "nan"], 'invalid time limit "nan"; '),
        (["--timeout", "inf"], 'invalid time limit "inf"; '),
        (["--timeout", "1e3"], 'invalid time limit "1e3"; '),
        (["--timeout", "\u0661"], 'invalid time limit "\u0661"; '),
        (["--serial", "junk"], 'invalid console "junk"; '),
        (["--serial", "file="], 'invalid console "file="; '),
        (["--json", "--serial", "stdio"], "--json and --serial stdio both want standard output; leave one of them out"),
        (["--unknown"], "unrecognized arguments: --unknown; see `kvmpy boot --help`"),
        (["--unknown=\x1b[31m\n"], "unrecognized arguments: --unknown=\\x1b[31m ; see "),
        (["--time", "5"], "unrecognized arguments: --time 5; see "),
        (["--boot", "junk"], "no boot protocol 'junk'; use one of auto, pvh, linux64, decompressor, multiboot, flat"),
        (["--append", "a\nb"], "the command line has a newline after 'a'; take it out of --cmdline/--append"),
        (["--kernel", "other"], "two kernels are given; name one, with or without --kernel"),
        (["another"], "unrecognized arguments: another; see "),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_option(capsys: pytest.CaptureFixture[str], sector: Path, words: list[str], message: str) -> None:
    status = cli.main(["boot", str(sector), *words])

    assert_refused(Done(status, *capsys.readouterr()), 125, message)


def test_unknown_command() -> None:
    assert_refused(kvmpy("bot"), 125, f'no command "bot"; use one of {", ".join(cli.VERBS)}')


@pytest.mark.parametrize("verb", ["boot", "doctor", "inspect", "initrd"])
def test_unknown_option_of_each_command(verb: str) -> None:
    required = ["-o", "x"] if verb == "initrd" else []

    assert_refused(kvmpy(verb, *required, "--nonsense"), 125, "unrecognized arguments: --nonsense; see ")


def test_no_command_shows_what_there_is() -> None:
    done = kvmpy()

    assert (done.status, done.stderr) == (125, "")
    assert done.stdout.startswith("usage: kvmpy COMMAND")


# Files.


def test_kernel_that_does_not_exist(tmp_path: Path) -> None:
    assert_refused(kvmpy("boot", tmp_path / "none"), 127, f"kernel {tmp_path}/none: no such file; ")


def test_kernel_below_a_file(sector: Path) -> None:
    assert_refused(kvmpy("boot", sector / "none"), 127, f"kernel {sector}/none: no such file; ")


def test_kernel_with_a_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\x1b[2J\n"

    assert_refused(kvmpy("boot", name), 127, f"kernel {tmp_path}/\\udcff\\x1b[2J : no such file; ")


def test_kernel_that_is_a_folder(tmp_path: Path) -> None:
    assert_refused(kvmpy("boot", tmp_path), 125, f"kernel {tmp_path} is a directory; ")


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_kernel_that_is_a_device(device: str) -> None:
    assert_refused(kvmpy("boot", device), 125, f"kernel {device} is a device; ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; "),
        (b"hello\n", "a text file; "),
        (b"#!/bin/sh\necho\n", "a script; "),
        (b"\x7fELF", "the file ends within its ELF header, after 4 bytes; "),
        (b"\0" * 100, "no kernel that is known "),
    ],
)
def test_kernel_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)

    assert_refused(kvmpy("boot", path), 125, f"kernel {path}: {message}")


def test_kernel_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(BOOT_SECTOR)
    path.chmod(0)

    done = run([sys.executable, "-c", UNPRIVILEGED, "boot", str(path)])

    assert_refused(done, 125, f"kernel {path}: permission denied; ")


# The host.


def usable_by_others(device: Path) -> bool:
    """Whether a process of user and group `nobody`, or an unprivileged one like this, can open the device."""
    if os.getuid() != 0:
        return os.access(device, os.R_OK | os.W_OK)
    return bool(device.exists() and device.stat().st_mode & stat.S_IROTH)


@pytest.mark.skipif(not DEVICE.exists() or usable_by_others(DEVICE), reason="everybody may use this host's /dev/kvm")
def test_kvm_that_may_not_be_used(sector: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path may be out of reach for others
        Path(folder).chmod(0o755)
        image = shutil.copy(sector, folder)
        done = run([sys.executable, "-c", UNPRIVILEGED, "boot", image])
    told = run([sys.executable, "-c", UNPRIVILEGED, "doctor"])

    assert_refused(done, 126, "open(/dev/kvm): Permission denied; add yourself to the kvm group")
    assert told.status == 126
    assert re.search(r"FAIL +/dev/kvm +permission denied\n +-> sudo (usermod -aG|setfacl -m) ", told.stdout)


def can_hide_devices() -> bool:
    """Whether this user may have a mount namespace of its own."""
    return shutil.which("unshare") is not None and run(["unshare", "--mount", "true"]).status == 0


@pytest.mark.skipif(not can_hide_devices(), reason="hiding /dev/kvm takes a mount namespace")
def test_no_kvm(sector: Path) -> None:
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh"]

    done = run([*hidden, sys.executable, "-m", "kvmpy", "boot", str(sector)])
    told = run([*hidden, sys.executable, "-m", "kvmpy", "doctor"])

    assert_refused(done, 126, "open(/dev/kvm): No such file or directory; load the kvm_intel or kvm_amd module")
    assert told.status == 126
    assert "No guest runs here: /dev/kvm: there is none." in told.stdout


# Output.


@pytest.mark.parametrize("words", [["--help"], ["boot", "--help"], ["doctor"], ["--version"]], ids=" ".join)
def test_output_that_nobody_reads(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    done = kvmpy(*words, stdout=writer)
    os.close(writer)

    assert (done.status, done.stderr) == (128 + 13, "")


@pytest.mark.parametrize("words", [["--help"], ["boot", "--help"], ["doctor"]], ids=" ".join)
def test_output_that_does_not_fit(words: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = kvmpy(*words, stdout=full)

    assert done.status == 125
    assert done.stderr == (
        "kvmpy: cannot write to standard output: No space left on device; make room, or send it elsewhere\n"
    )


def test_error_that_cannot_be_told(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = kvmpy("boot", tmp_path / "none", stderr=full)

    assert (done.status, done.stdout) == (127, "")


def test_closed_standard_streams(tmp_path: Path) -> None:
    command = [
        "sh",
        "-c",
        'exec "$@" <&- >&- 2>&-',
        "sh",
        sys.executable,
        "-m",
        "kvmpy",
        "boot",
        str(tmp_path / "none"),
    ]

    done = run(command)

    assert done == Done(127, "", "")


# Help.


@pytest.mark.parametrize("columns", ["wide", "", "0", "-5", "60"])
def test_help_whatever_the_width_is_said_to_be(columns: str) -> None:
    command = [sys.executable, "-m", "kvmpy", "boot", "--help"]

    done = subprocess.run(
        command, env={**os.environ, "COLUMNS": columns}, capture_output=True, text=True, timeout=SECONDS
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "kernel image, as with --kernel" in done.stdout


def test_help_names_every_command() -> None:
    done = kvmpy("--help")

    assert (done.status, done.stderr) == (0, "")
    assert all(f"  {verb} " in done.stdout for verb in ("boot", "doctor", "inspect", "initrd"))


@pytest.mark.parametrize("verb", ["boot", "doctor", "inspect", "initrd"])
def test_help_of_each_command(verb: str) -> None:
    done = kvmpy(verb, "--help")

    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: kvmpy {verb} ")


def test_version() -> None:
    done = kvmpy("--version")

    assert (done.status, done.stderr) == (0, "")
    assert re.fullmatch(r"kvmpy \d+\.\d+\.\d+\n", done.stdout)


# What is imported.


@pytest.mark.parametrize(
    "statement",
    [
        "import kvmpy",
        "from kvmpy.cli import main; main(['--help'])",
        "from kvmpy.cli import main; main(['nonsense'])",
    ],
)
def test_little_is_imported(statement: str) -> None:
    slow = (
        "structlog yaml capstone lz4 zstandard cffi ctypes asyncio subprocess socket inspect logging typing_extensions"
    )
    report = f"import sys; print(*sorted({set(slow.split())!r} & set(sys.modules)), file=sys.stderr)"

    done = run([sys.executable, "-c", f"{statement}\n{report}"])

    assert done.stderr.splitlines()[-1] == ""
