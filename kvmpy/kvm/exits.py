"""Why KVM_RUN returned: names of the exit reasons, layout of the kvm_run page, the rare reasons decoded."""

from __future__ import annotations

import mmap
import struct

from .._kvm_ioctls import lib
from ..core.typed import Final, NamedTuple

# struct kvm_run (Documentation/virt/kvm/api.rst, 5). One unpack gives what the common exits need:
# exit_reason, then for KVM_EXIT_IO: direction, size, port, count, data_offset.
IO: Final = struct.Struct("<8xI20xBBHIQ")
# ... and for KVM_EXIT_MMIO: phys_addr, data (as a number), len, is_write.
MMIO: Final = struct.Struct("<QQIB")
DATA: Final = struct.Struct("<Q")  # the data alone, as it is answered
UNION: Final = 32  # offset of the union that holds all but the common head
MMIO_DATA: Final = UNION + 8
IMMEDIATE_EXIT: Final = 1  # offset of the byte that makes the next KVM_RUN return at once

EXIT_IO: Final[int] = lib.KVM_EXIT_IO
EXIT_MMIO: Final[int] = lib.KVM_EXIT_MMIO
EXIT_HLT: Final[int] = lib.KVM_EXIT_HLT
EXIT_SHUTDOWN: Final[int] = lib.KVM_EXIT_SHUTDOWN
EXIT_FAIL_ENTRY: Final[int] = lib.KVM_EXIT_FAIL_ENTRY
EXIT_INTERNAL_ERROR: Final[int] = lib.KVM_EXIT_INTERNAL_ERROR
EXIT_SYSTEM_EVENT: Final[int] = lib.KVM_EXIT_SYSTEM_EVENT
EXIT_INTR: Final[int] = lib.KVM_EXIT_INTR
EXIT_DEBUG: Final[int] = lib.KVM_EXIT_DEBUG

NAMES: Final = {getattr(lib, name): name for name in dir(lib) if name.startswith("KVM_EXIT_")}

INTERNAL_ERRORS: Final = {
    1: "KVM cannot emulate the instruction",  # KVM_INTERNAL_ERROR_EMULATION
    2: "exceptions while delivering another one",  # KVM_INTERNAL_ERROR_SIMUL_EX
    3: "an exit while delivering an event",  # KVM_INTERNAL_ERROR_DELIVERY_EV
    4: "an exit that KVM does not know",  # KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
}
EMULATION: Final = 1
FLAG_INSTRUCTION_BYTES: Final = 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES

SYSTEM_EVENTS: Final = {1: "shutdown", 2: "reset", 3: "crash"}  # KVM_SYSTEM_EVENT_*


class Exit(NamedTuple):
    """What a crash report says of an exit; all but `reason` is 0 where it was no access to a port or to MMIO."""

    reason: int
    is_write: int
    size: int  # bytes of an element
    address: int
    elements: int  # of a string instruction, else 1


def summary(page: mmap.mmap) -> Exit:
    """The exit in a kvm_run page."""
    reason, direction, size, port, count, _ = IO.unpack_from(page)
    if reason == EXIT_IO:
        return Exit(reason, direction, size, port, count)
    if reason == EXIT_MMIO:
        address, _, length, is_write = MMIO.unpack_from(page, UNION)
        return Exit(reason, is_write, length, address, 1)
    return Exit(reason, 0, 0, 0, 0)


def name(reason: int) -> str:
    """KVM_EXIT_..., or the number where this version does not know it."""
    return NAMES.get(reason, f"exit reason {reason}")


def describe(page: mmap.mmap) -> str:
    """One line on the exit in a kvm_run page, whatever its reason."""
    reason, direction, size, port, count, _ = IO.unpack_from(page)
    if reason == EXIT_IO:
        return f"KVM_EXIT_IO {'out' if direction else 'in'} port {port:#x}, {count} x {size} bytes"
    if reason == EXIT_MMIO:
        address, data, length, is_write = MMIO.unpack_from(page, UNION)
        verb = f"write {data & ((1 << 8 * min(length, 8)) - 1):#x} to" if is_write else "read"
        return f"KVM_EXIT_MMIO {verb} {address:#x}, {length} bytes"
    if reason == EXIT_FAIL_ENTRY:
        return f"KVM_EXIT_FAIL_ENTRY hardware entry failure reason {entry_failure(page):#x}"
    if reason == EXIT_INTERNAL_ERROR:
        number = suberror(page)
        text = f"KVM_EXIT_INTERNAL_ERROR {number}: {INTERNAL_ERRORS.get(number, 'unknown suberror')}"
        code = failed_instruction(page)
        return f"{text} ({code.hex(' ')})" if code else text
    if reason == EXIT_SYSTEM_EVENT:
        return f"KVM_EXIT_SYSTEM_EVENT {system_event(page)}"
    return name(reason)


def system_event(page: mmap.mmap) -> str:
    """What a KVM_EXIT_SYSTEM_EVENT asks for: "shutdown", "reset", "crash", or a number."""
    (event,) = struct.unpack_from("<I", page, UNION)
    return SYSTEM_EVENTS.get(event, str(event))


def suberror(page: mmap.mmap) -> int:
    """Which internal error a KVM_EXIT_INTERNAL_ERROR is: a key of INTERNAL_ERRORS, or one that is newer."""
    return int.from_bytes(page[UNION : UNION + 4], "little")


def entry_failure(page: mmap.mmap) -> int:
    """hardware_entry_failure_reason of a KVM_EXIT_FAIL_ENTRY."""
    return int.from_bytes(page[UNION : UNION + 8], "little")


def failed_instruction(page: mmap.mmap) -> bytes:
    """The bytes at RIP that KVM could not emulate; empty when the exit does not carry them.

    KVM_EXIT_INTERNAL_ERROR, `emulation_failure`: suberror, ndata, flags, insn_size, insn_bytes[15].
    """
    number, ndata, flags, size = struct.unpack_from("<IIQB", page, UNION)
    if number != EMULATION or ndata < 3 or not flags & FLAG_INSTRUCTION_BYTES:
        return b""
    start = UNION + 17
    return bytes(page[start : start + min(size, 15)])
