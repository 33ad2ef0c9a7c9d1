"""What scripts/make-image refuses, each in one line and before it begins; tests/linux boots what it makes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make-image"
USAGE = 125


def refusal(*words: str | Path) -> str:
    """What it says of these options, without its name."""
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (USAGE, "")
    (line,) = done.stderr.splitlines()
    return line.removeprefix("make-image: ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "100M"], "--size 100M: give 512M or more"),
        (["--size", "2T"], "--size '2T': not a size"),
        (["--packages", "less;reboot"], "--packages 'less;reboot': not a package"),
        (["--suite", "../etc"], "--suite '../etc': not a suite"),
        (["--hostname", "my host"], "--hostname 'my host': not a hostname"),
        (["--password", "two\nlines"], "--password 'two\\nlines': not a password"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_options_that_cannot_be(options: list[str], told: str, tmp_path: Path) -> None:
    assert refusal(*options, tmp_path / "x.img").startswith(told)


@pytest.mark.parametrize("name", ["x.img", "x.vmlinuz", "x.initrd"])
def test_what_exists_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")

    assert refusal(tmp_path / "x.img") == f"{tmp_path / name} exists: remove it, or give --force"
    assert (tmp_path / name).read_text() == "precious"


def test_places_that_cannot_be(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none" / "x.img").endswith(f"there is no folder {tmp_path / 'none'}")
    assert refusal("--force", tmp_path) == f"{tmp_path}: not a regular file"
    assert "names of their own" in refusal("--initrd", tmp_path / "x.img", tmp_path / "x.img")
