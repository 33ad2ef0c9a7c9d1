"""What a stopped machine leaves behind, as plain values from which another process makes the report.

A process that is locked in can neither load a disassembler nor read source files. It sends `gather`'s values, which
marshal can carry; the other one wraps them in a Body, which evidence.py takes for the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .core.board import Reason, Stop
from .core.errors import GuestMemoryError, KvmError
from .core.record import Record
from .core.typed import Any
from .kvm import exits
from .kvm.handle import Kvm
from .kvm.state import DescriptorTable, Regs, Segment, Sregs
from .x86.layout import PAGE

PAGES_AROUND = 1  # of the code and the stack of each CPU that are kept, before and behind
MAX_CAUSES = 8  # exceptions behind one another
MAX_FRAMES = 12  # of each, the last ones

Frames = list[tuple[str, int, str]]  # file, line, function


def gather(machine: Any, stop: Stop) -> dict[str, Any]:
    """The remains of a machine whose `wait` has returned `stop` and that is not closed yet; imports nothing."""
    return {
        "stop": (stop.reason.name, stop.detail, stop.status),
        "console": machine.console.text,
        "protocol": machine.entry.protocol,
        "cmdline": machine.cmdline,
        "mem": machine.config.mem,
        "ports": _devices(machine.board.ports),
        "mmio": _devices(machine.board.memory_bus),
        "vcpus": [_vcpu(thread, machine.memory) for thread in machine.vcpus],
    }


def causes(error: BaseException | None) -> list[tuple[str, Frames]]:
    """An exception and those behind it, the first one first: its name and text, and where it came from."""
    found: list[tuple[str, Frames]] = []
    while error is not None and len(found) < MAX_CAUSES:
        frames: Frames = []
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            frames.append((code.co_filename, trace.tb_lineno, code.co_name))
            trace = trace.tb_next
        found.insert(0, (f"{type(error).__name__}: {error}", frames[-MAX_FRAMES:]))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def _devices(bus: Any) -> list[tuple[int, int, str]]:
    return [(base, end, type(device).__name__) for base, end, device in bus.ranges]


def _vcpu(thread: Any, memory: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "index": thread.vcpu.index,
        "recent": [tuple(exit) for exit in thread.recent()],
        "page": bytes(thread.vcpu.page[:PAGE]),
        "joined": thread.join(0),
        "pages": {},
    }
    if not found["joined"]:
        return found
    try:
        regs, sregs = thread.vcpu.regs(), thread.vcpu.sregs()
        found["state"] = (
            vars(regs),
            {name: _plain(value) for name, value in vars(sregs).items()},
            thread.vcpu.mp_state(),
        )
        for address in _addresses(regs, sregs):
            physical = thread.vcpu.translate(address)
            if physical is not None:
                found["pages"][address] = (physical, _page(memory, physical))
    except KvmError as error:
        found["error"] = (error.ioctl, error.argument, error.errno)
    return found


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Record) else value


def _addresses(regs: Regs, sregs: Sregs) -> Iterator[int]:
    """The pages of code and stack, whatever the mode of the CPU makes of its registers."""
    for offset, base in ((regs.rip, sregs.cs.base), (regs.rsp, sregs.ss.base), (regs.rsp & 0xFFFF, sregs.ss.base)):
        for at in (offset, base + offset & 0xFFFFFFFF):
            for page in range(at // PAGE - PAGES_AROUND, at // PAGE + PAGES_AROUND + 1):
                if 0 <= page * PAGE < 1 << 64:
                    yield page * PAGE


def _page(memory: Any, physical: int) -> bytes:
    try:
        return bytes(memory.read(physical // PAGE * PAGE, PAGE))
    except GuestMemoryError:
        return b""


class Body:
    """The remains, with the attributes of a Machine that evidence.collect looks at."""

    def __init__(self, told: dict[str, Any], kvm: Kvm | None) -> None:
        self.memory = _Memory()
        self.vcpus = [_Thread(cpu, self.memory) for cpu in told["vcpus"]]
        self.board = self.console = self.entry = self.config = self
        self.ports, self.memory_bus = _Bus(told["ports"]), _Bus(told["mmio"])
        self.text, self.cmdline, self.protocol, self.mem = (
            told["console"],
            told["cmdline"],
            told["protocol"],
            told["mem"],
        )
        self.kvm = kvm or _NoKvm()


def stop_of(told: dict[str, Any]) -> Stop:
    reason, detail, status = told["stop"]
    return Stop(Reason[reason], detail, status)


class _Bus:
    """A bus whose devices are only names."""

    def __init__(self, ranges: list[tuple[int, int, str]]) -> None:
        self.ranges = [(base, end, type(name, (), {})()) for base, end, name in ranges]


class _Memory:
    """The pages that were kept."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}

    def read(self, gpa: int, size: int) -> bytes:
        page = self.pages.get(gpa // PAGE * PAGE, b"")
        if gpa % PAGE + size > len(page):
            raise GuestMemoryError(f"{gpa:#x} was not kept")
        return page[gpa % PAGE : gpa % PAGE + size]


class _Thread:
    """A VcpuThread that has ended, and its Vcpu in one."""

    def __init__(self, told: dict[str, Any], memory: _Memory) -> None:
        self.vcpu = self
        self.index, self.page = told["index"], told["page"]
        self._told = told
        self._linear = {address: physical // PAGE * PAGE for address, (physical, _) in told["pages"].items()}
        for physical, content in told["pages"].values():
            memory.pages[physical // PAGE * PAGE] = content

    def recent(self) -> list[exits.Exit]:
        return [exits.Exit(*exit) for exit in self._told["recent"]]

    def join(self, timeout: float) -> bool:
        return bool(self._told["joined"])

    def regs(self) -> Regs:
        return Regs(**self._state()[0])

    def sregs(self) -> Sregs:
        kinds: dict[str, Callable[..., Any]] = {"gdt": DescriptorTable, "idt": DescriptorTable}
        values = self._state()[1]
        return Sregs(
            **{
                name: kinds.get(name, Segment)(**value) if isinstance(value, dict) else value
                for name, value in values.items()
            }
        )

    def mp_state(self) -> int:
        return int(self._state()[2])

    def translate(self, address: int) -> int | None:
        page = self._linear.get(address // PAGE * PAGE)
        return None if page is None else page + address % PAGE

    def _state(self) -> tuple[dict[str, Any], dict[str, Any], int]:
        if "error" in self._told:
            raise KvmError(*self._told["error"])
        state: tuple[dict[str, Any], dict[str, Any], int] = self._told["state"]
        return state


class _NoKvm:
    """/dev/kvm could not be opened again."""

    def create_vm(self) -> Any:
        raise KvmError("open", "/dev/kvm", 13)
