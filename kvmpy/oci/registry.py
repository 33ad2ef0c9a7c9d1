"""Asks a registry for manifests and blobs (OCI distribution-spec 1.1; Docker's token authentication).

What comes is bounded here, and checked by digest by who asks for it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..core.errors import ConfigError, HostError, KvmpyError, NotFoundError
from .manifest import INDEX_TYPES, MANIFEST_TYPES, MAX_JSON, Descriptor
from .reference import DOCKER_HOST, Reference

ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
TIMEOUT = 30.0  # seconds without a byte
TRIES = 4
PAUSE = 0.5  # seconds before the second try, twice as many before each further one
MAX_PAUSE = 20.0  # that a registry may ask for
MAX_TOKEN = 1 << 20  # bytes
CHUNK = 1 << 18
AGAIN = (408, 429, 500, 502, 503, 504)
REFUSED = (401, 403)
REDIRECTS = range(300, 400)
DOCKER_LOGIN = "https://index.docker.io/v1/"  # under which docker keeps the login for its own registry
CHALLENGE = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Registry:
    """The registry of one reference; nothing is kept open between requests.

    Raises NotFoundError, ConfigError for what it refuses, and HostError when it cannot be reached or fails.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.name = str(reference)
        self._authorization = ""
        self._base = f"{reference.scheme}://{reference.host}/v2/{reference.name}"
        self._opener = _opener(reference.scheme == "http")

    def manifest(self, wanted: str) -> bytes:
        """The manifest or index that has this tag or digest."""
        return self._whole(f"{self._base}/manifests/{wanted}", {"Accept": ACCEPT})

    def read(self, descriptor: Descriptor) -> bytes:
        """A manifest, or a blob of at most MAX_JSON bytes; not checked."""
        if descriptor.type in (*MANIFEST_TYPES, *INDEX_TYPES):
            return self.manifest(descriptor.digest)
        return self._whole(f"{self._base}/blobs/{descriptor.digest}", {})

    def download(self, descriptor: Descriptor, file: IO[bytes], tick: Callable[[int], None]) -> None:
        """Append a blob to an empty file; what a lost connection has left off is asked for again. Not checked."""
        url = f"{self._base}/blobs/{descriptor.digest}"

        def rest() -> None:
            done = file.tell()
            with self._open(url, {"Range": f"bytes={done}-"} if done else {}) as answer:
                if done and answer.status != 206:  # all of it, again
                    file.seek(0)
                    file.truncate()
                    tick(-done)
                while data := answer.read(CHUNK):
                    if file.tell() + len(data) > descriptor.size:
                        raise HostError(
                            f"{self.name}: the blob {descriptor.digest} is longer than it should be", BROKEN
                        )
                    _append(file, data)
                    tick(len(data))
            if file.tell() < descriptor.size:
                raise _EndsEarly

        if descriptor.size:
            self._try(rest)

    # Requests.

    def _whole(self, url: str, headers: dict[str, str]) -> bytes:
        def ask() -> bytes:
            with self._open(url, headers) as answer:
                data: bytes = answer.read(MAX_JSON + 1)
                if answer.length and len(data) <= MAX_JSON:  # there was to be more
                    raise _EndsEarly
            return data

        found: bytes = self._try(ask)
        return found

    def _try(self, job: Callable[[], Any]) -> Any:
        """Do it again where that may help, a bounded number of times."""
        for attempt in range(1, TRIES + 1):
            try:
                return job()
            except KvmpyError:
                raise
            except _LaterError as error:
                pause, failure = error.pause, f"it answers {error}"
            except _EndsEarly:
                pause, failure = 0.0, "its answers end early"
            except (OSError, http.client.HTTPException) as error:
                pause, failure = 0.0, self._why(error)
            if attempt < TRIES:
                time.sleep(max(pause, PAUSE * 2 ** (attempt - 1)))
        raise HostError(
            f"cannot get {self.name} from {self.reference.host}: {failure}", "look at the network, or try later"
        )

    def _why(self, error: Exception) -> str:
        """What went wrong; raises HostError for what another try does not mend."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        host = self.reference.host
        if isinstance(reason, ssl.SSLCertVerificationError):
            remedy = "set SSL_CERT_FILE to the certificate of its authority, if you trust that"
            raise HostError(f"the certificate of {host} is not trusted ({reason.verify_message})", remedy)
        if isinstance(reason, ssl.SSLError):
            remedy = f"if it speaks plain http, say so: oci:http://{host}/{self.reference.name}"
            raise HostError(f"{host} speaks no TLS that is understood ({reason.reason})", remedy)
        if isinstance(reason, socket.gaierror):
            raise HostError(
                f"cannot find {host}: {reason.strerror}", "is there a network? Images that are here need none"
            )
        if isinstance(reason, TimeoutError):
            return f"no answer for {TIMEOUT:g} s"
        return str(getattr(reason, "strerror", None) or reason or type(error).__name__)

    @contextmanager
    def _open(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """An answer of 2xx; raises OSError, HTTPException, or what cannot be mended."""
        try:
            answer = self._send(url, headers)
        except urllib.error.HTTPError as error:
            with error:
                challenge = error.headers.get("WWW-Authenticate", "")
                if urllib.parse.urlsplit(error.url).netloc != self.reference.host:
                    challenge = ""  # from somebody that the registry sent us to, who gets no login of ours
                status = error.code
            if status != 401 or not challenge:
                self._refuse(status, error.headers.get("Retry-After", ""))
            self._authorization = self._authorize(challenge)  # for the first time, or the token is too old
            try:
                answer = self._send(url, headers)
            except urllib.error.HTTPError as second:
                with second:
                    self._refuse(second.code, second.headers.get("Retry-After", ""))
                raise AssertionError from None  # it raises
        with answer:
            yield answer

    def _send(self, url: str, headers: dict[str, str], authorization: str = "") -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "kvmpy", **headers})
        if value := authorization or self._authorization:
            request.add_unredirected_header("Authorization", value)  # for nobody that it sends us to
        return self._opener.open(request, timeout=TIMEOUT)

    def _refuse(self, status: int, after: str) -> None:
        host, name = self.reference.host, self.name
        if status in REFUSED:
            remedy = f"is the name right? If it is private, use `docker login {host}` without a credential helper"
            raise ConfigError(f"{host} does not give {name} to you (status {status})", remedy)
        if status == 404:
            raise NotFoundError(f"{host} has no {name}", "look at its name and tag")
        if status in AGAIN:
            raise _LaterError(status, after)
        if status in REDIRECTS:
            raise HostError(f"{host} sends on those who want {name} to where nothing is", "use another registry")
        raise HostError(f"{host} answers status {status} for {name}", "is it a registry of container images?")

    # Who we are.

    def _authorize(self, challenge: str) -> str:
        """What to send in Authorization, as the registry's challenge asks for."""
        kind, _, rest = challenge.partition(" ")
        given = dict(CHALLENGE.findall(rest))
        login = _login(self.reference.host)
        if kind.lower() == "basic":
            return f"Basic {login}" if login else ""
        realm = given.get("realm", "")
        parts = urllib.parse.urlsplit(realm)
        if kind.lower() != "bearer" or parts.scheme not in ("https", self.reference.scheme) or not parts.netloc:
            raise HostError(f"{self.reference.host} wants to be authorized as kvmpy cannot", "use another registry")
        query = {key: given[key] for key in ("service", "scope") if key in given}
        query.setdefault("scope", f"repository:{self.reference.name}:pull")
        url = f"{realm}{'&' if parts.query else '?'}{urllib.parse.urlencode(query)}"
        try:
            with self._send(url, {}, f"Basic {login}" if login else "") as answer:
                data = json.loads(answer.read(MAX_TOKEN))
            token = data.get("token") or data.get("access_token")
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error.code, error.headers.get("Retry-After", ""))
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise HostError(f"{parts.netloc} gives no token for {self.name}", "try later, or use another registry")
        return f"Bearer {token}"


