"""The guest's first process, run as process 1 of a namespace: what it runs, shows and hands back.

Without the right to use I/O ports it hands the status back on the console, and its power-off ends the namespace.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.boot import cpio, initramfs

GUESTS = Path(__file__).parents[2] / "guests"
LIMIT = 30  # seconds
# A user namespace takes away every right outside it: no port, no /dev/mem, no reboot of this machine.
UNSHARE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    "--uts",
    "--net",
    "--ipc",
]
BUSYBOX = initramfs.find_busybox()
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="no static busybox here (package busybox-static)")


def namespaces_missing() -> str:
    if not shutil.which("unshare"):
        return "no unshare here (package util-linux)"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=LIMIT)
    return os.fsdecode(done.stderr).strip() if done.returncode else ""


MISSING = namespaces_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init") / "init"
    subprocess.run(["make", "-s", "-C", GUESTS, "init", f"INIT={path}"], check=True, timeout=LIMIT)
    return path


@pytest.fixture
def root(tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where images are unpacked; `proc` is a file, so that this machine's settings cannot be reached."""
    monkeypatch.setattr(initramfs, "INIT", init)
    (tmp_path / "proc").write_text("")
    return tmp_path


def unpack(image: bytes, root: Path) -> list[str]:
    """Unpack all but devices; the command that runs its init."""
    entries, _ = cpio.read(image)
    for entry in entries:
        path = root / entry.name
        data = bytes(entry.data)
        if entry.name == "proc":
            continue
        if stat.S_ISDIR(entry.mode):
            path.mkdir()
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(os.fsdecode(data))
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(data)
            path.chmod(stat.S_IMODE(entry.mode))
    (root / "dev/null").write_text("")
    return [*UNSHARE, "chroot", str(root), "/init"]


def run(image: bytes, root: Path) -> tuple[bytes, int]:
    """What the command shows and the status that init hands back."""
    done = subprocess.run(unpack(image, root), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)
    match = re.fullmatch(rb"(.*)\nkvmpy-exit: ([0-9]+)\n", done.stdout, re.DOTALL)
    assert match, done
    return match[1], int(match[2])


@needs_busybox
@pytest.mark.parametrize(
    ("command", "shown", "status"),
    [
        ("exit 0", b"", 0),
        ("exit 255", b"", 255),
        ("printf 'no end of line'; exit 3", b"no end of line", 3),
        ("echo out; echo err >&2; echo out", b"out\nerr\nout\n", 0),
        ("echo one\necho 'two\nlines'\nfalse", b"one\ntwo\nlines\n", 1),
        ("kill -KILL $$", b"", 137),
        ("kill -SEGV $$", b"", 139),
        ("exec /nowhere 2>&-", b"", 127),
        ("cat; [ -t 1 ]", b"", 1),
        ("pwd; echo $HOME $0; umask", b"/\n/root sh\n0022\n", 0),
        ("#!/bin/sh -e\necho script\nfalse\necho not shown\n", b"script\n", 1),
    ],
)
def test_a_shell_command(root: Path, command: str, shown: bytes, status: int) -> None:
    assert run(initramfs.build(exec=command), root) == (shown, status)


@pytest.mark.parametrize(
    ("command", "shown", "status"),
    [
        ("/init", b"kvmpy init: this is the first process of a kvmpy guest; it does nothing elsewhere\n", 2),
        ("nothing like it", b"kvmpy init: nothing: not found\n", 127),
        ("/etc/passwd", b"kvmpy init: /etc/passwd: not executable\n", 126),
        ("/etc", b"kvmpy init: /etc: not executable\n", 126),
        ("tool", b"kvmpy init: /usr/bin/tool: wrong format\n", 126),
        (
            "script",
            b"kvmpy init: what must load or interpret this program is not in the image: /usr/bin/script\n",
            127,
        ),
    ],
)
def test_a_command_without_a_shell(root: Path, command: str, shown: bytes, status: int) -> None:
    (root / "host").mkdir()
    (root / "host/tool").write_text("no program")
    (root / "host/tool").chmod(0o755)
    (root / "host/script").write_text("#!/bin/nowhere\n")
    (root / "host/script").chmod(0o755)

    image = initramfs.build(busybox=None, files=[(root / "host", "/bin")], exec=command)

    assert run(image, root) == (shown, status)


@needs_busybox
def test_volumes_that_cannot_be_mounted(root: Path) -> None:
    volumes = [("volume0", "/deep/er/src", True), ("volume1", "/out", False)]

    shown, status = run(initramfs.build(exec="ls -d /deep/er/src /out", volumes=volumes), root)

    assert status == 0
    assert re.fullmatch(
        rb"kvmpy init: cannot mount the volume /deep/er/src: .+\n"
        rb"kvmpy init: cannot mount the volume /out: .+\n/deep/er/src\n/out\n",
        shown,
    )


@needs_busybox
def test_much_output_comes_whole(root: Path) -> None:
    shown, status = run(initramfs.build(exec="seq 200000; exit 4"), root)

    assert shown == b"".join(b"%d\n" % i for i in range(1, 200001))
    assert status == 4


@needs_busybox
def test_what_a_command_leaves_running_is_ended(root: Path) -> None:
    """It holds the output open and ignores SIGTERM; also, an orphan that ends is not taken for the command."""
    command = "(sleep 0.2; exit 9) & (trap '' TERM; while :; do sleep 1; done) & sleep 0.5; echo done; exit 5"

    assert run(initramfs.build(exec=command), root) == (b"done\n", 5)


