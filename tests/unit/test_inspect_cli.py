"""What `kvmpy inspect` prints of an image; test_boot_image.py has what it knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from images import MIB, boot_sector, bzimage, elf, multiboot_elf, pvh_elf, with_size

from kvmpy.boot.image import OPTIONS
from kvmpy.cli import main as run
from kvmpy.cli.inspect import NEEDED

CONFIG = "CONFIG_64BIT=y\nCONFIG_SMP=y\nCONFIG_VIRTIO_BLK=m\n# CONFIG_SERIAL_8250_CONSOLE is not set\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def inspect(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, str, str]:
    """Status, output and errors."""
    status = run(["inspect", str(path), *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_bzimage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage())

    status, out, err = inspect(capsys, image)

    lines = out.split("\n")
    assert (status, err) == (0, "")
    assert "  Linux 6.1.0-test (someone@somewhere) #1 SMP" in lines
    assert "  bzImage, setup header 2.15, payload gzip, " in out
    assert "  pvh           yes, entered at 0x1000000" in lines
    assert "  decompressor  yes, entered at 0x1000200" in lines
    assert "  multiboot     no: no Multiboot header in its first 8 KiB" in lines
    assert "  auto          pvh: a bzImage; its gzip payload" in out
    assert "  command line  2047 bytes" in lines
    assert "  memory        20.0 MiB for the kernel alone" in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("data", "protocol"),
    [(pvh_elf(), "pvh"), (elf(), "linux64"), (multiboot_elf(), "multiboot"), (boot_sector(), "flat")],
)
def test_what_auto_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, protocol: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(data)

    status, out, _ = inspect(capsys, image)

    assert status == 0
    assert f"  auto          {protocol}: " in out


def test_options_and_what_follows_from_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage())
    (tmp_path / "config-6.1.0-test").write_text(CONFIG)

    _, out, _ = inspect(capsys, image)

    assert "  built in      64BIT SMP\n" in out
    assert "  modules       VIRTIO_BLK\n" in out
    assert "  -> without SERIAL_8250_CONSOLE: no console" in out
    assert "without SMP" not in out
    assert "-> modules must be in the initrd" in out


def test_every_needed_option_is_one_that_is_looked_at() -> None:
    assert set(NEEDED) <= set(OPTIONS)


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage())

    status, out, _ = inspect(capsys, image, "--json")

    value = json.loads(out)
    assert status == 0
    assert value["auto"]["protocol"] == "pvh"
    assert value["min_memory"] == 20 * MIB


def test_text_of_the_image_is_made_fit_for_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "vmlinuz"
    data = bytearray(bzimage())
    data[0x300:0x30F] = b"6.1\x1b[2J\x07\x9b evil\0"
    image.write_bytes(data)

    _, out, _ = inspect(capsys, image)

    assert "  Linux 6.1\\x07" in out
    assert "\x1b" not in out


def test_no_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "notes.txt"
    image.write_text("not a kernel\n")

    status, out, err = inspect(capsys, image)

    assert status == 125
    assert "  auto          none: " in out
    assert err == f"kvmpy: kernel {image}: a text file; give the kernel (bzImage or vmlinux) with --kernel\n"


def test_damaged_payload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(with_size("gzip", pvh_elf())[:200]))

    status, out, err = inspect(capsys, image)

    assert status == 125
    assert "  pvh           no: its gzip data ends early" in out
    assert "  decompressor  yes" in out
    assert err.count("\n") == 1


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = inspect(capsys, tmp_path / "none")

    assert (status, out) == (127, "")
    assert err.startswith(f"kvmpy: kernel {tmp_path}/none: no such file; ")
