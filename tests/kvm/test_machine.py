"""A whole Machine, and the command line around it, with real-mode guests of a few bytes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvmpy
from kvmpy import Reason
from kvmpy.core.errors import NotFoundError
from kvmpy.x86 import layout

SECONDS = 30.0

# Machine code for 7C00h, real mode.
POWER_OFF = bytes.fromhex("ba0006 b034 ee fa f4")  # mov dx,600h; mov al,34h (SLP_EN, S5); out dx,al; cli; hlt
RESET = bytes.fromhex("b0fe e664 fa f4")  # mov al,FEh; out 64h,al; cli; hlt
HALT = bytes.fromhex("fa f4")  # cli; hlt
SPIN = bytes.fromhex("ebfe")  # jmp $
# lidt [7C20h] (zeros); mov eax,cr0; or al,1; mov cr0,eax; ud2: protected mode without an IDT
TRIPLE_FAULT = bytes.fromhex("0f011e207c 0f20c0 0c01 0f22c0 0f0b")
EXIT_7 = bytes.fromhex("ba0205 b007 ee fa f4")  # mov dx,502h; mov al,7; out dx,al; cli; hlt
IDLE = bytes.fromhex("fb f4 ebfc")  # sti; hlt; jmp back: halted, but an interrupt would wake it
CHATTER = bytes.fromhex("baf803 b078 ee ebfd")  # mov dx,3F8h; mov al,'x'; out dx,al; jmp back


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `kvmpy boot`; what still runs when the test ends is killed."""
    with ExitStack() as stack:

        def make(*words: object, **options: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "kvmpy", "boot", *map(str, words)]
            process: subprocess.Popen[str] = subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload]
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield make


