"""The virtio console of Linux: hvc0 and ports with names (virtio/console.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from command import KVMPY, Start

import kvmpy
from kvmpy.virtio.console import Port, VirtioConsole

LIMIT = 60.0  # seconds, for anything the guest does


def ask(vm: kvmpy.Machine, command: str) -> str:
    """The output of `command` in the guest's shell."""
    vm.console.send(f"echo begin-$((6*7)); {command}; echo end-$((6*7))\n")
    vm.wait_for_console("begin-42\r\n", LIMIT)
    return vm.wait_for_console(r"(?s).*?end-42\r\n", LIMIT).removesuffix("end-42\r\n")


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def collect(port: Port) -> bytearray:
    """All that the guest will write to the port."""
    data = bytearray()
    port.on_data = data.extend
    return data


def test_hvc0_and_a_named_port(cloud: Path) -> None:
    """Two devices: one with a console alone, which is hvc0, one with a console and a port."""
    single, many = VirtioConsole(), VirtioConsole(ports=3)
    agent = many.add_port("org.example.agent")
    console, second, heard = collect(single.ports[0]), collect(many.ports[0]), collect(agent)
    vm = kvmpy.Machine(kernel=cloud, append="quiet", modules=["virtio_mmio", "virtio_console"])
    vm.add(single)
    vm.add(many)

    with vm:
        vm.wait_for_console("# ", LIMIT)
        ask(vm, "exec 3<>/dev/hvc0 4<>/dev/hvc1")
        names = ask(vm, "cat /sys/class/virtio-ports/*/name; echo hi >&3; echo hello >&4; echo text >/dev/vport1p1")
        with single.lock:
            single.resize(132, 43)
            single.receive(b"typed\n")
        typed = ask(vm, "head -n 1 <&3; stty size <&3")
        with many.lock:
            many.resize(100, 30)
            many.add_port("late")
        resized = ask(vm, "sleep 0.2; stty size <&4; cat /sys/class/virtio-ports/*/name")
        closed = agent.listening
        vm.console.send("head -n 1 </dev/vport1p1\n")
        opened = wait_until(lambda: agent.listening)
        with many.lock:
            agent.write(b"to-the-agent\n")
        vm.wait_for_console(r"to-the-agent\r\n", LIMIT)
        much = ask(vm, "stty raw -echo <&3; head -c 1000000 /dev/zero >&3; echo $?")
        complete = wait_until(lambda: console.count(0) == 1_000_000)

    assert names == "org.example.agent\r\n"
    assert console.startswith(b"hi\r\n")
    assert (second, heard) == (b"hello\r\n", b"text\n")
    assert typed == "typed\r\n43 132\r\n"
    assert resized == "30 100\r\norg.example.agent\r\nlate\r\n"
    assert (closed, opened) == (False, True)
    assert (much, complete) == ("0\r\n", True)


def test_hvc0_is_the_console(start: Start, cloud: Path) -> None:
    """The shell is on it, and follows the size of the user's terminal."""
    console = start(KVMPY, "boot", "-k", cloud, "--console", "virtio", "--append", "quiet", terminal=True)
    console.resize(100, 30)

    console.expect("# ")
    console.type("tty; stty size\r")
    first = console.expect(r"/dev/hvc0\r+\n[0-9]+ [0-9]+\r+\n")
    console.resize(132, 43)
    console.type("sleep 0.5; stty size\r")
    second = console.expect(r"\n[0-9]+ [0-9]+\r+\n")
    console.type("exit\r")
    done = console.end()

    assert (first.split(), second.split()) == (["/dev/hvc0", "30", "100"], ["43", "132"])
    assert done.status == 0
