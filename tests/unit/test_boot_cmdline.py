"""The kernel command line: what it is composed of, and what is refused."""

from __future__ import annotations

import pytest

from kvmpy.boot import cmdline
from kvmpy.core.errors import ConfigError


def test_defaults_come_without_base() -> None:
    line = cmdline.compose(None)

    assert line.split()[0] == "console=ttyS0,115200"
    assert {"reboot=k", "panic=-1"} <= set(line.split())


def test_defaults_turn_pci_off_where_there_is_none() -> None:
    without, with_pci = cmdline.compose(None).split(), cmdline.compose(None, pci=True).split()

    assert set(without) - set(with_pci) == {"pci=off"}
    assert set(with_pci) - set(without) == {"pci=noearly"}
    assert cmdline.compose("pci=off", pci=True) == "pci=off"


def test_base_replaces_the_defaults_and_the_users_words_come_last() -> None:
    line = cmdline.compose("quiet", ["root=/dev/vda", "-- single"], ["virtio_mmio.device=4K@0xd0000000:5"])

    assert line == "virtio_mmio.device=4K@0xd0000000:5 quiet root=/dev/vda -- single"


def test_empty_base_leaves_nothing() -> None:
    assert cmdline.compose("") == ""


@pytest.mark.parametrize("bad, name", [("a\0b", "NUL"), ("a\nb", "newline"), ("a\rb", "carriage return")])
def test_control_characters_are_refused(bad: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} after 'quiet a'; take it out"):
        cmdline.compose("quiet", [bad])


def test_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'\\ud800', which is no character"):
        cmdline.encode("a\ud800", 2047)


def test_bytes_of_the_command_line_pass_unchanged() -> None:
    assert cmdline.encode("name=ä\udcff", 2047) == b"name=\xc3\xa4\xff"


def test_the_limit_counts_bytes_without_the_nul() -> None:
    assert cmdline.encode("ä" * 1023 + "x", 2047) == "ä".encode() * 1023 + b"x"

    with pytest.raises(
        ConfigError, match="has 2048 bytes, this kernel takes 2047; make --cmdline/--append shorter by 1"
    ):
        cmdline.encode("ä" * 1024, 2047)


@pytest.mark.parametrize(
    ("line", "modules"),
    [
        ("console=ttyS0 quiet", []),
        ("root=/dev/vda rw", ["ext4"]),
        ("root=LABEL=r rootfstype=xfs rootfstype=btrfs", ["btrfs"]),
    ],
)
def test_driver_of_the_root_file_system(line: str, modules: list[str]) -> None:
    assert cmdline.root_modules(line) == modules


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("console=ttyS0 pci=noearly", ""),
        ("pci=off", "pci=off"),
        ("quiet pci=realloc,nomsi ro", "pci=realloc,nomsi"),
        ("pci=nommconf", "pci=nommconf"),
        ("acpi=off", "acpi=off"),
        ("acpi=off acpi=on", ""),
        ("disableapic", "disableapic"),
        ("quiet -- pci=off acpi=off", ""),
        ("spci=off pci=offset", ""),
    ],
)
def test_words_that_leave_linux_without_pci(line: str, word: str) -> None:
    assert cmdline.pci_is_off(line) == word


def test_words_for_init_tell_the_kernel_nothing() -> None:
    assert cmdline.acpi_is_off("quiet acpi=off")
    assert not cmdline.acpi_is_off("quiet -- acpi=off")
    assert cmdline.root_modules("quiet -- root=/dev/vda") == []