def boot(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`kvmpy boot`, with captured output and a closed input unless said otherwise."""
    command = [sys.executable, "-m", "kvmpy", "boot", *map(str, words)]
    settings: dict[str, object] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=SECONDS, **{**settings, **options})  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (POWER_OFF, Reason.POWEROFF),
        (RESET, Reason.RESET),
        (HALT, Reason.HALT),
        (TRIPLE_FAULT, Reason.TRIPLE_FAULT),
        (EXIT_7, Reason.EXIT),
        (IDLE, Reason.TIMEOUT),
        (SPIN, Reason.TIMEOUT),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_why_a_machine_stops(image: Callable[[bytes], Path], code: bytes, reason: Reason) -> None:
    with kvmpy.Machine(kernel=image(code), mem="1M") as vm:
        stop = vm.wait(timeout=4 if reason is Reason.TIMEOUT else SECONDS)

    assert stop.reason is reason


@pytest.mark.parametrize(
    ("code", "status"), [(POWER_OFF, 0), (RESET, 0), (HALT, 0), (EXIT_7, 7), (TRIPLE_FAULT, 254), (SPIN, 124)]
)
def test_exit_status(image: Callable[[bytes], Path], code: bytes, status: int) -> None:
    done = boot(image(code), "--timeout", "4", "-q")

    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_output_and_outcome_as_json(image: Callable[[bytes], Path]) -> None:
    done = boot(image(bytes.fromhex("baf803 b068 ee b069 ee") + POWER_OFF), "--json")  # "hi"

    outcome = json.loads(done.stdout)
    assert (outcome["reason"], outcome["status"], outcome["console"], outcome["protocol"]) == (
        "poweroff",
        0,
        "hi",
        "flat",
    )


def test_debug_ports_reach_the_console(image: Callable[[bytes], Path]) -> None:
    done = boot(image(bytes.fromhex("b041 e6e9 ba0204 b042 ee") + POWER_OFF))  # 'A' to E9h, 'B' to 402h

    assert done.stdout == "AB"


def test_a_users_device(image: Callable[[bytes], Path]) -> None:
    class Doubler(kvmpy.RegisterDevice, span=1):
        VALUE = kvmpy.Reg(0)

        def attach(self, board: kvmpy.Board) -> None:
            board.pio(0x5E0, self.SPAN, self)

        def read_VALUE(self) -> int:
            return self.VALUE * 2

    doubler = Doubler()
    # mov dx,5E0h; mov al,21; out dx,al; in al,dx; mov dx,502h; out dx,al
    vm = kvmpy.Machine(kernel=image(bytes.fromhex("bae005 b015 ee ec ba0205 ee fa f4")))
    vm.add(doubler)

    stop = vm.run(timeout=SECONDS)
    vm.close()

    assert (stop.reason, stop.status, doubler.VALUE) == (Reason.EXIT, 42, 21)


def test_a_device_that_fails_stops_the_machine_loudly(image: Callable[[bytes], Path]) -> None:
    class Broken(kvmpy.RegisterDevice, span=1):
        VALUE = kvmpy.Reg(0)

        def attach(self, board: kvmpy.Board) -> None:
            board.pio(0x5E0, self.SPAN, self)

        def write_VALUE(self, value: int) -> None:
            raise ZeroDivisionError("on purpose")

    vm = kvmpy.Machine(kernel=image(bytes.fromhex("bae005 ee ebfe")))
    vm.add(Broken())

    stop = vm.run(timeout=SECONDS)
    vm.close()

    assert stop.reason is Reason.ERROR
    assert "on purpose" in stop.detail
    assert isinstance(stop.cause, ZeroDivisionError)


def test_registers_and_memory_while_it_runs(image: Callable[[bytes], Path]) -> None:
    with kvmpy.Machine(kernel=image(SPIN), mem="1M") as vm:
        rip = vm.regs().rip
        code = vm.memory.read(layout.BOOT_SECTOR, len(SPIN))
        with vm.paused() as vcpus:
            standing = vcpus[0].regs()
        again = vm.regs()

    assert rip == standing.rip == again.rip == layout.BOOT_SECTOR
    assert code == SPIN


def test_the_machine_leaves_nothing_behind(image: Callable[[bytes], Path]) -> None:
    with kvmpy.Machine(kernel=image(POWER_OFF), mem="1M") as vm:  # the first machine loads what is loaded lazily
        vm.wait(timeout=SECONDS)
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()

    for _ in range(20):
        with kvmpy.Machine(kernel=image(SPIN), mem="1M", cpus=2):
            pass

    assert set(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


def test_a_failed_start_leaves_nothing_behind(tmp_path: Path, image: Callable[[bytes], Path]) -> None:
    class Greedy(kvmpy.RegisterDevice, span=1):
        VALUE = kvmpy.Reg(0)

        def attach(self, board: kvmpy.Board) -> None:
            board.pio(layout.PORT_COM1, self.SPAN, self)

    before = set(os.listdir("/proc/self/fd"))

    vm = kvmpy.Machine(kernel=image(HALT), mem="1M")
    vm.add(Greedy())
    with pytest.raises(ValueError, match="overlaps Serial"):
        vm.start()
    vm.close()

    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("words", "message"), [(["--cpus", "4000"], "--cpus"), (["--mem", "900G"], "more than")])
def test_more_than_the_host_has(image: Callable[[bytes], Path], words: list[str], message: str) -> None:
    done = boot(image(HALT), *words)

    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, "", 1)
    assert message in done.stderr


def test_a_slow_reader_gets_the_last_byte(
    image: Callable[[bytes], Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    # mov dx,3F8h; mov al,'x'; mov cx,0; next: out dx,al; loop next; once more; then power off
    process = start(
        image(bytes.fromhex("baf803 b078 b90000 ee e2fd b90000 ee e2fd") + POWER_OFF),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None

    time.sleep(6)  # the guest is done; a pipe holds half of what it has printed
    still_there = process.poll() is None
    output = process.stdout.read()

    assert still_there
    assert output == "x" * 2 * 65536
    assert process.wait(SECONDS) == 0


# Stopping the process, in any state.


@pytest.mark.parametrize("code", [SPIN, IDLE, CHATTER], ids=["spinning", "halted", "printing to a pipe nobody reads"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_process(
    image: Callable[[bytes], Path], start: Callable[..., subprocess.Popen[str]], code: bytes, number: signal.Signals
) -> None:
    process = start(image(code), "-v", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    line = process.stderr.readline()  # of -v, just before the guest starts
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(number)
    status = process.wait(SECONDS)
    took = time.monotonic() - begin

    assert "boot" in line
    assert status == 128 + number
    assert took < SECONDS / 2  # the promise is 2 s; on a busy test machine, that it does not hang


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """(master, slave) of a pseudo-terminal."""
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_console_on_a_terminal(
    image: Callable[[bytes], Path], start: Callable[..., subprocess.Popen[str]], terminal: tuple[int, int]
) -> None:
    # echo: in al,3FDh; test al,1; jz echo; in al,3F8h; out 3F8h,al; jmp echo
    echo = image(bytes.fromhex("bafd03 ec a801 74f8 baf803 ec ee ebf1"))
    master, slave = terminal
    before = termios.tcgetattr(slave)

    process = start(echo, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    wait_for_raw_mode(slave)
    raw = termios.tcgetattr(slave)
    shown = type_until(master, b"abc\x03", b"abc\x03")
    shown += type_until(master, b"\x01h", b"stop the machine")
    shown += type_until(master, b"\x01\x01", b"\x01")
    os.write(master, b"\x01x")
    status = process.wait(SECONDS)

    assert status == 0, shown
    assert not raw[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    assert termios.tcgetattr(slave) == before


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGSEGV, -signal.SIGSEGV)],
)
def test_the_terminal_is_restored_whatever_ends_the_process(
    image: Callable[[bytes], Path],
    start: Callable[..., subprocess.Popen[str]],
    terminal: tuple[int, int],
    number: signal.Signals,
    expected: int,
) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)

    process = start(image(CHATTER), stdin=slave, stdout=slave, stderr=slave)
    read_until(master, b"xxx")
    raw = termios.tcgetattr(slave)
    process.send_signal(signal.SIGWINCH)
    process.send_signal(number)
    status = process.wait(SECONDS)

    assert raw[3] != before[3]
    assert status == expected
    wait_until(lambda: termios.tcgetattr(slave) == before)


def wait_for_raw_mode(slave: int) -> None:
    """What is typed before that is for the terminal driver."""
    wait_until(lambda: not termios.tcgetattr(slave)[3] & termios.ISIG)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def type_until(master: int, keys: bytes, wanted: bytes) -> bytes:
    """Type `keys`; what is shown, up to `wanted`."""
    os.write(master, keys)
    return read_until(master, wanted)


def read_until(master: int, wanted: bytes) -> bytes:
    shown = b""
    while wanted not in shown:
        ready, _, _ = select.select([master], [], [], SECONDS)
        assert ready, f"no {wanted!r} in {shown!r}"
        shown += os.read(master, 4096)
    return shown


# What keeps Linux from its virtio devices. The kernel is an ELF file that halts: nothing of it has to run.


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    """A kernel with `text` in it, for a host that could run it."""
    monkeypatch.setattr("kvmpy.kvm.probe.runs_ring0_natively", lambda kvm: True)
    monkeypatch.setattr("kvmpy.core.log.log._logger", None)  # it holds on to the standard error of an earlier test

    def make(text: bytes = b"") -> Path:
        content = HALT + b"\0" + text
        ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
        header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, 1 << 20, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        program = struct.pack("<IIQQQQQQ", 1, 7, 120, 1 << 20, 1 << 20, len(content), len(content), 4)
        (tmp_path / "vmlinux").write_bytes(header + program + content)
        return tmp_path / "vmlinux"

    return make


@pytest.mark.parametrize("options", [{"append": "acpi=off"}, {"cmdline": "console=ttyS0 pci=off"}])
def test_a_command_line_without_pci(linux: Callable[..., Path], options: dict[str, str]) -> None:
    machine = kvmpy.Machine(kernel=linux(), transport="pci", devices=["virtio-rng"], **options)

    word = "acpi=off|pci=off"
    with pytest.raises(
        kvmpy.ConfigError, match=rf"with ({word}) on its .*; leave ({word}) out, or use --transport mmio"
    ):
        machine.start()


@pytest.mark.parametrize(
    "options", [{"transport": "mmio", "append": "pci=off"}, {"transport": "pci", "append": "pci=off", "devices": []}]
)
def test_a_command_line_without_pci_that_does_no_harm(linux: Callable[..., Path], options: dict[str, str]) -> None:
    with kvmpy.Machine(kernel=linux(), **{"devices": ["virtio-rng"], **options}) as machine:
        assert machine.cmdline.endswith("pci=off")


@pytest.mark.parametrize(
    ("text", "transport", "missing"),
    [
        (b"", "mmio", "virtio_mmio, virtio_rng"),
        (b"\0virtio-mmio\0", "mmio", "virtio_rng"),
        (b"\0virtio_rng\0", "pci", "virtio_pci"),
    ],
)
def test_drivers_that_are_nowhere(
    linux: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str], text: bytes, transport: str, missing: str
) -> None:
    with kvmpy.Machine(kernel=linux(text), transport=transport, devices=["virtio-rng"]):
        pass

    (line,) = capsys.readouterr().err.splitlines()
    assert f"vmlinux has no {missing} built in, and it tells no version to find modules by; give the folder" in line
    assert "--modules-dir" in line


@pytest.mark.parametrize("options", [{}, {"initrd": []}])
def test_drivers_that_nobody_misses(
    linux: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str], options: dict[str, list[str]]
) -> None:
    text = b"" if options else b"\0virtio-mmio\0virtio_rng\0"
    with kvmpy.Machine(kernel=linux(text), devices=["virtio-rng"], **options):
        pass

    assert capsys.readouterr().err == ""


def test_modules_where_the_user_says(linux: Callable[[bytes], Path], tmp_path: Path) -> None:
    machine = kvmpy.Machine(kernel=linux(b""), devices=["virtio-rng"], modules_dir=tmp_path / "none")

    with pytest.raises(NotFoundError, match=rf"no modules folder {tmp_path}/none"):
        machine.start()