@needs_busybox
def test_orphans_that_end_are_reaped(root: Path) -> None:
    """Each of the 100 is a child's child; `kill -0` finds zombies too."""
    orphans = "i=0; while [ $i -lt 100 ]; do (true &); i=$((i+1)); done; sleep 0.5"
    count = (
        "n=0; p=$$; while [ $p -lt $(($$+250)) ]; do p=$((p+1)); kill -0 $p && n=$((n+1)); done 2>/dev/null; echo $n"
    )

    assert run(initramfs.build(exec=f"{orphans}; {count}"), root) == (b"0\n", 0)


@needs_busybox
@pytest.mark.parametrize(
    ("sent", "ending"),
    # reboot(2) in a namespace: power-off is SIGINT, restart is SIGHUP to whoever waits for its first process
    [("USR1", signal.SIGINT), ("USR2", signal.SIGINT), ("TERM", signal.SIGHUP), ("INT", signal.SIGHUP)],
)
def test_the_signals_of_busybox_poweroff_and_reboot(root: Path, sent: str, ending: int) -> None:
    image = initramfs.build(exec=f"echo before; kill -{sent} 1; sleep 20; echo after")

    done = subprocess.run(unpack(image, root), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)

    assert done.stdout == b"before\n"
    assert done.returncode in (-ending, 128 + ending)


def test_a_module_that_cannot_be_loaded_is_told_and_the_command_runs(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("modules") / "6.1.0"
    (folder / "kernel").mkdir(parents=True)
    (folder / "modules.dep").write_text("kernel/a.ko:\n")
    (folder / "kernel/a.ko").write_bytes(b"\x7fELF")

    shown, status = run(initramfs.build(busybox=None, modules=["a"], modules_dir=folder, exec="/init"), root)

    assert re.match(rb"kvmpy init: cannot load module /lib/modules/6\.1\.0/kernel/a\.ko: error [0-9]+\n", shown)
    assert status == 2


class Terminal:
    """A process with a terminal, and what it has shown."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._fd, end = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, env={**os.environ, **environment}, start_new_session=True
        )
        os.close(end)
        self.shown = b""

    def expect(self, text: str) -> str:
        """Read on until `text` has come; what came up to its end."""
        deadline = time.monotonic() + LIMIT
        while text.encode() not in self.shown:
            readable, _, _ = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._fd, 65536)
        end = self.shown.index(text.encode()) + len(text)
        before, self.shown = self.shown[:end], self.shown[end:]
        return before.decode()

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)
        os.close(self._fd)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def ended(terminal: Terminal) -> int:
    return terminal.process.wait(LIMIT)


def test_the_prompt_without_a_shell(root: Path, terminals: list[Terminal]) -> None:
    (root / "note").write_text("some text\n")
    image = initramfs.build(busybox=None, files=[(root / "note", "/etc/note")])
    terminal = Terminal(unpack(image, root), TERM="linux")
    terminals.append(terminal)

    assert re.search(r"kvmpy init: userspace after [0-9]+\.[0-9]{2} s \(kernel ", terminal.expect("kvmpy> "))
    terminal.type("help\n")
    assert "poweroff" in terminal.expect("kvmpy> ")
    terminal.type("  cat\t/etc/note  /nowhere\n")
    assert "some text\r\nkvmpy init: cat: /nowhere: not found\r\n" in terminal.expect("kvmpy> ")
    terminal.type("ls /etc/kvmpy/..\n")
    assert {"note", "passwd", "hosts"} < set(terminal.expect("kvmpy> ").split())
    terminal.type("\n")
    terminal.expect("kvmpy> ")
    terminal.type("x" * 3000 + "\n")
    terminal.expect("kvmpy init: xxx")
    terminal.expect("kvmpy> ")
    terminal.type("/init\n")
    terminal.expect("does nothing elsewhere")
    terminal.type("exit\n")
    assert ended(terminal) in (-signal.SIGINT, 128 + signal.SIGINT)


def test_ctrl_c_at_the_prompt_ends_the_program_alone(root: Path, terminals: list[Terminal]) -> None:
    image = initramfs.build(busybox=None)
    command = unpack(image, root)
    os.mkfifo(root / "fifo")
    terminal = Terminal(command)
    terminals.append(terminal)

    terminal.expect("kvmpy> ")
    terminal.type("\x03")
    terminal.type("cat /fifo\n")
    with (root / "fifo").open("wb"):  # waits until the program has opened it
        terminal.expect("cat /fifo\r\n")
        terminal.type("\x03")
        terminal.expect("kvmpy> ")
    terminal.type("reboot\n")

    assert ended(terminal) in (-signal.SIGHUP, 128 + signal.SIGHUP)


@needs_busybox
def test_the_shell_has_job_control_and_the_users_terminal(root: Path, terminals: list[Terminal]) -> None:
    os.mkfifo(root / "fifo")
    terminal = Terminal(unpack(initramfs.build(), root), TERM="xterm-test", LINES="40", COLUMNS="132")
    terminals.append(terminal)

    assert "job control turned off" not in terminal.expect("/ # ")
    terminal.type("echo $TERM; stty size\n")
    assert "xterm-test\r\n40 132\r\n" in terminal.expect("132\r\n")
    terminal.type("cat /fifo\n")
    with (root / "fifo").open("wb"):  # waits until the program has opened it
        terminal.type("\x03")
        terminal.expect("^C")
        terminal.expect("/ # ")
    terminal.type("echo status $?\n")
    terminal.expect("status 130")
    terminal.type("exit 3\n")

    assert "kvmpy-exit" not in terminal.shown.decode()
    assert ended(terminal) in (-signal.SIGINT, 128 + signal.SIGINT)


def test_nothing_happens_outside_a_guest(init: Path) -> None:
    done = subprocess.run([init], capture_output=True, timeout=LIMIT)

    assert done.returncode == 2
    assert b"does nothing elsewhere" in done.stdout
