"""Kernel images cut off and damaged at will: an ImageError or a boot, nothing else, and soon."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import (
    BASE,
    COMPRESSORS,
    PAYLOAD,
    PROTECTED,
    Load,
    boot_sector,
    bzimage,
    elf,
    guest,
    kernel,
    multiboot_elf,
    multiboot_flat,
    pvh_elf,
    pvh_note,
    with_size,
)
from scale import examples

from kvmpy.boot import image, loader
from kvmpy.boot.spec import EntryPoint
from kvmpy.core.errors import ConfigError, ImageError

MANY = settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Images whose every byte counts, and the sizes of their headers.
IMAGES = {
    **{f"bzImage {name}": (bzimage(with_size(name, pvh_elf())), PROTECTED) for name in COMPRESSORS},
    "vmlinux": (elf([Load(BASE, b"text"), Load(BASE + 4096, b"data")]), 64 + 2 * 56),
    "PVH": (elf([Load(BASE, b"text")], notes=pvh_note()), 64 + 2 * 56 + 4 + 24),
    "PVH 32": (elf([Load(BASE, b"text")], notes=pvh_note(), bits=32), 52 + 2 * 32 + 4 + 24),
    "Multiboot ELF": (multiboot_elf(), 52 + 32 + 12),
    "boot sector": (boot_sector(), 512),
}
CUTTABLE = IMAGES | {"Multiboot": (multiboot_flat(load_end=(1 << 20) + len(multiboot_flat())), 32)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def attempt(data: bytes, protocol: str = "auto") -> EntryPoint | ConfigError:
    mem, spec = guest(32, cmdline="quiet", initrd=b"initrd")
    try:
        return loader.load(kernel(data), mem, spec, protocol)
    except ConfigError as error:
        return error


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_off_anywhere(name: str) -> None:
    data, headers = CUTTABLE[name]
    lengths = {*range(headers), *range(headers, len(data), max((len(data) - headers) // 200, 1)), len(data) - 1}
    lengths -= {length for length in lengths if length >= len(data)}

    wrong = {length: result for length in lengths if not isinstance(result := attempt(data[:length]), ImageError)}

    assert wrong == {}
    assert len(lengths) >= 50


@pytest.mark.parametrize("name", IMAGES)
@MANY
@given(st.data())
def test_headers_damaged_anywhere(name: str, draw: st.DataObject) -> None:
    data, headers = IMAGES[name]
    damaged = bytearray(data)
    for at, value in draw.draw(st.dictionaries(st.integers(0, headers - 1), st.integers(0, 255), max_size=4)).items():
        damaged[at] = value

    result = attempt(bytes(damaged))

    assert isinstance(result, EntryPoint) or result.remedy


@pytest.mark.parametrize("protocol", loader.PROTOCOLS[1:])
@MANY
@given(st.data())
def test_headers_with_extreme_numbers(protocol: str, draw: st.DataObject) -> None:
    data, headers = IMAGES[draw.draw(st.sampled_from(sorted(IMAGES)))]
    damaged = bytearray(data)
    extremes = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFF000]
    words = st.dictionaries(st.integers(0, headers - 4), st.sampled_from(extremes), max_size=3)
    for at, value in draw.draw(words).items():
        struct.pack_into("<I", damaged, at, value)

    result = attempt(bytes(damaged), protocol)

    assert isinstance(result, EntryPoint) or result.remedy


@pytest.mark.parametrize("name", COMPRESSORS)
@MANY
@given(st.data())
def test_payload_damaged_anywhere(name: str, draw: st.DataObject) -> None:
    data, _ = IMAGES[f"bzImage {name}"]
    damaged = bytearray(data)
    at = draw.draw(st.integers(PROTECTED + PAYLOAD, len(data) - 1))
    damaged[at] ^= draw.draw(st.integers(1, 255))

    result = attempt(bytes(damaged))

    assert isinstance(result, EntryPoint) or result.remedy


@MANY
@given(st.binary(max_size=2000))
def test_any_bytes_at_all(data: bytes) -> None:
    result = attempt(data)

    assert isinstance(result, EntryPoint) or result.remedy


@MANY
@given(st.data())
def test_inspection_never_fails(draw: st.DataObject) -> None:
    data, headers = IMAGES[draw.draw(st.sampled_from(sorted(IMAGES)))]
    damaged = bytearray(data)
    for at, value in draw.draw(st.dictionaries(st.integers(0, headers - 1), st.integers(0, 255), max_size=4)).items():
        damaged[at] = value

    assert image.describe(kernel(bytes(damaged)))["size"] == len(data)
