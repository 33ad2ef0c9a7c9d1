"""What struct kvm_run says, told in a line, whatever is in it."""

from __future__ import annotations

import mmap
import struct

import pytest

from kvmpy.kvm import exits


def page(reason: int, union: bytes = b"") -> mmap.mmap:
    area = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    struct.pack_into("<I", area, 8, reason)
    area[exits.UNION : exits.UNION + len(union)] = union
    return area


def emulation_failure(ndata: int, flags: int, size: int, code: bytes) -> bytes:
    return struct.pack("<IIQB15s", 1, ndata, flags, size, code)


@pytest.mark.parametrize(
    ("area", "text"),
    [
        (page(exits.EXIT_IO, struct.pack("<BBHIQ", 1, 2, 0x3F8, 5, 4096)), "KVM_EXIT_IO out port 0x3f8, 5 x 2 bytes"),
        (page(exits.EXIT_IO, struct.pack("<BBHIQ", 0, 1, 0x60, 1, 4096)), "KVM_EXIT_IO in port 0x60, 1 x 1 bytes"),
        (
            page(exits.EXIT_MMIO, struct.pack("<QQIB", 0xD0000000, 0xEEEEEEEE11223344, 4, 1)),
            "KVM_EXIT_MMIO write 0x11223344 to 0xd0000000, 4 bytes",
        ),
        (page(exits.EXIT_MMIO, struct.pack("<QQIB", 0xFEE00020, 0, 8, 0)), "KVM_EXIT_MMIO read 0xfee00020, 8 bytes"),
        (
            page(exits.EXIT_MMIO, b"\xff" * 24),
            f"KVM_EXIT_MMIO write {2**64 - 1:#x} to {2**64 - 1:#x}, {2**32 - 1} bytes",
        ),
        (page(exits.EXIT_DEBUG), "KVM_EXIT_DEBUG"),
        (page(2**32 - 1), "exit reason 4294967295"),
    ],
)
def test_describe(area: mmap.mmap, text: str) -> None:
    assert exits.describe(area) == text


def test_names_are_those_of_the_api() -> None:
    assert exits.name(2) == "KVM_EXIT_IO"
    assert exits.name(8) == "KVM_EXIT_SHUTDOWN"
    assert exits.name(999) == "exit reason 999"


@pytest.mark.parametrize(
    ("union", "code"),
    [
        (emulation_failure(4, 1, 3, b"\x0f\x01\xd0" + b"\xcc" * 12), b"\x0f\x01\xd0"),
        (emulation_failure(4, 1, 255, bytes(range(15))), bytes(range(15))),  # more than an instruction has
        (emulation_failure(4, 0, 3, b"\x0f\x01\xd0"), b""),  # the flag says: no bytes
        (emulation_failure(0, 1, 3, b"\x0f\x01\xd0"), b""),  # an older KVM, which fills nothing in
        (b"\2" + emulation_failure(4, 1, 3, b"\x0f\x01\xd0")[1:], b""),  # not an emulation failure
    ],
)
def test_failed_instruction(union: bytes, code: bytes) -> None:
    assert exits.failed_instruction(page(exits.EXIT_INTERNAL_ERROR, union)) == code


def test_the_failed_instruction_is_in_the_description() -> None:
    area = page(exits.EXIT_INTERNAL_ERROR, emulation_failure(4, 1, 3, b"\x0f\x01\xd0"))

    assert exits.describe(area) == "KVM_EXIT_INTERNAL_ERROR 1: KVM cannot emulate the instruction (0f 01 d0)"
