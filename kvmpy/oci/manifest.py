"""Manifests, indexes and configurations of images, as JSON from anywhere (OCI image-spec 1.1; Docker manifest v2.2)."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from typing import Any, Protocol

from ..core.errors import ConfigError, ImageError
from ..core.record import Record
from .tree import REMEDY

MAX_JSON = 4 << 20  # bytes of a manifest, an index or a configuration: what registries take
MAX_LAYERS = 1000  # Docker makes at most 127
MAX_INDEXES = 8  # one within the other
PLATFORM = ("linux", "amd64")
DIGEST = re.compile(r"(sha256):[0-9a-f]{64}|(sha512):[0-9a-f]{128}", re.ASCII)
REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
LAYER_TYPE = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.gzip|\.zstd)?)"
)


class Descriptor(Record, frozen=True):
    """What stands for content: its type, digest, and size in bytes (descriptor.md)."""

    type: str
    digest: str
    size: int


class Config(Record, frozen=True):
    """How an image wants to be run (config.md); `id` is the digest of the configuration, and so of all the image."""

    id: str
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    user: str = ""
    diff_ids: tuple[str, ...] = ()

    def argv(self, words: tuple[str, ...] | list[str] = ()) -> list[str]:
        """The command for `words`, which take the place of Cmd behind the Entrypoint; raises ConfigError for none."""
        argv = [*self.entrypoint, *(words or self.cmd)]
        if not argv:
            raise ConfigError("the image names no command", "write one behind the options: kvmpy run ... -- CMD WORDS")
        return argv


class Manifest(Record, frozen=True):
    """One image: its configuration and layers, lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class Blobs(Protocol):
    """Where the content behind descriptors is."""

    name: str

    def read(self, descriptor: Descriptor) -> bytes:
        """A blob of at most MAX_JSON bytes, not checked; raises ImageError, NotFoundError or HostError."""


def verified(descriptor: Descriptor, data: bytes, name: str) -> bytes:
    """`data`, if that is what the descriptor stands for; raises ImageError."""
    algorithm = descriptor.digest.partition(":")[0]
    if f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}" != descriptor.digest:
        raise ImageError(f"{name}: the blob {descriptor.digest} is not what its digest says", REMEDY)
    return data


def choose(blobs: Blobs, index: Mapping[str, Any], wanted: str = "") -> Manifest:
    """The image for this platform that an index leads to, through more of them. `wanted`: its name in the index.

    Raises ImageError, and ConfigError when there are several, or none for this platform.
    """
    for _ in range(MAX_INDEXES):
        if is_manifest(index):
            return parse_manifest(index, blobs.name)
        descriptor = _choose_one(index, blobs.name, wanted)
        wanted = ""
        if descriptor.type not in (*INDEX_TYPES, *MANIFEST_TYPES):
            raise ImageError(f"{blobs.name}: the unknown media type {descriptor.type!r}", "use an OCI or Docker image")
        index = parse_json(verified(descriptor, blobs.read(descriptor), blobs.name), blobs.name)
    raise ImageError(f"{blobs.name}: more than {MAX_INDEXES} indexes, one in the other", REMEDY)


def is_manifest(data: Mapping[str, Any]) -> bool:
    return "config" in data and "manifests" not in data


def _choose_one(index: Mapping[str, Any], name: str, wanted: str) -> Descriptor:
    found: list[tuple[str, Descriptor]] = []
    others = []
    for item in field(index, "manifests", list, name):
        if not isinstance(item, dict):
            raise ImageError(f"{name}: a manifest that is no object", REMEDY)
        platform, annotations = field(item, "platform", dict, name, {}), field(item, "annotations", dict, name, {})
        here = platform.get("os", PLATFORM[0]), platform.get("architecture", PLATFORM[1])
        known_as = [str(annotations.get(key, "")) for key in (REF_NAME, IMAGE_NAME)]
        if wanted and wanted not in known_as:
            others.append(known_as[1] or known_as[0])
        elif here == PLATFORM:
            found.append((known_as[1] or known_as[0], parse_descriptor(item, name)))
        elif here != ("unknown", "unknown"):  # what is no image, such as BuildKit's attestations
            others.append("/".join(map(str, here)))
    if not found:
        what = f'no image "{wanted}"' if wanted else f"no image for {'/'.join(PLATFORM)}"
        raise ConfigError(f"{name} has {what}", f"it has {', '.join(others[:10]) or 'none at all'}")
    if len({descriptor.digest for _, descriptor in found}) > 1 and any(ref for ref, _ in found):
        names = ", ".join(ref for ref, _ in found[:10])
        raise ConfigError(f"{name} has several images ({names})", f"name one: {name}#NAME")
    return found[0][1]


