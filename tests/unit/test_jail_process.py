"""What a process can still do that has locked itself in: each test is a program of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from kvmpy.jail.lock import OUTPUT, REFER, SPARE_FILES, landlock_abi

SECONDS = 30.0
REFUSED = ("PermissionError", "OSError: [Errno 18]")  # EPERM, EACCES; EXDEV
TRY = """
import json, os, resource, socket, sys
from pathlib import Path
from kvmpy.jail.lock import Jail

def attempt(work):
    try:
        return repr(work())
    except OSError as error:
        return f"{type(error).__name__}: {error}"

shown, changed, other = map(Path, sys.argv[1:4])
fds = {"shown": os.open(shown, os.O_PATH), "changed": os.open(changed, os.O_PATH)}

def write(path):
    with open(path, "w") as file:
        return file.write("x")

def made(path, mode):
    return os.mknod(path, mode)

"""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """One that a guest is shown, one that it changes, one that is neither; each with a file and a folder."""
    found = [tmp_path / name for name in ("shown", "changed", "other")]
    for folder in found:
        (folder / "inner").mkdir(parents=True)
        (folder / "file").write_text("here")
    return found


def locked(folders: list[Path], jail: str, tries: str) -> dict[str, str]:
    """What each of `tries`, a dictionary of functions, comes to after `jail`."""
    program = f"{TRY}\njail = {jail}\njail.lock()\n"
    program += (
        f"print(json.dumps({{name: attempt(work) for name, work in {tries}.items()}} | {{'missing': jail.missing}}))"
    )
    command = [sys.executable, "-c", program, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, str] = json.loads(done.stdout)
    return found


SHARED = """Jail("default", reaching=True, folders=[(shown, False), (changed, True)])"""


@pytest.fixture
def landlock() -> None:
    if landlock_abi() < REFER:
        pytest.skip("this kernel has no Landlock that allows renames")


@pytest.mark.usefixtures("landlock")
def test_shared_folders_and_no_others_can_be_reached(folders: list[Path]) -> None:
    tries = """{
        "read": lambda: (shown / "file").read_text(),
        "read by descriptor": lambda: os.open(f"/proc/self/fd/{fds['shown']}/file", os.O_RDONLY) > 0,
        "list": lambda: sorted(os.listdir(shown)),
        "write": lambda: write(changed / "new"),
        "truncate": lambda: os.truncate(changed / "file", 1),
        "rename": lambda: os.rename(changed / "new", changed / "inner/new"),
        "link": lambda: os.link(changed / "file", changed / "inner/file"),
        "make a folder": lambda: os.mkdir(changed / "folder"),
        "remove": lambda: os.unlink(changed / "inner/new"),
        "symlink": lambda: os.symlink("/", changed / "symlink"),
        "UNIX socket": lambda: socket.socket(socket.AF_UNIX).close(),
    }"""

    found = locked(folders, SHARED, tries)

    assert found == {
        **dict.fromkeys(("truncate", "rename", "link", "make a folder", "remove", "symlink", "UNIX socket"), "None"),
        "read": "'here'",
        "read by descriptor": "True",
        "list": "['file', 'inner']",
        "write": "1",
        "missing": [],
    }


@pytest.mark.usefixtures("landlock")
def test_what_a_shared_folder_does_not_let_through(folders: list[Path]) -> None:
    tries = """{
        "read elsewhere": lambda: (other / "file").read_text(),
        "read elsewhere through a link": lambda: (changed / "out/passwd").read_text(),
        "list elsewhere": lambda: os.listdir(other),
        "write elsewhere": lambda: write(other / "new"),
        "write what is only shown": lambda: write(shown / "file"),
        "make a file in what is only shown": lambda: write(shown / "new"),
        "truncate what is only shown": lambda: os.truncate(shown / "file", 0),
        "remove what is only shown": lambda: os.unlink(shown / "file"),
        "rename from elsewhere": lambda: os.rename(other / "file", changed / "stolen"),
        "rename to elsewhere": lambda: os.rename(changed / "file", other / "gone"),
        "device": lambda: made(changed / "device", 0o20666),
        "FIFO": lambda: made(changed / "fifo", 0o10666),
        "TCP socket": lambda: socket.socket(),
        "execute": lambda: os.execv("/bin/true", ["true"]),
        "mount": lambda: os.chroot("/"),
    }"""
    (folders[1] / "out").symlink_to("/etc")

    found = locked(folders, SHARED, tries)

    assert found.pop("missing") == []
    assert {name: outcome for name, outcome in found.items() if not outcome.startswith(REFUSED)} == {}


def status_of(jail: str, file: str) -> str:
    """A file of /proc/PID of a process that has locked itself in."""
    program = f"from kvmpy.jail.lock import Jail; Jail({jail}).lock(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        text = Path(f"/proc/{process.pid}/{file}").read_text()
        process.communicate("\n", SECONDS)
    return text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
@pytest.mark.parametrize(("jail", "left"), [("'default'", 0), ("'default', reaching=True", 0b11111)])
def test_root_keeps_no_more_than_what_it_needs_for_files(jail: str, left: int) -> None:
    fields = dict(re.findall(r"^(\w+):\s+(\S+)$", status_of(jail, "status"), re.MULTILINE))

    ours = int(re.findall(r"CapPrm:\s+(\S+)", Path("/proc/self/status").read_text())[0], 16)
    assert [int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [
        0,
        ours & left,
        ours & left,
        0,
    ]
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_limits_of_a_process_without_disks() -> None:
    limits = dict(re.findall(r"^Max (.*?) {2,}(\S+) ", status_of("'default'", "limits"), re.MULTILINE))

    assert limits["core file size"] == "0"
    assert OUTPUT <= int(limits["file size"]) < 2 * OUTPUT
    assert SPARE_FILES <= int(limits["open files"]) < SPARE_FILES + 100


def test_the_longest_disk_can_be_written_to_its_end() -> None:
    longest = 1 << 50

    limits = dict(
        re.findall(r"^Max (.*?) {2,}(\S+) ", status_of(f"'default', longest={longest}", "limits"), re.MULTILINE)
    )

    assert int(limits["file size"]) == longest + OUTPUT


def test_a_file_cannot_grow_without_end(folders: list[Path]) -> None:
    jail = """(globals().update(fd=os.open(other / "file", os.O_RDWR)), Jail("default"))[1]"""
    tries = """{"a little": lambda: os.truncate(fd, 1 << 20), "a lot": lambda: os.truncate(fd, 1 << 42)}"""

    found = locked(folders, jail, tries)

    assert found["a little"] == "None"
    assert "File too large" in found["a lot"]


@pytest.mark.parametrize("where", ["work()", "threading.Thread(target=work).start()"])
def test_an_exception_that_nobody_takes_is_still_told(where: str) -> None:
    """Without the lines of the source, which cannot be read any more."""
    program = (
        "import threading\nfrom kvmpy.jail.lock import Jail\n"
        "def work():\n    raise ZeroDivisionError('on purpose')\n"
        f"Jail('default').lock()\n{where}\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)

    assert done.stderr.count("ZeroDivisionError: on purpose") == 1
    assert "in work" in done.stderr
    assert done.returncode == (1 if where == "work()" else 0)
