"""Hostile kernels, states and numbers: rows 73, 74, 76 and 78 of the list of other monitors' defects."""

from __future__ import annotations

import copy
import itertools
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from images import BASE, PROTECTED, Load, bzimage, elf, guest, kernel, note, pvh_elf, pvh_note

from kvmpy.boot import elf as elf_module
from kvmpy.boot import image, loader
from kvmpy.boot.spec import EntryPoint
from kvmpy.core.errors import ConfigError, ImageError
from kvmpy.core.units import parse_size
from kvmpy.testing import FakeBoard
from kvmpy.virtio.device import VirtioDevice

PROGRAM = struct.Struct("<IIQQQQQQ")


def programs(*headers: tuple[int, int, int, int, int], content: bytes, count: int | None = None) -> bytes:
    """An ELF kernel with program headers (type, offset behind the headers, address, bytes in file, in memory)."""
    at = 64 + PROGRAM.size * len(headers)
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    number = len(headers) if count is None else count
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, BASE, 64, 0, 0, 64, PROGRAM.size, number, 0, 0, 0)
    packed = [PROGRAM.pack(kind, 7, at + offset, to, to, size, room, 4) for kind, offset, to, size, room in headers]
    return header + b"".join(packed) + content


def refusal(data: bytes, protocol: str = "auto") -> ImageError:
    """What is said of a kernel that must be refused."""
    mem, spec = guest(32, cmdline="quiet")
    with pytest.raises(ImageError) as caught:
        loader.load(kernel(data), mem, spec, protocol)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    "notes",
    [
        struct.pack("<III", 0, 0, 0) * 100 + pvh_note(),
        struct.pack("<III", 0xFFFFFFFF, 0, 18),
        struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0",
        note(b"Xen\0", 18, b""),
        note(b"Xen\0", 18, bytes(5)),
        note(b"Xen\0", 18, struct.pack("<Q", 1 << 40)),
    ],
    ids=["empty", "long-name", "long-description", "no-entry", "odd-entry", "far-entry"],
)
def test_hostile_73_notes_of_any_size(notes: bytes) -> None:
    mem, spec = guest(32)
    data = elf([Load(BASE, b"text")], notes=notes)

    try:
        assert loader.load(kernel(data), mem, spec, "pvh").protocol == "pvh"
    except ImageError as error:
        assert error.remedy


