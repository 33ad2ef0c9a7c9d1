"""Kernel modules: which are needed, in what order, and their content."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from kvmpy.boot import modules
from kvmpy.core.errors import ConfigError, HostError, ImageError, NotFoundError

ELF = b"\x7fELF" + bytes(range(256)) * 64

# As depmod writes them: all that a module needs, directly or not, the last to be loaded first.
DEP = """\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko.xz: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/virtio-rng.ko: kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko
kernel/fs/jbd2/jbd2.ko:
kernel/fs/mbcache.ko:
kernel/fs/ext4/ext4.ko: kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/crypto/crc32c_generic.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/lib/libcrc32c.ko:
kernel/net/act.ko:
kernel/net/gso.ko: kernel/net/act.ko
kernel/a/ping.ko:
kernel/a/pong.ko:
"""
SOFTDEP = """\
# Soft dependencies extracted from modules themselves.
softdep ext4 pre: crc32c
softdep libcrc32c pre: crc32c unheard_of
softdep act post: gso
softdep ping pre: pong
softdep pong pre: ping
softdep jbd2 gcm
softdep
"""
ALIAS = """\
# Aliases extracted from modules themselves.
alias crc32c crc32c_intel
alias crc32c crc32c_generic
alias virtio:d00000002v* virtio_blk
alias fs-ext4 ext4
alias gone not_there
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tree/lib/modules/6.1.0-test"
    (path / "kernel").mkdir(parents=True)
    (path / "modules.dep").write_text(DEP)
    (path / "modules.softdep").write_text(SOFTDEP)
    (path / "modules.alias").write_text(ALIAS)
    (path / "modules.builtin").write_text("kernel/drivers/tty/serial/8250/8250.ko\nkernel/lib/crc-t10dif.ko\n")
    return path


def names(folder: Path, *wanted: str) -> list[str]:
    return [path.name for path in modules.closure(folder, wanted)]


def test_what_a_module_needs_comes_before_it(folder: Path) -> None:
    assert modules.closure(folder, ["virtio_blk"]) == [
        Path("kernel/drivers/virtio/virtio_ring.ko"),
        Path("kernel/drivers/virtio/virtio.ko.xz"),
        Path("kernel/drivers/block/virtio_blk.ko"),
    ]


def test_what_two_modules_need_comes_once(folder: Path) -> None:
    assert names(folder, "virtio_blk", "virtio_rng", "virtio_blk") == [
        "virtio_ring.ko", "virtio.ko.xz", "virtio_blk.ko", "virtio-rng.ko",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["virtio-rng", "virtio_rng"])
def test_dashes_and_underscores_are_the_same(folder: Path, name: str) -> None:
    assert names(folder, name)[-1] == "virtio-rng.ko"


@pytest.mark.parametrize("name", ["8250", "crc-t10dif", "crc_t10dif"])
def test_what_is_built_in_needs_no_file(folder: Path, name: str) -> None:
    assert names(folder, name) == []


def test_an_alias_stands_for_all_its_modules(folder: Path) -> None:
    assert names(folder, "crc32c") == ["crc32c-intel.ko", "crc32c_generic.ko"]


def test_soft_dependencies_come_before_or_after(folder: Path) -> None:
    assert names(folder, "ext4") == ["crc32c-intel.ko", "crc32c_generic.ko", "jbd2.ko", "mbcache.ko", "ext4.ko"]
    assert names(folder, "act") == ["act.ko", "gso.ko"]


def test_soft_dependencies_that_do_not_exist_are_not_needed(folder: Path) -> None:
    assert names(folder, "libcrc32c") == ["crc32c-intel.ko", "crc32c_generic.ko", "libcrc32c.ko"]


def test_soft_dependencies_in_a_circle_end(folder: Path) -> None:
    assert sorted(names(folder, "ping")) == ["ping.ko", "pong.ko"]


def test_a_long_chain_needs_no_deep_stack(folder: Path) -> None:
    chain = "".join(f"kernel/m{i}.ko: kernel/m{i + 1}.ko\n" for i in range(5000)) + "kernel/m5000.ko:\n"
    (folder / "modules.dep").write_text(chain)

    assert names(folder, "m0") == [f"m{i}.ko" for i in range(5000, -1, -1)]


def test_an_unknown_module_is_named_with_those_like_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no kernel module 'virtio-block' in .*did you mean virtio_blk"):
        names(folder, "virtio-block")


@pytest.mark.parametrize("name", ["zzz", "gone", "virtio:d00000002v*", "", "../virtio"])
def test_what_is_no_module(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no kernel module"):
        names(folder, name)


@pytest.mark.parametrize("inner", ["lib/modules/6.1.0-test", "lib/modules", ""])
def test_the_folder_may_be_that_of_the_version_or_a_tree(folder: Path, inner: str) -> None:
    assert modules.find_folder(folder.parents[2] / inner) == folder


def test_a_tree_with_several_versions(folder: Path) -> None:
    (folder.parent / "6.9.0/kernel").mkdir(parents=True)

    with pytest.raises(ConfigError, match=r"several kernels \(6.1.0-test, 6.9.0\)"):
        modules.find_folder(folder.parents[2])


def test_a_folder_where_depmod_has_not_been(folder: Path) -> None:
    (folder / "modules.dep").unlink()

    with pytest.raises(HostError, match=rf"`depmod -b {folder.parents[2]} 6.1.0-test`"):
        modules.find_folder(folder)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_modules(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(NotFoundError, match=name):
        modules.find_folder(tmp_path / name)


COMPRESSED = {
    "m.ko": ELF,
    "m.ko.gz": gzip.compress(ELF),
    "m.ko.xz": lzma.compress(ELF, check=lzma.CHECK_CRC32),
    "m.ko.zst": zstandard.compress(ELF),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_module_is_decompressed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(COMPRESSED[name])

    assert modules.load(tmp_path / name) == ELF


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("content", [b"", b"some text, not a module"])
def test_a_file_that_is_no_module(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ImageError, match=name):
        modules.load(tmp_path / name)


@pytest.mark.parametrize("name", ["m.ko.gz", "m.ko.xz", "m.ko.zst"])
def test_a_truncated_module(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(COMPRESSED[name][:-8])

    with pytest.raises(ImageError, match="ends early"):
        modules.load(tmp_path / name)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_module_that_unpacks_to_more_than_any(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(COMPRESSED[name])
    monkeypatch.setattr(modules, "MAX_MODULE", len(ELF) - 1)

    with pytest.raises(ImageError, match=name):
        modules.load(tmp_path / name)


def test_a_module_that_modules_dep_names_but_is_gone(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.ko"):
        modules.load(tmp_path / "gone.ko")


def test_drivers_that_a_kernel_does_not_have() -> None:
    kernel = b"\x7fELF\0virtio-mmio\0virtio_blk_probe\0virtio_net\0"

    missing = modules.not_built_in(kernel, ["virtio_mmio", "virtio_blk", "virtio_net", "virtio-rng", "virtio_rng"])

    assert missing == ["virtio_blk", "virtio_rng"]
