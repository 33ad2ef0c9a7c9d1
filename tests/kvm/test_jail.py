"""A locked-in kvmpy: what it can still do, and what a thread that a guest has taken over cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import BINARIES

from kvmpy.jail.lock import landlock_abi, why_no_namespaces

SECONDS = 60.0
SECTOR = 512
LEVELS = ("default", "strict")
ROLES = ("vcpu", "loop", "console", "own", "main")
PROBES, WORKING = (str(Path(__file__).with_name(name)) for name in ("probes.py", "working.py"))

# Machine code for 7C00h, real mode; as in test_machine.py.
POWER_OFF = "ba0006 b034 ee fa f4"
TRIPLE_FAULT = "0f011e407c 0f20c0 0c01 0f22c0 0f0b"
PROBE = "bae005 b001 ee ebfe"  # mov dx,5E0h; mov al,1; out dx,al; jmp $
SAY_HI = "baf803 b068 ee b069 ee"
SPIN = "ebfe"
DEATHS = {"fork", "vfork and exec", "exec", "ptrace", "io_uring", "user namespace", "write another process", "thread"}


@pytest.fixture
def image(tmp_path: Path) -> Callable[[str], Path]:
    """A boot sector of this code."""

    def make(code: str) -> Path:
        path = tmp_path / "sector.bin"
        path.write_bytes(bytes.fromhex(code).ljust(SECTOR - 2, b"\0") + b"\x55\xaa")
        return path

    return make


def begin(name: str) -> str:
    """The source of a device at the port of PROBE, but for what a write does."""
    return f"""class {name}(kvmpy.RegisterDevice, span=1):
    VALUE = kvmpy.Reg(0)

    def __init__(self) -> None:
        pass

    def attach(self, board):
        board.pio(0x5E0, self.SPAN, self)