def test_hostile_73_segments_that_share_their_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many segments there are, no more notes are looked at than there may be bytes of them."""
    seen = itertools.count()
    read = elf_module.NoteHeader.read
    monkeypatch.setattr(elf_module.NoteHeader, "read", lambda *args: (next(seen), read(*args))[1])
    notes = struct.pack("<III", 0, 0, 0) * 5000
    data = programs((1, 0, BASE, 4, 4), *[(4, 0, 0, len(notes), len(notes))] * 255, content=notes)

    assert "notes of more than 65536 bytes" in refusal(data).what
    assert next(seen) <= elf_module.MAX_NOTES // 12


@pytest.mark.parametrize(
    "headers",
    [
        [(1, 0, BASE, 1 << 40, 1 << 40)],
        [(1, (1 << 64) - 4096, BASE, 4, 4)],
        [(1, 0, BASE, 4, 2)],
        [(1, 0, (1 << 64) - 2, 4, 4)],
        [(1, 0, BASE, 4, (1 << 64) - 1)],
        [(1, 0, BASE, 4, 4096), (1, 0, BASE + 2048, 4, 4096)],
        [(1, 0, BASE + n, 4, 2) for n in range(200)],
    ],
    ids=["file", "offset", "memory", "wraps", "huge", "overlap", "many"],
)
def test_hostile_73_segments_that_cannot_be(headers: list[tuple[int, int, int, int, int]]) -> None:
    refusal(programs(*headers, content=b"text"))


@pytest.mark.parametrize("count", [0, 257, 0xFFFF])
def test_hostile_73_number_of_segments(count: int) -> None:
    refusal(programs((1, 0, BASE, 4, 4), content=b"text" * 2000, count=count))


@pytest.mark.parametrize(
    "fields",
    [
        {"setup_sects": 0},
        {"setup_sects": 255},
        {"boot_flag": 0},
        {"header": 0},
        {"kernel_alignment": 0},
        {"kernel_alignment": 3},
        {"kernel_alignment": 0xFFFFFFFF},
        {"init_size": 0xFFFFFFFF},
        {"init_size": 0},
        {"pref_address": (1 << 64) - 1},
        {"pref_address": 0},
        {"cmdline_size": 0},
        {"cmdline_size": 0xFFFFFFFF},
        {"initrd_addr_max": 0},
        {"payload_offset": 0xFFFFFFFF},
        {"payload_length": 0xFFFFFFFF},
        {"payload_length": 0},
        {"version": 0},
        {"version": 0xFFFF},
        {"syssize": 0xFFFFFFFF},
        {"xloadflags": 0},
        {"code32_start": 0xFFFFFFFF},
        {"kernel_version": 0xFFFF},
    ],
    ids=lambda fields: "-".join(f"{name}-{value:x}" for name, value in fields.items()),
)
@pytest.mark.parametrize("protocol", ["auto", "decompressor"])
def test_hostile_74_setup_header(fields: dict[str, int], protocol: str) -> None:
    mem, spec = guest(32, cmdline="quiet", initrd=b"initrd")
    data = bzimage(**fields)

    try:
        assert isinstance(loader.load(kernel(data), mem, spec, protocol), EntryPoint)
    except ConfigError as error:
        assert error.remedy
    image.describe(kernel(data))


@pytest.mark.parametrize("cmdline", ["x" * 2048, "a\0b", "a\nb"], ids=["long", "nul", "newline"])
@pytest.mark.parametrize("protocol", ["pvh", "linux64", "decompressor"])
def test_hostile_74_command_line(cmdline: str, protocol: str) -> None:
    mem, spec = guest(32, cmdline=cmdline)

    try:
        loader.load(kernel(bzimage(pvh_bzimage_payload())), mem, spec, protocol)
    except ConfigError as error:
        assert error.remedy
    else:
        assert cmdline == "a\nb"


def pvh_bzimage_payload() -> bytes:
    import gzip

    return gzip.compress(pvh_elf(), mtime=0)


def test_hostile_74_initrd_larger_than_memory() -> None:
    mem, spec = guest(32, initrd=bytes(33 << 20))

    with pytest.raises(ConfigError) as caught:
        loader.load(kernel(bzimage()), mem, spec)
    assert caught.value.remedy


def test_hostile_74_cut_off_after_each_byte_of_the_header() -> None:
    data = bzimage()
    mem, spec = guest(32)

    for length in range(PROTECTED):
        with pytest.raises(ImageError):
            loader.load(kernel(data[:length]), mem, spec)


@pytest.mark.parametrize("text", [str((1 << 44) + 1), f"{1 << 54}K", "9" * 18 + "T", "18446744073709551617B"])
def test_hostile_76_sizes_that_wrap(text: str) -> None:
    """They are numbers without an end here; none becomes a small one."""
    try:
        assert parse_size(text) > 1 << 60
    except ConfigError as error:
        assert "invalid size" in str(error)


# States: there are no snapshots, but devices give and take back what would be in one.

EXTREMES = (0, 1, -1, 0xFFFF, 0x8000, 1 << 32, (1 << 64) - 1, None, "", [], {}, "zz")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a state are plain values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    nested = [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    yield from nested or [path]


def test_hostile_78_state_with_each_field_changed(each_device: VirtioDevice) -> None:
    """Refused with ValueError, or taken; after a reset the device works on."""
    transport = each_device.board.transports[0]
    good = transport.state()
    assert isinstance(each_device.board, FakeBoard)

    for path in leaves(good):
        for extreme in EXTREMES:
            changed = copy.deepcopy(good)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = extreme
            try:
                transport.restore(changed)
            except ValueError as error:
                assert str(error)
    transport.restore(good)
    assert transport.state() == good
