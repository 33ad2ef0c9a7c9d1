"""Images from a registry: one of this test, on loopback, that asks for a token, redirects, lies, fails and is slow."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from oci_images import OCI, Image, digest, entry, layer

from kvmpy import root
from kvmpy.core.errors import ConfigError, HostError, ImageError, KvmpyError, NotFoundError
from kvmpy.oci import reference, registry, store

IMAGE = Image(layer(entry("f", os.urandom(300_000))), layer(entry("g", b"g")), Cmd=["run"])
LAYER = next(name for name, data in IMAGE.blobs.items() if data.startswith(b"\x1f\x8b") and len(data) > 100_000)
INDEX = json.dumps(
    {"manifests": [IMAGE.descriptor(platform={"os": "linux", "architecture": "amd64"})]}, separators=(",", ":")
).encode()
Answer = tuple[int, dict[str, str], bytes]


class Server(ThreadingHTTPServer):
    """A registry with one image, `tiny:latest`. `answers` are asked first: each may have its own idea."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answers: list[Callable[[str, dict[str, str]], Answer | None]] = []
        self.manifests = {"latest": INDEX, digest(INDEX): INDEX, digest(IMAGE.manifest): IMAGE.manifest}
        self.blobs = dict(IMAGE.blobs)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what many tests are about."""

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        for special in self.answers:
            if (found := special(path, headers)) is not None:
                return found
        kind, _, name = path.removeprefix("/v2/tiny/").partition("/")
        data = (self.manifests if kind == "manifests" else self.blobs).get(name)
        if data is None:
            return 404, {}, b"{}"
        begin = int(headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        return (206 if begin else 200), {}, data[begin:]

    def paths(self, part: str) -> list[str]:
        return [path for path, _ in self.requests if part in path]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append((self.path, dict(self.headers)))
        status, headers, body = server.answer(self.path, dict(self.headers))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr(registry, "PAUSE", 0.001)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    kept = (
        [path.name for path in store.folder().rglob("*") if path.name.endswith(".part")]
        if store.folder().exists()
        else []
    )
    assert kept == []


def pull(server: Server, name: str = "tiny", **options: Any) -> root.Root:
    return root.find(f"oci:{server.host}/{name}", **options)


def only(part: str, answer: Answer, times: int = 1 << 30) -> Callable[[str, dict[str, str]], Answer | None]:
    """That answer for paths with this in them, so many times."""
    left = [times]

    def special(path: str, headers: dict[str, str]) -> Answer | None:
        if part not in path or not left[0]:
            return None
        left[0] -= 1
        return answer

    return special


def test_an_image(server: Server) -> None:
    found = pull(server)

    assert found.image is not None and found.image.cmd == ("run",)
    assert found.disk.path.is_file()
    assert server.requests[0][0] == "/v2/tiny/manifests/latest"
    assert f"{OCI}.manifest.v1+json" in server.requests[0][1]["Accept"]


def test_what_is_here_is_not_asked_for_again(server: Server) -> None:
    pull(server)
    server.requests.clear()

    again = pull(server, pull="never")
    by_digest = pull(server, f"tiny@{digest(INDEX)}")

    assert again.image == by_digest.image
    assert server.paths("/blobs/") == [f"/v2/tiny/blobs/{digest(IMAGE.config)}"]  # the layers are here
    assert len(server.paths("/manifests/")) == 2


def test_a_tag_that_has_moved(server: Server) -> None:
    pull(server)
    other = Image(layer(entry("h")), Cmd=["moved"])
    server.manifests |= {"latest": other.manifest}
    server.blobs |= other.blobs

    assert pull(server).image.cmd == ("run",)  # type: ignore[union-attr]
    assert pull(server, pull="always").image.cmd == ("moved",)  # type: ignore[union-attr]
    assert pull(server).image.cmd == ("moved",)  # type: ignore[union-attr]


def test_never_and_not_here(server: Server) -> None:
    with pytest.raises(NotFoundError, match=r"127.*/tiny:latest is not here; pull it"):
        pull(server, pull="never")
    with pytest.raises(ConfigError, match='invalid --pull "sometimes"; use missing, always, never'):
        pull(server, pull="sometimes")

    assert server.requests == []


# Who may have it.


def guarded(server: Server, login: str = "") -> Callable[[str, dict[str, str]], Answer | None]:
    """Wants a token, which it gives at /token, to all or to those with this login."""
    scheme = f'Bearer realm="http://{server.host}/token?x=1",service="the service",scope="repository:tiny:pull"'

    def special(path: str, headers: dict[str, str]) -> Answer | None:
        if path.startswith("/token"):
            allowed = headers.get("Authorization", "") == (f"Basic {login}" if login else "")
            return (200, {}, b'{"token": "secret"}') if allowed else (401, {}, b"")
        return None if headers.get("Authorization") == "Bearer secret" else (401, {"WWW-Authenticate": scheme}, b"")

    return special


def log_in(folder: Path, host: str) -> str:
    login = base64.b64encode(b"ann:pass").decode()
    (folder / "docker").mkdir()
    (folder / "docker/config.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
    return login


def test_a_token_for_anybody(server: Server) -> None:
    server.answers.append(guarded(server))

    assert pull(server).image is not None
    assert server.paths("/token") == ["/token?x=1&service=the+service&scope=repository%3Atiny%3Apull"]


def test_a_token_for_those_who_have_logged_in(server: Server, tmp_path: Path) -> None:
    server.answers.append(guarded(server, log_in(tmp_path, server.host)))

    assert pull(server).image is not None


def test_a_token_that_gets_too_old(server: Server) -> None:
    given: list[str] = []

    def special(path: str, headers: dict[str, str]) -> Answer | None:
        if path.startswith("/token"):
            given.append(f"token{len(given)}")
            return 200, {}, json.dumps({"access_token": given[-1]}).encode()
        if given and headers.get("Authorization") == f"Bearer {given[-1]}" and len(server.requests) != 5:
            return None
        return 401, {"WWW-Authenticate": f'Bearer realm="http://{server.host}/token"'}, b""

    server.answers.append(special)

    assert pull(server).image is not None
    assert len(given) == 2


def test_a_password_for_each_request(server: Server, tmp_path: Path) -> None:
    login = log_in(tmp_path, server.host)

    def special(path: str, headers: dict[str, str]) -> Answer | None:
        allowed = headers.get("Authorization") == f"Basic {login}"
        return None if allowed else (401, {"WWW-Authenticate": 'Basic realm="here"'}, b"")

    server.answers.append(special)

    assert pull(server).image is not None


@pytest.mark.parametrize(
    ("challenge", "error", "why"),
    [
        ('Basic realm="x"', ConfigError, "does not give 127.*/tiny:latest to you"),
        ("", ConfigError, "to you"),
        ("Negotiate", HostError, "authorized as kvmpy cannot"),
        ('Bearer realm="file:///etc/passwd"', HostError, "authorized as kvmpy cannot"),
        ("Bearer", HostError, "authorized as kvmpy cannot"),
        ('Bearer realm="http://127.0.0.1:1/token"', HostError, "Connection refused"),
    ],
)
def test_who_is_refused(server: Server, challenge: str, error: type[KvmpyError], why: str) -> None:
    server.answers.append(only("", (401, {"WWW-Authenticate": challenge}, b"")))

    with pytest.raises(error, match=why):
        pull(server)


@pytest.mark.parametrize("token", [b"", b"{}", b"[]", b'{"token": 5}', b'{"token": "a\\nb"}', b"[" * 100_000])
def test_no_token(server: Server, token: bytes) -> None:
    server.answers += [only("/token", (200, {}, token)), guarded(server)]

    with pytest.raises(HostError, match="gives no token"):
        pull(server)


def test_a_login_that_is_damaged_counts_as_none(server: Server, tmp_path: Path) -> None:
    log_in(tmp_path, server.host)
    for text in (
        "{",
        "[]",
        '{"auths": 5}',
        json.dumps({"auths": {server.host: {"auth": "!!"}}}),
        json.dumps({"auths": {server.host: 5}}),
    ):
        (tmp_path / "docker/config.json").write_text(text)
        assert registry._login(server.host) == ""


# Where it is.


def test_blobs_that_are_elsewhere(server: Server) -> None:
    server.answers.append(guarded(server))
    elsewhere = Server()
    thread = threading.Thread(target=elsewhere.serve_forever, args=(0.01,))
    thread.start()
    server.answers.append(
        only(LAYER, (307, {"Location": f"http://{elsewhere.host}/v2/tiny/blobs/{LAYER}?signed=1"}, b""))
    )
    elsewhere.blobs[f"{LAYER}?signed=1"] = IMAGE.blobs[LAYER]

    assert pull(server).image is not None
    elsewhere.shutdown()
    elsewhere.server_close()
    thread.join()

    assert [("Authorization" in headers) for _, headers in elsewhere.requests] == [False]


def test_a_login_is_for_nobody_that_the_registry_sends_to(server: Server, tmp_path: Path) -> None:
    login = log_in(tmp_path, server.host)
    server.answers.append(guarded(server, login))
    elsewhere = Server()
    thread = threading.Thread(target=elsewhere.serve_forever, args=(0.01,))
    thread.start()
    elsewhere.answers.append(guarded(elsewhere, login))
    server.answers.append(only(LAYER, (307, {"Location": f"http://{elsewhere.host}/v2/tiny/blobs/{LAYER}"}, b"")))

    with pytest.raises(ConfigError, match="does not give"):
        pull(server)
    elsewhere.shutdown()
    elsewhere.server_close()
    thread.join()

    assert [("Authorization" in headers) for _, headers in elsewhere.requests] == [False]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("file:///etc/passwd", "where nothing is"),
        ("ftp://x/y", "which is not https"),
        ("/v2/tiny/loop", "where nothing is"),
    ],
)
def test_redirects_to_nowhere(server: Server, target: str, why: str) -> None:
    server.answers.append(only("", (307, {"Location": target}, b"")))

    with pytest.raises(HostError, match=why):
        pull(server)


# What goes wrong.


@pytest.mark.parametrize(
    ("part", "answer", "error", "why"),
    [
        ("manifests", (404, {}, b""), NotFoundError, "127.* has no 127.*/tiny:latest; look at its name and tag"),
        ("manifests", (403, {}, b""), ConfigError, "does not give .*status 403"),
        ("manifests", (500, {}, b""), HostError, "it answers status 500; look at the network, or try later"),
        ("manifests", (429, {"Retry-After": "0"}, b""), HostError, "it answers status 429"),
        ("manifests", (418, {}, b""), HostError, "answers status 418 .*; is it a registry"),
        ("manifests", (200, {}, b"<html>"), ImageError, "is no JSON"),
        ("manifests", (200, {}, b" " * (5 << 20)), ImageError, "4194304 is the limit"),
        ("manifests/sha256", (200, {}, IMAGE.manifest + b" "), ImageError, "not what its digest says"),
        (f"blobs/{digest(IMAGE.config)}", (200, {}, b"{}"), ImageError, "not what its digest says"),
        (f"blobs/{LAYER}", (200, {}, os.urandom(len(IMAGE.blobs[LAYER]))), ImageError, "not what its digest says"),
        (f"blobs/{LAYER}", (200, {}, bytes(1 << 20)), HostError, "longer than it should be"),
        (f"blobs/{LAYER}", (200, {}, b""), HostError, "its answers end early"),
        (f"blobs/{LAYER}", (404, {}, b""), NotFoundError, "has no"),
        ("manifests", (200, {"Content-Length": "99999"}, INDEX), HostError, "end early"),
    ],
    ids=map(str, range(14)),  # digests differ from run to run
)  # fmt: skip
def test_answers_that_cannot_be_used(
    server: Server, part: str, answer: Answer, error: type[KvmpyError], why: str
) -> None:
    server.answers.append(only(part, answer))

    with pytest.raises(error, match=why) as caught:
        pull(server)

    assert "\n" not in str(caught.value) and caught.value.remedy
    assert len(server.requests) < 12


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_fails_for_a_while(server: Server, status: int) -> None:
    server.answers.append(only("", (status, {"Retry-After": "0"}, b""), times=2))

    assert pull(server).image is not None


def test_a_download_that_is_cut_off_goes_on(server: Server) -> None:
    whole = IMAGE.blobs[LAYER]
    server.answers.append(only(LAYER, (200, {"Content-Length": str(len(whole))}, whole[:100_000]), times=1))

    assert pull(server).image is not None
    assert [headers.get("Range") for path, headers in server.requests if LAYER in path] == [None, "bytes=100000-"]


def test_a_server_that_knows_no_ranges(server: Server) -> None:
    whole = IMAGE.blobs[LAYER]
    server.answers += [
        only(LAYER, (200, {"Content-Length": str(len(whole))}, whole[:100_000]), times=1),
        only(LAYER, (200, {}, whole), times=1),
    ]

    assert pull(server).image is not None


def test_a_server_that_says_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TIMEOUT", 0.05)
    monkeypatch.setattr(registry, "TRIES", 2)
    go = threading.Event()

    def silent(path: str, headers: dict[str, str]) -> None:
        go.wait(30)

    server.answers.append(silent)
    with pytest.raises(HostError, match=r"no answer for 0.05 s"):
        pull(server)
    go.set()


def test_nobody_there(server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(HostError, match=r"cannot get .*: Connection refused; look at the network"):
            root.find(f"oci:127.0.0.1:{taken.getsockname()[1]}/tiny")


def test_no_such_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*words: object, **named: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)

    with pytest.raises(HostError, match=r"cannot find registry.example: Name or service.*; is there a network\?"):
        root.find("oci:registry.example/tiny")


def test_a_certificate_that_nobody_vouches_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"

    def handshake(*words: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", handshake)

    with pytest.raises(HostError, match=r"certificate of 127.* is not trusted \(self-signed.*; set SSL_CERT_FILE"):
        root.find(f"oci:https://{server.host}/tiny")


def test_a_server_without_tls(server: Server) -> None:
    with pytest.raises(
        HostError, match=r"speaks no TLS that is understood.*; if it speaks plain http, say so: oci:http://"
    ):
        root.find(f"oci:https://{server.host}/tiny")


def test_no_way_out_of_tls() -> None:
    handler = registry._Redirects()
    request = registry.urllib.request.Request("https://registry.example/v2/x")

    with pytest.raises(HostError, match="which is not https"):
        handler.redirect_request(request, None, 307, "", {}, "http://169.254.169.254/")


def test_an_image_larger_than_the_limit(server: Server) -> None:
    with pytest.raises(ImageError, match=r"larger than 4096 bytes.*--root-limit"):
        pull(server, limit="4K")

    assert server.paths(LAYER) == []


def test_no_room_for_a_download(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        name = "full"

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(HostError, match="cannot write full: No space left on device; make room"):
        registry._append(Full(), b"x")  # type: ignore[arg-type]


# Names.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("busybox", ("https", "registry-1.docker.io", "library/busybox", "latest", "")),
        ("ann/tool:1.2", ("https", "registry-1.docker.io", "ann/tool", "1.2", "")),
        ("docker.io/busybox", ("https", "registry-1.docker.io", "library/busybox", "latest", "")),
        ("quay.io/a/b/c:T_x-1", ("https", "quay.io", "a/b/c", "T_x-1", "")),
        ("localhost/x", ("http", "localhost", "x", "latest", "")),
        ("localhost:5000/x/y", ("http", "localhost:5000", "x/y", "latest", "")),
        ("127.0.0.1:5000/x", ("http", "127.0.0.1:5000", "x", "latest", "")),
        ("127.evil.example/x", ("https", "127.evil.example", "x", "latest", "")),
        ("[::1]:5000/x", ("http", "[::1]:5000", "x", "latest", "")),
        ("http://reg.example/x", ("http", "reg.example", "x", "latest", "")),
        ("https://localhost/x", ("https", "localhost", "x", "latest", "")),
        ("x@sha256:" + "a" * 64, ("https", "registry-1.docker.io", "library/x", "latest", "sha256:" + "a" * 64)),
        ("x:1@sha256:" + "a" * 64, ("https", "registry-1.docker.io", "library/x", "1", "sha256:" + "a" * 64)),
    ],
)
def test_names(text: str, parts: tuple[str, ...]) -> None:
    assert tuple(vars(reference.parse(text)).values()) == parts


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "/", "Upper", "a b", "x:", "x:.t", "x:" + "t" * 129, "x@", "x@sha256:12", "x@md5:" + "a" * 32, "../x",
        "a//b", "host.example/", "user:pass@host.example/x", "host.example:99999999/x", "ftp://host.example/x",
        "file:///etc/passwd", "x\n", "é", "a/../b", "x" * 300, "ho\tst.example/x", "x?y", "x#y", "x%2e",
    ],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no name of an image|are not pulled by"):
        reference.parse(text)
