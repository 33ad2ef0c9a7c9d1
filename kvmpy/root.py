"""Where a sandbox's root comes from: what `--root` may say, and what is made of it.

A container image becomes an ext4 file system in the user's cache, not a folder to be shared: so its files have their
own owners, modes, devices and capabilities although kvmpy is not root, and no name in an image is one on the host.
"""

from __future__ import annotations

import os
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from .core.errors import ConfigError, HostError, NotFoundError
from .core.record import Record
from .core.units import parse_size

if TYPE_CHECKING:
    from .oci.manifest import Config
    from .oci.store import Entry
    from .virtio.root_disk import RootDisk

HEAD = 512  # bytes of a file that tell what it is
DEFAULT_LIMIT = "16G"
OCI = "oci:"


class Root(Record, frozen=True):
    """A root that is no plain folder: the disk, and for a container image how that wants to be run."""

    disk: RootDisk
    image: Config | None = None


def is_folder(what: str | PathLike[str]) -> bool:
    """Whether `what` is a folder to be shared as it is, or nothing that is there: who shares it says so."""
    text = fspath(what)
    if text.startswith(OCI):
        return False
    path, _ = _split(text)
    return not _is_layout(path) if path.is_dir() else not path.exists()


def find(what: str | PathLike[str], *, limit: str | int = DEFAULT_LIMIT, pull: str = "missing") -> Root:
    """The disk for an image on disk or, with `oci:NAME`, in a registry.

    limit  the most bytes that a container image may have when it is unpacked
    pull   when a registry is asked: missing (when the image is not here), always, never
    Raises ConfigError, NotFoundError, ImageError and HostError.
    """
    from .oci import archive, store
    from .virtio.root_disk import RootDisk

    size = parse_size(limit)
    text = fspath(what)
    if text.startswith(OCI):
        from .oci import pull as registry  # with what the network takes

        return _of(registry.entry(text.removeprefix(OCI), size, pull))
    path, wanted = _split(text)
    try:
        head = b"" if path.is_dir() else _head(path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", "give --root a folder or an image that exists") from None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", "make it readable") from None
    if kind := archive.compression(head):
        unpack = "gunzip" if kind == "gzip" else "unzstd"
        raise ConfigError(f"{path} is compressed with {kind}", f"decompress it first ({unpack})")
    if path.is_dir() or archive.is_archive(head):
        with archive.opened(path, wanted) as image:
            return _of(store.find(image.config.id) or store.make(image.config, lambda _: image.layers, size))
    return Root(RootDisk(path))


def _is_layout(folder: Path) -> bool:
    """Whether a folder is an OCI image layout, or a `docker save` archive that was unpacked, and no root itself."""
    return (folder / "oci-layout").is_file() or ((folder / "manifest.json").is_file() and not (folder / "bin").exists())


def _of(entry: Entry) -> Root:
    from .virtio.root_disk import RootDisk

    return Root(RootDisk(entry.disk), entry.config)


def _split(text: str) -> tuple[Path, str]:
    """A path, and the name of an image behind the last `#` of it where there is no such path."""
    path, mark, name = text.rpartition("#")
    return (Path(path), name) if mark and path and not os.path.lexists(text) else (Path(text), "")


def _head(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold this up
    try:
        return os.read(fd, HEAD)
    finally:
        os.close(fd)