def parse_manifest(data: Mapping[str, Any], name: str) -> Manifest:
    """Raises ImageError."""
    layers = [parse_descriptor(item, name) for item in field(data, "layers", list, name)]
    if len(layers) > MAX_LAYERS:
        raise ImageError(f"{name}: {len(layers)} layers", f"{MAX_LAYERS} is the limit; use another image")
    for layer in layers:
        if not LAYER_TYPE.fullmatch(layer.type):
            raise ImageError(
                f"{name}: a layer of the unknown media type {layer.type!r}", "use an image with tar layers"
            )
    return Manifest(parse_descriptor(field(data, "config", dict, name), name), tuple(layers))


def parse_config(data: bytes, name: str) -> Config:
    """Raises ImageError, and ConfigError when the image is for another platform."""
    whole = parse_json(data, name)
    platform = field(whole, "os", str, name, PLATFORM[0]), field(whole, "architecture", str, name, PLATFORM[1])
    if platform != PLATFORM:
        raise ConfigError(f"{name} is an image for {'/'.join(platform)}", f"use one for {'/'.join(PLATFORM)}")
    config = field(whole, "config", dict, name, {})
    cwd = _text(field(config, "WorkingDir", str, name, ""), name)
    env = [word.partition("=")[::2] for word in strings(config, "Env", name)]
    diff_ids = strings(field(whole, "rootfs", dict, name), "diff_ids", name)
    for digest in diff_ids:
        check_digest(digest, name)
    return Config(
        id=f"sha256:{hashlib.sha256(data).hexdigest()}",
        entrypoint=strings(config, "Entrypoint", name),
        cmd=strings(config, "Cmd", name),
        env=tuple((key, value) for key, value in env if key),
        cwd=posixpath.normpath("/" + cwd.lstrip("/")) if cwd else "",
        user=_text(field(config, "User", str, name, ""), name),
        diff_ids=diff_ids,
    )


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """An object; raises ImageError."""
    if len(data) > MAX_JSON:
        raise ImageError(f"{name}: a manifest of {len(data)} bytes", f"{MAX_JSON} is the limit; use another image")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ImageError(f"{name}: a manifest that is no JSON", REMEDY) from None
    if not isinstance(found, dict):
        raise ImageError(f"{name}: a manifest that is no object", REMEDY)
    return found


def parse_descriptor(data: Any, name: str) -> Descriptor:
    """Raises ImageError."""
    if not isinstance(data, dict):
        raise ImageError(f"{name}: a descriptor that is no object", REMEDY)
    size = field(data, "size", int, name)
    if not 0 <= size < 1 << 62:
        raise ImageError(f"{name}: a blob of {size} bytes", REMEDY)
    digest = check_digest(field(data, "digest", str, name), name)
    return Descriptor(field(data, "mediaType", str, name, ""), digest, size)


def check_digest(digest: str, name: str) -> str:
    """`digest`, if it is one whose algorithm is known; raises ImageError."""
    if not DIGEST.fullmatch(digest):
        raise ImageError(f"{name}: {digest[:100]!r} is no digest by sha256 or sha512", REMEDY)
    return digest


def field(data: Mapping[str, Any], key: str, kind: type, name: str, default: object = None) -> Any:
    """A member of an object, of this kind; null is as good as not there. Raises ImageError."""
    value = data.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ImageError(f"{name}: {key} is missing, or of the wrong kind", REMEDY)
    return value


def strings(data: Mapping[str, Any], key: str, name: str) -> tuple[str, ...]:
    """A list of words; raises ImageError."""
    found = field(data, key, list, name, [])
    if not all(isinstance(item, str) for item in found):
        raise ImageError(f"{name}: {key} is no list of words", REMEDY)
    return tuple(_text(item, name) for item in found)


def _text(value: str, name: str) -> str:
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ImageError(f"{name}: a word that no program can be given ({value[:40]!r})", REMEDY)
    return value
