"""Which kernel is taken when the user names none, and where its modules are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from images import VERSION, bzimage

from kvmpy.boot import kernels
from kvmpy.core.errors import NotFoundError

NOBODY = 65534


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A host's file system that every user can enter, with an empty cache folder."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        yield path


def kernel(path: Path, version: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (version or path.name.removeprefix("vmlinuz-")).encode() + b" (someone@somewhere) #1 SMP\0"
    path.write_bytes(bzimage().replace(VERSION, text.ljust(len(VERSION), b"\0")))
    return path


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read everything, where we have it."""
    user = os.getuid()
    os.setresuid(*((NOBODY, NOBODY, 0) if user == 0 else (user, user, user)))
    try:
        yield
    finally:
        os.setresuid(user, user, user)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("6.1.9", "6.1.10"),
        ("5.19.0-1-amd64", "6.1.0-1-amd64"),
        ("6.1.0-9-amd64", "6.1.0-10-amd64"),
        ("6.1", "6.1.1"),
        ("6.2.0-rc7", "6.2.0"),
        ("6.2.0-rc7", "6.2.0-1"),
        ("6.2.0-rc2", "6.2.0-rc10"),
    ],
)
def test_the_newest_kernel_of_the_host(root: Path, older: str, newer: str) -> None:
    kernel(root / f"boot/vmlinuz-{older}")
    wanted = kernel(root / f"boot/vmlinuz-{newer}")

    assert kernels.find_kernel(root) == wanted


@pytest.mark.parametrize(
    "path", ["boot/vmlinuz", "boot/vmlinuz-linux", "lib/modules/6.9.1/vmlinuz", "usr/lib/modules/6.9.1/vmlinuz"]
)
def test_the_version_counts_not_the_name(root: Path, path: str) -> None:
    kernel(root / "boot/vmlinuz-6.9.0")
    wanted = kernel(root / path, "6.9.1")

    assert kernels.find_kernel(root) == wanted


def test_what_is_no_kernel_is_passed_over(root: Path) -> None:
    wanted = kernel(root / "boot/vmlinuz-6.1.0")
    (root / "boot/vmlinuz-9.0.0").write_bytes(b"not a kernel" * 1000)
    (root / "boot/vmlinuz-9.1.0").write_bytes(b"")
    (root / "boot/vmlinuz-9.2.0").mkdir()
    (root / "boot/vmlinuz-9.3.0").symlink_to("gone")

    assert kernels.find_kernel(root) == wanted


def test_the_host_comes_before_the_cache(root: Path) -> None:
    wanted = kernel(root / "boot/vmlinuz-6.1.0")
    kernel(root / "cache/kvmpy/kernels/x/boot/vmlinuz-6.9.0-cloud-amd64")

    assert kernels.find_kernel(root) == wanted


def test_in_the_cache_cloud_kernels_come_first(root: Path) -> None:
    kernel(root / "cache/kvmpy/kernels/amd64/boot/vmlinuz-6.9.0-9-amd64")
    kernel(root / "cache/kvmpy/kernels/old/boot/vmlinuz-6.1.0-9-cloud-amd64")
    wanted = kernel(root / "cache/kvmpy/kernels/new/boot/vmlinuz-6.1.0-10-cloud-amd64")

    assert kernels.find_kernel(root) == wanted


def test_a_kernel_for_root_only_is_named(root: Path) -> None:
    private = kernel(root / "boot/vmlinuz-6.8.0-45-generic")
    private.chmod(0o000)

    with unprivileged(), pytest.raises(NotFoundError, match=rf"{private} is for root only; .*sudo install"):
        kernels.find_kernel(root)


def test_a_kernel_for_root_only_is_passed_over(root: Path) -> None:
    wanted = kernel(root / "boot/vmlinuz-6.1.0")
    kernel(root / "boot/vmlinuz-6.8.0").chmod(0o000)

    with unprivileged():
        assert kernels.find_kernel(root) == wanted


def test_no_kernel_at_all(root: Path) -> None:
    with pytest.raises(NotFoundError, match="no kernel on this host; run `scripts/fetch-kernel cloud`"):
        kernels.find_kernel(root)


@pytest.mark.parametrize(
    ("where", "modules"),
    [
        ("tree/boot/vmlinuz-6.1.0-test", "tree/lib/modules/6.1.0-test"),
        ("boot/vmlinuz-6.1.0-test", "lib/modules/6.1.0-test"),
        ("usr/lib/modules/6.1.0-test/vmlinuz", "usr/lib/modules/6.1.0-test"),
        ("elsewhere/bzImage", "lib/modules/6.1.0-test"),
    ],
)
def test_the_modules_of_a_kernel(root: Path, where: str, modules: str) -> None:
    image = kernel(root / where, "6.1.0-test")
    (root / modules).mkdir(parents=True, exist_ok=True)

    assert kernels.modules_dir_for(image, root) == root / modules


def test_the_modules_of_a_kernel_behind_a_link(root: Path) -> None:
    kernel(root / "cache/pkg/boot/vmlinuz-6.1.0")
    (root / "cache/pkg/lib/modules/6.1.0").mkdir(parents=True)
    (root / "cache/cloud").symlink_to("pkg")

    found = kernels.modules_dir_for(root / "cache/cloud/boot/vmlinuz-6.1.0", root)

    assert found == root / "cache/pkg/lib/modules/6.1.0"


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(5000), bzimage(kernel_version=0)])
def test_a_file_that_tells_no_version_has_no_modules(root: Path, content: bytes) -> None:
    (root / "vmlinux").write_bytes(content)

    assert kernels.modules_dir_for(root / "vmlinux", root) is None
    assert kernels.modules_dirs(root / "vmlinux", root) == []


@pytest.mark.parametrize("content", [bzimage(kernel_version=0xFFFF), bzimage(header=0), bzimage()[:0x210]])
def test_a_header_that_tells_no_version(root: Path, content: bytes) -> None:
    (root / "bzImage").write_bytes(content)

    assert kernels.kernel_version(root / "bzImage") is None


@pytest.mark.parametrize("text", ["../../etc", "6/../..", "", "\xff"])
def test_a_version_that_would_lead_elsewhere_is_cut(root: Path, text: str) -> None:
    image = root / "bzImage"
    image.write_bytes(bzimage().replace(VERSION, text.encode("latin-1").ljust(len(VERSION), b"\0")))

    assert kernels.kernel_version(image) in (None, "6")
