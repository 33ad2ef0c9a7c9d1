"""Names of images in registries, as Docker reads them: `[http[s]://][HOST[:PORT]/]NAME[:TAG][@DIGEST]`."""

from __future__ import annotations

import re

from ..core.errors import ConfigError
from ..core.record import Record
from .manifest import DIGEST

DOCKER = "docker.io"  # for names without a host, and the host that serves them
DOCKER_HOST = "registry-1.docker.io"
MAX_NAME = 255
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(rf"{PART}(?:/{PART})*", re.ASCII)
TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?", re.ASCII)
LOOPBACK = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]+)?", re.ASCII)


class Reference(Record, frozen=True):
    """`host` is the registry's, `scheme` how it is spoken to: http with one of this machine, or if the name says so."""

    scheme: str
    host: str
    name: str
    tag: str
    digest: str  # empty, or what counts instead of the tag

    def __str__(self) -> str:
        host = DOCKER if self.host == DOCKER_HOST else self.host
        return f"{host}/{self.name}" + (f"@{self.digest}" if self.digest else f":{self.tag}")

    @property
    def wanted(self) -> str:
        """How its registry knows the manifest."""
        return self.digest or self.tag


def parse(text: str) -> Reference:
    """Raises ConfigError."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "", text
    rest, at, digest = rest.partition("@")
    host, slash, name = rest.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, name = DOCKER, rest
    name, colon, tag = name.partition(":")
    if host in (DOCKER, "index.docker.io"):
        host, name = DOCKER_HOST, name if "/" in name else f"library/{name}"
    tag = tag if colon else "latest"
    bad_digest = at and not DIGEST.fullmatch(digest)
    if bad_digest or not (HOST.fullmatch(host) and NAME.fullmatch(name) and TAG.fullmatch(tag)) or len(name) > MAX_NAME:
        raise ConfigError(
            f'"{text}" is no name of an image', "use oci:[HOST/]NAME[:TAG], in lower case, or @sha256:..."
        )
    if scheme not in ("", "http", "https"):
        raise ConfigError(
            f'"{text}": images are not pulled by {scheme}', "use https, or http for a registry of your own"
        )
    return Reference(scheme or ("http" if LOOPBACK.fullmatch(host) else "https"), host, name, tag, digest)