"""


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    if request.param == "strict":
        needs_all()
    return str(request.param)


def needs_all() -> None:
    """Skip where this host has not all that --sandbox strict wants."""
    why = why_no_namespaces() or ("" if landlock_abi() else "no Landlock")
    if why:
        pytest.skip(why)


def boot(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "boot", "--mem", "1M", *map(str, words)]
    settings: dict[str, object] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=SECONDS, **{**settings, **options})  # type: ignore[call-overload, no-any-return]


def probe(level: str, role: str, image: Path, *chosen: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROBES, level, role, str(image), *chosen]
    return subprocess.run(command, timeout=SECONDS, stdin=subprocess.DEVNULL, capture_output=True, text=True)


# What is out of reach.


@pytest.mark.parametrize("role", ROLES)
def test_nothing_that_a_taken_over_thread_tries_succeeds(image: Callable[[str], Path], role: str) -> None:
    done = probe("default", role, image(PROBE))

    found = json.loads(done.stdout)
    assert len(found) >= 40
    refused = ("PermissionError: [Errno 1] ", "PermissionError: [Errno 13] ", "RuntimeError: can't start new thread")
    others = {name: outcome for name, outcome in found.items() if not outcome.startswith(refused)}
    assert set(others) <= {"a new module"}
    assert "done" not in others.values()


def test_without_a_sandbox_the_probes_succeed(image: Callable[[str], Path]) -> None:
    """Or the test above would show nothing."""
    found = json.loads(
        probe(
            "off",
            "vcpu",
            image(PROBE),
            "open /etc/passwd",
            "fork",
            "executable memory",
            "another VM",
            "list a folder",
            "signal to the parent",
            "a new module",
            "thread",
        ).stdout
    )

    assert set(found.values()) == {"done"}


@pytest.mark.parametrize("name", sorted(DEATHS))
def test_strict_ends_a_process_that_tries(image: Callable[[str], Path], name: str) -> None:
    needs_all()

    done = probe("strict", "vcpu", image(PROBE), name)

    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "")


def test_what_strict_refuses_without_ending_the_process(image: Callable[[str], Path]) -> None:
    needs_all()
    names = ("open /etc/passwd", "TCP socket", "executable memory", "signal to the parent", "another VM", "stat")

    done = probe("strict", "loop", image(PROBE), *names)

    found = json.loads(done.stdout)
    assert set(found) == set(names)
    assert "done" not in found.values()


# What goes on as before.


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (POWER_OFF, 0),
        ("b0fe e664 fa f4", 0),
        ("fa f4", 0),
        ("ba0205 b007 ee fa f4", 7),
        (TRIPLE_FAULT, 254),
        (SPIN, 124),
    ],
)
def test_every_ending(image: Callable[[str], Path], level: str, code: str, status: int) -> None:
    done = boot("--sandbox", level, "--timeout", "4", "-q", image(code))

    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize("code", [TRIPLE_FAULT, SPIN])
def test_the_crash_report_is_the_same(image: Callable[[str], Path], level: str, code: str) -> None:
    path = image(SAY_HI + code)
    expected = boot("--sandbox", "off", "--timeout", "2", path)

    done = boot("--sandbox", level, "--timeout", "2", path)

    assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)
    assert "ud2" in done.stderr or "jmp" in done.stderr


def test_the_facts_are_the_same(image: Callable[[str], Path], level: str) -> None:
    path = image(TRIPLE_FAULT)
    expected = json.loads(boot("--sandbox", "off", "--json", path).stdout)

    found = json.loads(boot("--sandbox", level, "--json", path).stdout)

    assert found | {"seconds": 0} == expected | {"seconds": 0}
    assert found["report"]["vcpus"][0]["code"]


def test_a_device_that_fails_is_told_with_its_source(image: Callable[[str], Path], level: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import kvmpy\n\n\n"
        + begin("Broken")
        + "    def write_VALUE(self, value):\n        raise ZeroDivisionError('on purpose')\n"
    )

    done = boot("--sandbox", level, "--device", f"{tmp_path}/broken.py:Broken", image(PROBE))

    assert done.returncode == 255
    assert "ZeroDivisionError: on purpose" in done.stderr
    assert "in write_VALUE" in done.stderr
    assert "with lock:" in done.stderr or "_write" in done.stderr or "vcpu.py" in done.stderr


def test_a_device_that_imports_late_is_told_what_to_do(
    image: Callable[[str], Path], level: str, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(
        "import kvmpy\n\n\n" + begin("Late") + "    def write_VALUE(self, value):\n        import wave\n"
    )

    done = boot("--sandbox", level, "--device", f"{tmp_path}/late.py:Late", image(PROBE))

    assert done.returncode == 255
    assert '"wave" cannot be loaded: kvmpy is locked in; import it where the file of the device begins' in done.stderr
    assert "ud2" not in done.stderr


def test_what_a_balloon_loads_late_is_there(image: Callable[[str], Path], level: str, tmp_path: Path) -> None:
    """With no disk beside it, which loads that too."""
    (tmp_path / "asking.py").write_text(
        "import kvmpy\nfrom kvmpy.core.board import Reason, Stop\n\n\n"
        "class Asking(kvmpy.RegisterDevice, span=1):\n    VALUE = kvmpy.Reg(0)\n\n"
        "    def __init__(self) -> None:\n        pass\n\n"
        "    def attach(self, board):\n        self.board = board\n        board.pio(0x5E0, self.SPAN, self)\n\n"
        "    def write_VALUE(self, value):\n        window = self.board.mem.window(0x2000, 1)\n"
        "        self.board.stop(Stop(Reason.EXIT, status=self.board.mem.address(window) >> 12))\n"
    )

    done = boot(
        *("--sandbox", level, "--device", "virtio-balloon", "--device", f"{tmp_path}/asking.py:Asking"), image(PROBE)
    )

    assert (done.returncode, done.stderr) == (2, "")


def test_a_device_that_hangs_when_the_time_is_up(image: Callable[[str], Path], level: str, tmp_path: Path) -> None:
    """Python ends such a thread with a library that it loads only then, and dies over it."""
    (tmp_path / "slow.py").write_text(
        "import time\n\nimport kvmpy\n\n\n"
        + begin("Slow")
        + "    def write_VALUE(self, value):\n        time.sleep(2.5)\n"
    )

    done = boot("--sandbox", level, "--timeout", "1", "-q", "--device", f"{tmp_path}/slow.py:Slow", image(PROBE))

    assert (done.returncode, done.stdout, done.stderr) == (124, "", "")


def test_a_signal_ends_it(image: Callable[[str], Path], level: str) -> None:
    command = [sys.executable, "-m", "kvmpy", "boot", "--mem", "1M", "--sandbox", level, str(image(SAY_HI + SPIN))]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == "hi"
        process.send_signal(signal.SIGTERM)
        status = process.wait(SECONDS)

    assert status == 128 + signal.SIGTERM


def test_the_console_at_a_file(image: Callable[[str], Path], level: str, tmp_path: Path) -> None:
    done = boot("--sandbox", level, "--serial", f"file={tmp_path}/out", image(SAY_HI + POWER_OFF))

    assert (done.returncode, (tmp_path / "out").read_text()) == (0, "hi")


def test_the_console_at_a_pseudo_terminal(image: Callable[[str], Path], level: str) -> None:
    done = boot("--sandbox", level, "--serial", "pty", image(SAY_HI + POWER_OFF))

    assert done.returncode == 0
    assert done.stderr.startswith("kvmpy: the console is at /dev/pts/")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_console_at_a_socket(image: Callable[[str], Path], level: str, tmp_path: Path, end: signal.Signals) -> None:
    """Clients come and go; the name goes with the machine, however that ends."""
    path = tmp_path / "socket"
    echo = "bafd03 ec a801 74fb baf803 ec ee ebf1"  # what comes goes back: in 3FDh, test, in 3F8h, out 3F8h
    words = ["--mem", "1M", "--sandbox", level, "--serial", f"unix={path}", str(image(echo))]
    with subprocess.Popen([sys.executable, "-m", "kvmpy", "boot", *words], stdin=subprocess.DEVNULL) as process:
        wait_until(path.exists)
        for word in (b"first", b"second"):
            with socket.socket(socket.AF_UNIX) as client:
                wait_until(lambda client=client: client.connect_ex(str(path)) == 0)
                client.sendall(word)
                heard = b""
                while len(heard) < len(word):
                    heard += client.recv(100)
                assert heard == word
            time.sleep(0.1)  # one client at a time
        process.send_signal(end)
        process.wait(SECONDS)

    wait_until(lambda: not path.exists())


def test_output_that_nobody_takes(image: Callable[[str], Path], level: str) -> None:
    with open("/dev/full", "w") as full:
        done = boot(
            "--sandbox", level, "--json", image(POWER_OFF), stdout=full, capture_output=False, stderr=subprocess.PIPE
        )

    assert done.returncode == 125
    assert "cannot write to standard output" in done.stderr


def test_what_is_in_force_is_logged(image: Callable[[str], Path], level: str) -> None:
    done = boot("--sandbox", level, "-v", image(POWER_OFF))

    line = next(line for line in done.stderr.splitlines() if "locked in" in line)
    assert f"sandbox={level}" in line
    assert ("namespaces" in line) == (level == "strict")
    assert all(word in line for word in ("no_new_privs", "rlimits", "no capabilities", "not dumpable", "seccomp"))


def test_no_process_is_left(image: Callable[[str], Path], level: str) -> None:
    boot(
        "--sandbox", level, "--timeout", "1", "-q", image(SPIN), env={**os.environ, "KVMPY_TEST_MARK": f"{os.getpid()}"}
    )

    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if marked(path)]


def test_an_unknown_level(image: Callable[[str], Path]) -> None:
    done = boot("--sandbox", "lax", image(POWER_OFF))

    assert (done.returncode, done.stderr) == (125, 'kvmpy: invalid sandbox "lax"; use strict, default or off\n')


def marked(path: Path) -> bool:
    try:
        return f"KVMPY_TEST_MARK={os.getpid()}".encode() in path.read_bytes()
    except OSError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


@pytest.mark.parametrize(("transport", "guest"), [("mmio", "virtio"), ("pci", "virtio_pci")])
def test_every_device_at_work(level: str, transport: str, guest: str, tmp_path: Path) -> None:
    """A guest reads its disk through eventfds, and all images are written, zeroed and discarded by their threads."""
    if not shutil.which("qemu-img"):
        pytest.skip("no qemu-img")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "qcow2", "8M"], check=True)
    for name in ("raw", "other"):
        (tmp_path / name).write_bytes(b"boot" * (1 << 19))

    done = subprocess.run(
        [sys.executable, WORKING, level, transport, str(tmp_path), str(BINARIES / f"{guest}.bin")],
        timeout=SECONDS,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["stop"] == "EXIT"
    assert found["reports"][-3:] == [513, 0, int.from_bytes(b"boot", "little")]
    assert (found["raw"], found["qcow2"], found["snapshot"]) == (5, 5, 5)
    assert (found["discard"], found["random"], found["report"], found["states"]) == (None, 64, True, 2)
    assert (tmp_path / "raw").read_bytes()[512 * 11 : 512 * 11 + 4] == b"kkkk"
    assert (tmp_path / "other").read_bytes() == b"boot" * (1 << 19)
