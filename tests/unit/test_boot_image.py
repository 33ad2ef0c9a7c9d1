"""What `kvmpy inspect` learns of an image."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from images import BANNER, BASE, MIB, TEXT, VERSION, Load, boot_sector, bzimage, compress, elf, pvh_elf, with_size

from kvmpy.boot import image, loader

CONFIG = "CONFIG_PVH=y\nCONFIG_VIRTIO_BLK=m\n# CONFIG_X86_MPPARSE is not set\nCONFIG_NR_CPUS=64\n"


def described(path: Path, data: bytes) -> image.Json:
    path.write_bytes(data)
    found = image.describe(loader.read_image(path))
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_bzimage(tmp_path: Path) -> None:
    found = described(tmp_path / "vmlinuz", bzimage(with_size("zstd", pvh_elf() + b"relocations")))

    assert (found["format"], found["container"], found["version"]) == ("bzImage", None, VERSION[:-1].decode())
    assert found["setup"]["protocol"] == "2.15"
    assert found["setup"]["xloadflags"][0] == "XLF_KERNEL_64"
    assert found["payload"]["compression"] == "zstd"
    assert found["payload"]["size"] == len(pvh_elf()) + 11
    assert found["entries"] == {
        "linux64": BASE,
        "pvh": BASE,
        "decompressor": BASE + 0x200,
        "efi_stub": True,
        "efi_handover_offset": 0x190,
    }
    assert found["kaslr"] == {"relocations": True, "applied_by": "decompressor"}
    assert (found["cmdline_limit"], found["min_memory"]) == (2047, BASE + 4 * MIB)
    assert [found["boot"][name] for name in ("pvh", "linux64", "decompressor")] == ["yes"] * 3
    assert found["boot"]["multiboot"] == "no Multiboot header in its first 8 KiB"
    assert found["auto"]["protocol"] == "pvh"


def test_kernel_without_relocations_has_no_kaslr(tmp_path: Path) -> None:
    found = described(tmp_path / "vmlinuz", bzimage())

    assert found["kaslr"] == {"relocations": False, "applied_by": None}


def test_vmlinux(tmp_path: Path) -> None:
    found = described(tmp_path / "vmlinux.gz", compress("gzip", elf()))

    assert (found["format"], found["container"]) == ("ELF", "gzip")
    assert found["version"] == BANNER[len("Linux version ") : -2].decode()
    assert found["setup"] is None
    assert found["elf"]["segments"] == [{"base": BASE, "file_size": len(TEXT + BANNER), "size": 3 * MIB}]
    assert found["auto"]["protocol"] == "linux64"
    assert found["min_memory"] == BASE + 3 * MIB


def test_boot_sector(tmp_path: Path) -> None:
    found = described(tmp_path / "boot", boot_sector())

    assert (found["format"], found["version"], found["config"]) == ("boot sector", None, None)
    assert found["auto"]["protocol"] == "flat"


def test_no_kernel(tmp_path: Path) -> None:
    found = described(tmp_path / "script", b"#!/bin/sh\n")

    assert found["format"] == "unknown"
    assert found["auto"]["protocol"] is None
    assert "a script; give the kernel" in found["auto"]["why"]
    assert found["boot"]["flat"] == "yes"


def test_damaged_bzimage(tmp_path: Path) -> None:
    found = described(tmp_path / "vmlinuz", bzimage()[:-1])

    assert found["format"] == "bzImage"
    assert "its setup header says" in found["auto"]["why"]
    assert "its setup header says" in found["boot"]["pvh"]


@pytest.mark.parametrize("name", ["config-6.1.0-test", "config"])
def test_config_file_beside_the_kernel(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(CONFIG)

    found = described(tmp_path / "vmlinuz", bzimage())

    assert found["config"]["source"] == str(tmp_path / name)
    options = found["config"]["options"]
    assert (options["PVH"], options["VIRTIO_BLK"], options["X86_MPPARSE"]) == ("y", "m", None)
    assert "NR_CPUS" not in options


def test_embedded_config(tmp_path: Path) -> None:
    content = TEXT + b"IKCFG_ST" + gzip.compress(CONFIG.encode()) + b"IKCFG_ED"

    found = described(tmp_path / "vmlinux", elf([Load(BASE, content)]))

    assert found["config"]["source"] == "embedded (IKCONFIG)"
    assert found["config"]["options"]["PVH"] == "y"


def test_damaged_embedded_config(tmp_path: Path) -> None:
    found = described(tmp_path / "vmlinux", elf([Load(BASE, TEXT + b"IKCFG_STrubbish")]))

    assert found["config"] is None


def test_release_that_is_a_path_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "config-x").mkdir()
    (tmp_path / "secret").write_text(CONFIG)
    data = bzimage().replace(VERSION[:20], b"x/../secret\0".ljust(20, b"\0"))

    assert described(tmp_path / "vmlinuz", data)["config"] is None
