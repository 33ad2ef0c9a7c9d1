"""Images from registries: asked for once, and known afterwards by the name under which they came."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..core import progress
from ..core.errors import ConfigError, ImageError, NotFoundError
from . import manifest, reference, store
from .archive import layers_of
from .layer import Layer
from .manifest import Config, Manifest
from .reference import Reference
from .registry import BROKEN, Registry
from .store import Entry

WHEN = ("missing", "always", "never")


def entry(name: str, limit: int, when: str) -> Entry:
    """The disk for the image `name`; `limit` bounds what it may hold, `when` says when its registry is asked.

    Raises ConfigError, NotFoundError, ImageError and HostError.
    """
    if when not in WHEN:
        raise ConfigError(f'invalid --pull "{when}"', f"use {', '.join(WHEN)}")
    wanted = reference.parse(name)
    if when != "always" and (known := _known(wanted)):
        return known
    if when == "never":
        raise NotFoundError(f"{wanted} is not here", "pull it: leave out --pull never")
    with progress.working(f"pulling {wanted}") as work:
        registry = Registry(wanted)
        found = _manifest(registry, wanted)
        raw = manifest.verified(found.config, registry.read(found.config), registry.name)
        config = manifest.parse_config(raw, registry.name)
        got = store.find(config.id)
        if got is None:
            work.total = sum(layer.size for layer in found.layers)
            if work.total > limit:
                what = f"{wanted} is larger than {limit} bytes"
                raise ImageError(what, "if you trust it, allow more with --root-limit (root_limit=)")
            got = store.make(config, partial(_download, registry, found, config, work), limit)
    _remember(wanted, config.id)
    return got


def _manifest(registry: Registry, wanted: Reference) -> Manifest:
    raw = registry.manifest(wanted.wanted)
    if wanted.digest:
        manifest.verified(manifest.Descriptor("", wanted.digest, len(raw)), raw, registry.name)
    return manifest.choose(registry, manifest.parse_json(raw, registry.name))


def _download(registry: Registry, found: Manifest, config: Config, work: progress.Work, part: Path) -> Sequence[Layer]:
    """The layers, in files below `part`."""
    names = {layer.digest: part / layer.digest.replace(":", "-") for layer in found.layers}
    for layer in {layer.digest: layer for layer in found.layers}.values():
        with names[layer.digest].open("xb", buffering=0) as file:
            registry.download(layer, file, work.add)
        _check(names[layer.digest], layer.digest, registry.name)
    work.title, work.done = f"unpacking {registry.reference}", 0
    return layers_of(found.layers, config, registry.name, lambda digest: names[digest].open("rb", buffering=0))


def _check(path: Path, digest: str, name: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, digest.partition(":")[0]).hexdigest()
    if actual != digest.partition(":")[2]:
        raise ImageError(f"{name}: the blob {digest} is not what its digest says", BROKEN)


# Names.


def _place(wanted: Reference) -> Path:
    return store.folder() / "refs" / hashlib.sha256(f"{wanted.scheme} {wanted}".encode()).hexdigest()


def _known(wanted: Reference) -> Entry | None:
    try:
        config_id = json.loads(_place(wanted).read_bytes())["config"]
        return store.find(manifest.check_digest(config_id, str(wanted)))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _remember(wanted: Reference, config_id: str) -> None:
    """Where that is not possible, the registry is asked the next time."""
    place = _place(wanted)
    with suppress(OSError):
        place.parent.mkdir(mode=0o700, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent)
        with open(handle, "w") as file:
            json.dump({"name": str(wanted), "config": config_id}, file)
        os.replace(name, place)  # noqa: PTH105
