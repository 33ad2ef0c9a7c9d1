"""Every thread has a guard: whatever fails on it ends in a stopped machine that says why, never in a silent wedge."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmpy
from kvmpy import Reason
from kvmpy.core.board import Stop
from kvmpy.core.events import EventLoop
from kvmpy.host.disk import Raw
from kvmpy.report import crash_report
from kvmpy.virtio.blk import Blk

SECONDS = 30.0
PORT = 0x5E0
TOUCH = bytes.fromhex("bae005 b001 ee ebfe")  # mov dx,5E0h; mov al,1; out dx,al; jmp $
TALK = bytes.fromhex("baf803 b078 ee ebfe")  # mov dx,3F8h; mov al,'x'; out dx,al; jmp $
TALK_AND_LEAVE = bytes.fromhex("baf803 b078 ee ba0006 b034 ee fa f4")  # ...; mov dx,600h; mov al,34h; out dx,al


def fail(*_: object) -> Any:
    raise ZeroDivisionError("on purpose")


def leave(*_: object) -> Any:
    raise SystemExit(3)


class Broken(kvmpy.RegisterDevice, span=1):
    """A register whose write does `harm`, given this device."""

    VALUE = kvmpy.Reg(0)

    def __init__(self, harm: Callable[[Broken], object]) -> None:
        self.harm = harm

    def attach(self, board: kvmpy.Board) -> None:
        self.board = board
        self.own = board.new_loop("broken")
        board.pio(PORT, self.SPAN, self)

    def write_VALUE(self, value: int) -> None:
        self.harm(self)


class BrokenEnd:
    """A console's end whose `write` fails."""

    def write(self, data: bytes) -> None:
        fail()

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...


def watch(device: Broken) -> None:
    """A descriptor that is ready, on the `io` thread."""
    ready, writing = os.pipe()
    os.write(writing, b"x")
    os.close(writing)

    def failing() -> None:
        device.board.loop.remove(ready)
        os.close(ready)
        fail()

    device.board.loop.add(ready, failing, owner=device)


def hold(device: Broken) -> None:
    """With guest memory in hand, as a device at work for a driver has it."""
    window = device.board.mem.window(0x1000, 16)
    try:
        fail()
    finally:
        window[0] = 1


HARMS: dict[str, Callable[[Broken], object]] = {
    "a register, on a vCPU": fail,
    "a call on the io loop": lambda device: device.board.loop.call_soon(fail, owner=device),
    "a timer on the io loop": lambda device: device.board.loop.after(0.001, fail),
    "a descriptor on the io loop": watch,
    "the loop of one device": lambda device: device.own.call_soon(fail, owner=device),
    "with guest memory in hand, on a vCPU": hold,
    "with guest memory in hand, on the io loop": lambda device: device.board.loop.call_soon(lambda: hold(device)),
    "SystemExit on a vCPU": leave,
    "SystemExit on the io loop": lambda device: device.board.loop.call_soon(leave),
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert [thread for thread in threading.enumerate() if thread not in before] == []


def ending(machine: kvmpy.Machine) -> tuple[Stop, str]:
    """How the machine stopped, and its report."""
    try:
        stop = machine.run(timeout=SECONDS)
        return stop, crash_report(machine, stop)
    finally:
        machine.close()


@pytest.mark.parametrize("harm", HARMS)
def test_a_device_that_fails(image: Callable[[bytes], Path], harm: str) -> None:
    machine = kvmpy.Machine(kernel=image(TOUCH), mem="1M")
    machine.add(Broken(HARMS[harm]))

    stop, report = ending(machine)

    assert (stop.reason, type(stop.cause)) in ((Reason.ERROR, ZeroDivisionError), (Reason.ERROR, SystemExit))
    assert ("in fail" in report and "ZeroDivisionError: on purpose" in report) or "in leave" in report


@pytest.mark.parametrize("code", [TALK, TALK_AND_LEAVE])
def test_a_console_that_fails(image: Callable[[bytes], Path], code: bytes) -> None:
    """Also when the guest has asked for its end meanwhile: what it said last is lost, and that is an error."""
    machine = kvmpy.Machine(kernel=image(code), mem="1M", endpoint=lambda loop, console: BrokenEnd())

    stop, report = ending(machine)

    assert (stop.reason, type(stop.cause)) == (Reason.ERROR, ZeroDivisionError)
    assert "in write" in report


def test_input_that_fails(image: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = kvmpy.Machine(kernel=image(bytes.fromhex("ebfe")), mem="1M")
    monkeypatch.setattr(machine.console, "_feed", fail)
    machine.start()
    machine.console.send("x")

    stop = machine.wait(SECONDS)
    machine.close()

    assert (stop.reason, type(stop.cause)) == (Reason.ERROR, ZeroDivisionError)


def test_a_disk_that_fails(image: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On its own thread."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disk = Blk(path=tmp_path / "disk")
    machine = kvmpy.Machine(kernel=image(bytes.fromhex("ebfe")), mem="1M")
    machine.add(disk)
    machine.start()
    monkeypatch.setattr(Raw, "readv", fail)
    assert isinstance(disk.loop, EventLoop)
    assert disk.loop is not machine.loop
    disk.loop.call_soon(lambda: disk._image and disk._image.readv(0, [memoryview(bytearray(512))]), owner=disk)

    stop = machine.wait(SECONDS)
    machine.close()

    assert (stop.reason, type(stop.cause)) == (Reason.ERROR, ZeroDivisionError)


def test_a_thread_that_cannot_prepare_itself(image: Callable[[bytes], Path]) -> None:
    """As one whose filter cannot be had under --sandbox strict."""
    machine = kvmpy.Machine(kernel=image(bytes.fromhex("ebfe")), mem="1M")
    machine.start(lambda: fail)

    stop = machine.wait(SECONDS)
    machine.close()

    assert (stop.reason, type(stop.cause)) == (Reason.ERROR, ZeroDivisionError)


def test_the_first_error_is_told(image: Callable[[bytes], Path]) -> None:
    def twice(device: Broken) -> None:
        device.board.stop(Stop(Reason.POWEROFF))
        fail()

    machine = kvmpy.Machine(kernel=image(TOUCH), mem="1M")
    machine.add(Broken(twice))

    stop, _ = ending(machine)

    assert (stop.reason, type(stop.cause)) == (Reason.ERROR, ZeroDivisionError)
