"""Images on disk: an OCI image layout, as a folder or as a tar archive, and what `docker save` writes.

Raises NotFoundError, ImageError and HostError, each with the file.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..core.errors import ConfigError, HostError, ImageError, NotFoundError
from . import manifest, tar
from .layer import GZIP, ZSTD, Layer
from .manifest import MAX_JSON, Config, Descriptor
from .tree import REMEDY

MAX_MEMBERS = 100_000  # files in an archive: blobs and their names
MAX_HOPS = 8  # from link to link in an archive
LAYOUT, INDEX, DOCKER = "oci-layout", "index.json", "manifest.json"


class Files(Protocol):
    """Files by name, whatever holds them."""

    def open(self, name: str) -> BinaryIO | None:
        """None: there is no such file. The caller closes it."""

    def close(self) -> None: ...


class Folder:
    """Files below a folder of the host."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, name: str) -> BinaryIO | None:
        try:
            fd = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold this up
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise HostError(f"cannot read {self.path / name}: {error.strerror}", "make it readable") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageError(f"{self.path / name} is no regular file", REMEDY)
        return open(fd, "rb", buffering=0)

    def close(self) -> None:
        pass


class Archive:
    """Files in a tar archive, which is read through once to find them. Links lead to other files of it."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise NotFoundError(f"there is no {path}", "give an image that exists") from None
        except OSError as error:
            raise HostError(f"cannot read {path}: {error.strerror}", "make it readable") from None
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        try:
            self._find(path)
        except BaseException:
            self._file.close()
            raise

    def _find(self, path: Path) -> None:
        size = os.fstat(self._file.fileno()).st_size
        archive = tar.Tar(self._file.read, self._skip)
        try:
            for count, member in enumerate(archive):
                if count == MAX_MEMBERS:
                    raise ImageError(f"more than {MAX_MEMBERS} files", "use an image with fewer")
                name = posixpath.normpath(os.fsdecode(member.name))
                if member.kind == tar.FILE and member.runs is None:
                    if archive.offset + member.size > size:
                        raise ImageError(f"it ends within {name!r}", REMEDY)
                    self._places[name] = archive.offset, member.size
                elif member.kind == tar.LINK:
                    self._links[name] = posixpath.normpath(os.fsdecode(member.target))
                elif member.kind == tar.SYMLINK:
                    folder = posixpath.dirname(name)
                    self._links[name] = posixpath.normpath(posixpath.join(folder, os.fsdecode(member.target)))
        except ImageError as error:
            raise ImageError(f"{path}: {error.what}", error.remedy) from None

    def _skip(self, size: int) -> None:
        self._file.seek(size, os.SEEK_CUR)

    def open(self, name: str) -> BinaryIO | None:
        for _ in range(MAX_HOPS):
            if name in self._places:
                return Part(self._file.fileno(), *self._places[name])  # type: ignore[return-value]
            name = self._links.get(name, "")
        return None

    def close(self) -> None:
        self._file.close()


class Part:
    """A range of a file that others read too, as a file."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._at, self._end = fd, offset, offset + size

    def read(self, size: int = -1) -> bytes:
        left = self._end - self._at
        data = os.pread(self._fd, left if size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        pass

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Stored:
    """An image on disk: `config`, and `layers`, lowest first. `name` is for people."""

    def __init__(self, files: Files, name: str, wanted: str = "") -> None:
        self._files = files
        self.name = name
        if self._json(LAYOUT) is not None:
            index = self._json(INDEX)
            if index is None:
                raise ImageError(f"{name} has no {INDEX}", REMEDY)
            found = manifest.choose(self, manifest.parse_json(index, name), wanted)
            raw = manifest.verified(found.config, self.read(found.config), name)
            self.config = manifest.parse_config(raw, name)
            self.layers = layers_of(found.layers, self.config, name, self._opener)
        else:
            self._read_docker(wanted)

    def read(self, descriptor: Descriptor) -> bytes:
        data = self._json(_blob(descriptor.digest))
        if data is None:
            raise ImageError(f"{self.name}: the blob {descriptor.digest} is missing", REMEDY)
        return data

    def _json(self, path: str) -> bytes | None:
        file = self._files.open(path)
        if file is None:
            return None
        with file:
            data = b""
            while len(data) <= MAX_JSON and (part := file.read(MAX_JSON + 1 - len(data))):
                data += part
        return data

    def _opener(self, digest: str) -> BinaryIO:
        return self._open(_blob(digest))

    def _open(self, path: str) -> BinaryIO:
        file = self._files.open(path)
        if file is None:
            raise ImageError(f"{self.name}: {path} is missing", REMEDY)
        return file

    def _read_docker(self, wanted: str) -> None:
        """What `docker save` wrote before it wrote OCI layouts (Docker image specification 1.2)."""
        name = self.name
        data = self._json(DOCKER)
        if data is None:
            raise ConfigError(
                f"{name} is no container image: neither {LAYOUT} nor {DOCKER} is in it",
                "give an OCI image layout, what `docker save` writes, or a disk image",
            )
        images = manifest.parse_json(b'{"images":' + data + b"}", name)
        found = [item for item in manifest.field(images, "images", list, name) if isinstance(item, dict)]
        tags = [tag for item in found for tag in manifest.strings(item, "RepoTags", name)]
        if wanted:
            found = [item for item in found if wanted in manifest.strings(item, "RepoTags", name)]
        if len(found) != 1:
            if wanted:
                raise ConfigError(
                    f'{name} has no image "{wanted}"', f"it has {', '.join(tags[:10]) or 'none with a name'}"
                )
            raise ConfigError(f"{name} has several images ({', '.join(tags[:10])})", f"name one: {name}#NAME:TAG")
        config = self._json(posixpath.normpath(manifest.field(found[0], "Config", str, name)))
        if config is None:
            raise ImageError(f"{name}: the configuration of the image is missing", REMEDY)
        self.config = manifest.parse_config(config, name)
        paths = [posixpath.normpath(path) for path in manifest.strings(found[0], "Layers", name)]
        _check_count(len(paths), self.config, name)
        self.layers = [
            Layer(f"{name}: layer {path}", lambda path=path: self._open(path), None, diff_id)  # type: ignore[misc]
            for path, diff_id in zip(paths, self.config.diff_ids, strict=True)
        ]


def layers_of(descriptors: tuple[Descriptor, ...], config: Config, name: str, opener: Any) -> list[Layer]:
    """The layers of a manifest; raises ImageError when the configuration has others."""
    _check_count(len(descriptors), config, name)
    return [
        Layer(f"{name}: layer {item.digest}", lambda item=item: opener(item.digest), item.digest, diff_id, item.size)  # type: ignore[misc]
        for item, diff_id in zip(descriptors, config.diff_ids, strict=True)
    ]


def _check_count(layers: int, config: Config, name: str) -> None:
    if layers != len(config.diff_ids) or layers > manifest.MAX_LAYERS:
        raise ImageError(f"{name} has {layers} layers, and {len(config.diff_ids)} in its configuration", REMEDY)


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def is_archive(head: bytes) -> bool:
    """Whether a file that begins with these bytes, a block or more, is a tar archive."""
    return head[257:262] == b"ustar"


@contextmanager
def opened(path: Path, wanted: str = "") -> Iterator[Stored]:
    """The image at `path`, a folder or an archive; `wanted` is its name where there are several."""
    files: Files = Folder(path) if path.is_dir() else Archive(path)
    try:
        yield Stored(files, str(path), wanted)
    finally:
        files.close()


def compression(head: bytes) -> str:
    """What a file that begins with these bytes is compressed with, if that is what layers may be."""
    return "gzip" if head.startswith(GZIP) else "zstd" if head.startswith(ZSTD) else ""
