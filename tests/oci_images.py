"""Tiny container images: layers from entries, and the layouts and archives that hold them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

OCI = "application/vnd.oci.image"


def entry(
    name: str, data: bytes | None = None, *, kind: bytes = tarfile.REGTYPE, **attributes: Any
) -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data or b"")
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data or b""


def folder(name: str, **attributes: Any) -> tuple[Any, bytes]:
    return entry(name, kind=tarfile.DIRTYPE, **attributes)


def link(name: str, target: str, hard: bool = False) -> tuple[Any, bytes]:
    return entry(name, kind=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target)


def layer(*entries: tuple[Any, bytes]) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config(layers: Sequence[bytes], **settings: Any) -> bytes:
    platform = {"os": settings.pop("os", "linux"), "architecture": settings.pop("architecture", "amd64")}
    rootfs = {"type": "layers", "diff_ids": [digest(data) for data in layers]}
    return json.dumps({**platform, "config": settings, "rootfs": rootfs}).encode()


COMPRESSIONS = {
    "": lambda data: data,
    "+gzip": lambda data: gzip.compress(data, mtime=0),
    "+zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}


class Image:
    """The blobs of one image, by digest: `manifest` leads to all of them."""

    def __init__(self, *layers: bytes, compression: str = "+gzip", **settings: Any) -> None:
        self.layers = layers
        self.config = config(layers, **settings)
        packed = [COMPRESSIONS[compression](data) for data in layers]
        self.blobs = {digest(data): data for data in [*packed, self.config]}
        described = [self.describe(data, f"{OCI}.layer.v1.tar{compression}") for data in packed]
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.describe(self.config, f"{OCI}.config.v1+json"),
            "layers": described,
        }
        self.manifest = json.dumps(manifest).encode()
        self.blobs[digest(self.manifest)] = self.manifest

    @staticmethod
    def describe(data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}

    def descriptor(self, **more: Any) -> dict[str, Any]:
        return self.describe(self.manifest, f"{OCI}.manifest.v1+json", **more)

    def files(self, *descriptors: dict[str, Any]) -> dict[str, bytes]:
        """An OCI image layout by names of files."""
        index = {"schemaVersion": 2, "manifests": descriptors or [self.descriptor()]}
        files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
        return files | {"blobs/" + name.replace(":", "/"): data for name, data in self.blobs.items()}

    def docker_files(self) -> dict[str, bytes]:
        """What `docker save` wrote before version 25."""
        names = [f"{number}/layer.tar" for number in range(len(self.layers))]
        name = f"{digest(self.config).partition(':')[2]}.json"
        manifest = [{"Config": name, "RepoTags": ["tiny:latest"], "Layers": names}]
        return dict(zip(names, self.layers, strict=True)) | {
            name: self.config,
            "manifest.json": json.dumps(manifest).encode(),
        }


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(layer(*(entry(name, data) for name, data in files.items())))
    return path