def _append(file: IO[bytes], data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:  # no failure of the network
        raise HostError(
            f"cannot write {file.name}: {error.strerror}", "make room there, or set XDG_CACHE_HOME"
        ) from None


BROKEN = "the registry is broken, or not to be trusted"


class _EndsEarly(Exception):
    """An answer that is shorter than it should be."""


class _LaterError(Exception):
    """The registry cannot answer now."""

    def __init__(self, status: int, after: str) -> None:
        super().__init__(f"status {status}")
        self.pause = min(float(after), MAX_PAUSE) if after.isdecimal() and after.isascii() else 0.0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Blobs may be elsewhere, but nothing that began with TLS goes on without."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urllib.parse.urlsplit(req.full_url).scheme, urllib.parse.urlsplit(newurl).scheme
        if after != "https" and after != before:
            raise HostError(f"{req.host} sends to {newurl[:200]}, which is not https", "use another registry")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(plain: bool) -> urllib.request.OpenerDirector:
    """What opens http, if it is to, and https, through a proxy of the environment; no files, no ftp."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler() if plain else None,
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        if handler is not None:
            director.add_handler(handler)
    return director


def _login(host: str) -> str:
    """NAME:PASSWORD in base64, as `docker login` has kept it for a registry; empty for none."""
    folder = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    key = DOCKER_LOGIN if host == DOCKER_HOST else host
    try:
        auths = json.loads((Path(folder) / "config.json").read_bytes())["auths"]
        value = next(auths[name]["auth"] for name in (key, f"https://{key}", f"https://{key}/v1/") if name in auths)
        base64.b64decode(value, validate=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, RuntimeError):
        return ""
    return str(value)
