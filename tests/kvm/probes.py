"""A program that boots a guest of one port write and tries, on a thread of each role, what must not work any more.

    python probes.py LEVEL ROLE IMAGE [PROBE]    prints {probe: "done" or why not} as JSON; with PROBE, only that one

Roles: vcpu (in a device's register), loop (the `io` thread), console, own (a loop of one device), main (while the guest
runs).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import kvmpy
from kvmpy._kvm_ioctls import ffi, lib
from kvmpy.core.board import Board
from kvmpy.jail.lock import Jail

SECONDS = 20.0
PORT = 0x5E0
LEVEL, ROLE, IMAGE = sys.argv[1:4]
CHOSEN = sys.argv[4:]
PAGE = mmap.mmap(-1, mmap.PAGESIZE)
PAGE_ADDRESS = ctypes.addressof(ctypes.c_char.from_buffer(PAGE))
TEXT = bytearray(b"/\0")
PARENT = os.getppid()


def raw(number: int, *arguments: int) -> None:
    """A system call by its number; raises OSError."""
    result = lib.kvmpy_syscall(number, *arguments, *[0] * (5 - len(arguments)))
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def new_thread() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def at(text: bytearray) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(text)))


PROBES: dict[str, Callable[[], object]] = {
    "open /etc/passwd": lambda: Path("/etc/passwd").read_bytes(),
    "make a file": lambda: os.open("/tmp/kvmpy-probe", os.O_CREAT | os.O_WRONLY),
    "list a folder": lambda: os.listdir("/"),
    "stat": lambda: Path("/etc/passwd").stat(),
    "remove a file": lambda: Path(IMAGE).unlink(),
    "write /proc/self/mem": lambda: os.open("/proc/self/mem", os.O_RDWR),
    "TCP socket": socket.socket,
    "UNIX socket": lambda: socket.socket(socket.AF_UNIX),
    "socket pair": socket.socketpair,
    "connect": lambda: raw(42, 0, PAGE_ADDRESS, 16),
    "bind": lambda: raw(49, 0, PAGE_ADDRESS, 16),
    "openat2": lambda: raw(437, (1 << 64) - 100, at(TEXT), PAGE_ADDRESS, 24),
    "open by handle": lambda: raw(304, 0, PAGE_ADDRESS, 0),
    "rename a file": lambda: Path(IMAGE).rename(IMAGE + "2"),
    "descriptor of the parent": lambda: raw(438, 0, 0, 0),
    "the user's rights": lambda: raw(105, 0),  # setuid
    "fork": fork,
    "vfork and exec": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "signal to the parent": lambda: os.kill(PARENT, 0),
    "signal to a thread of the parent": lambda: raw(234, PARENT, PARENT, 0),
    "pidfd of the parent": lambda: os.pidfd_open(PARENT),
    "ptrace": lambda: raw(101, 0),  # PTRACE_TRACEME
    "read another process": lambda: raw(310, PARENT, 0, 0, 0, 0),
    "write another process": lambda: raw(311, PARENT, 0, 0, 0, 0),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "memory made executable": lambda: raw(10, PAGE_ADDRESS, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC),
    "user namespace": lambda: raw(272, 0x10000000),
    "namespace of files": lambda: raw(272, 0x20000),
    "chroot": lambda: os.chroot("/"),
    "mount": lambda: raw(165, at(TEXT), at(TEXT), at(TEXT), 0x1000),
    "io_uring": lambda: raw(425, 1, PAGE_ADDRESS),
    "bpf": lambda: raw(321, 0, PAGE_ADDRESS, 128),
    "userfaultfd": lambda: raw(323, 1),
    "perf_event_open": lambda: raw(298, PAGE_ADDRESS, 0, 0, 0, 0),
    "memfd": lambda: os.memfd_create("probe"),
    "key ring": lambda: raw(250, 0, 0xFFFFFFFD, 1),  # KEYCTL_GET_KEYRING_ID, of this session
    "dumpable again": lambda: raw(157, 4, 1),  # PR_SET_DUMPABLE
    "another VM": lambda: raw(16, MACHINE.kvm.fd, 0xAE01, 0),
    "typing at the terminal": lambda: raw(16, 0, 0x5412, PAGE_ADDRESS),  # TIOCSTI
    "a new module": lambda: __import__("wave"),
}
if ROLE != "main":
    PROBES["thread"] = new_thread


def probe() -> None:
    for name, attempt in PROBES.items():
        if CHOSEN and name not in CHOSEN:
            continue
        try:
            attempt()
        except (OSError, RuntimeError, ImportError) as error:
            FOUND[name] = f"{type(error).__name__}: {error}"
        else:
            FOUND[name] = "done"
    OVER.set()


class Probe(kvmpy.RegisterDevice, span=1):
    VALUE = kvmpy.Reg(0)

    def attach(self, board: Board) -> None:
        board.pio(PORT, self.SPAN, self)
        self.loop = board.new_loop("probe") if ROLE == "own" else board.loop
        self.loop = MACHINE._console_loop if ROLE == "console" else self.loop

    def write_VALUE(self, value: int) -> None:
        if ROLE == "vcpu":
            probe()
        elif ROLE != "main":
            self.loop.call_soon(probe)


FOUND: dict[str, str] = {}
OVER = threading.Event()
JAIL = Jail(LEVEL)


def lock_down() -> Callable[[str], None]:
    JAIL.lock()
    return JAIL.enter


MACHINE = kvmpy.Machine(kernel=IMAGE, mem="1M")
MACHINE.add(Probe())
MACHINE.start(None if LEVEL == "off" else lock_down)
if ROLE == "main":
    probe()
OVER.wait(SECONDS)
MACHINE.close()
with suppress(BrokenPipeError):
    print(json.dumps(FOUND), flush=True)
