"""What users write for sizes and counts, and what is refused."""

from __future__ import annotations

import pytest

from kvmpy.config import MachineConfig, Volume, parse_count
from kvmpy.core.errors import ConfigError
from kvmpy.core.units import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("4096K", 4 << 20),
        ("1T", 1 << 40),
        ("512", 512 << 20),
        (512, 512 << 20),
        ("512MiB", 512 << 20),
        ("512MB", 512 << 20),
        ("4194304B", 4 << 20),
    ],
)
def test_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "512X", "1.5G", "-1", "1_000", "١٢", "0x200", "512 M", "1e3", "9" * 30])
def test_size_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid size"):
        parse_size(text)


@pytest.mark.parametrize("mem", ["0", "-1", "512X", "1023K", "1025K", "2T"])
def test_machine_memory_refused(mem: str) -> None:
    with pytest.raises(ConfigError):
        MachineConfig.of(mem=mem)


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "", "100000", "٤", "1_0", "x"])
def test_count_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="whole number from 1 to 255"):
        parse_count(text, "number of CPUs", 255)


def test_paths_and_words() -> None:
    config = MachineConfig.of(kernel="k", initrd="i", append="quiet")

    assert (config.kernel, config.initrd, config.append) == ("k", ("i",), ("quiet",))


def test_no_initrd_differs_from_the_built_in_one() -> None:
    assert MachineConfig.of(initrd=[]).initrd == ()
    assert MachineConfig.of().initrd is None


def test_transport() -> None:
    assert MachineConfig.of().transport == "mmio"
    assert MachineConfig.of(transport="pci").transport == "pci"
    with pytest.raises(ConfigError, match='invalid transport "usb"; use mmio or pci'):
        MachineConfig.of(transport="usb")


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("src:/mnt", Volume("src", "/mnt")),
        ("/a/b:/mnt//x/./y/:ro", Volume("/a/b", "/mnt/x/y", ro=True)),
        ("/a:/b:/c:rw", Volume("/a:/b", "/c")),
        ("ro:/ro", Volume("ro", "/ro")),
    ],
)
def test_volume(text: str, volume: Volume) -> None:
    assert Volume.of(text) == volume
    assert Volume.of(str(volume)) == volume


@pytest.mark.parametrize(
    "text", ["", "src", "src:mnt", ":/mnt", "src:/", "src:/a/../b", "src:/mnt:rx", "src:ro", "a\0:/b"]
)
def test_volume_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="use HOST:GUEST"):
        Volume.of(text)


def test_tags_of_volumes() -> None:
    config = MachineConfig.of(volumes=["a:/a", "b:/b:ro"])

    assert [(tag, volume.guest) for tag, volume in config.tagged_volumes] == [("volume0", "/a"), ("volume1", "/b")]
