"""Hostile files and streams, cut off at each byte, or with anything in them: an answer or an error, and soon.

More is in test_boot_fuzz.py, test_hostile_qcow2.py, test_fuse.py and test_guest_protocol.py.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import COMPRESSORS, lzop
from scale import examples

from kvmpy.boot import cpio, lzo, modules, payload
from kvmpy.cli import settings as cli_settings
from kvmpy.core.errors import ConfigError, GuestError, GuestLost, HostError, ImageError, KvmpyError
from kvmpy.guest import protocol
from kvmpy.guest.client import Agent
from kvmpy.guest.files import Files
from kvmpy.guest.protocol import HELLO, Entry, Kind, frame
from kvmpy.host import fuse_wire as wire
from kvmpy.host.fuse import FuseServer
from kvmpy.host.fuse_wire import ROOT_ID, Op

MANY = settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SAMPLE = bytes(range(256)) * 40


# Compressed data.


def compressed(name: str) -> bytes:
    return COMPRESSORS[name](SAMPLE)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma", "xz", "lzo", "lz4", "zstd"])
def test_a_payload_cut_off_at_each_byte(name: str) -> None:
    data = memoryview(compressed(name))

    for length in range(len(data) - 1):
        content = b""
        with suppress(ValueError):
            content, _ = payload.DECODERS[name](data[:length], 1 << 20)
        assert len(content) < len(SAMPLE) or name in ("lz4", "lzma", "zstd")
        assert SAMPLE.startswith(content)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma", "xz", "lzo", "lz4", "zstd"])
@MANY
@given(st.data())
def test_a_payload_with_any_bytes_changed(name: str, draw: st.DataObject) -> None:
    data = bytearray(compressed(name))
    for at, value in draw.draw(st.dictionaries(st.integers(0, len(data) - 1), st.integers(0, 255), max_size=3)).items():
        data[at] = value

    with suppress(ValueError):
        content, _ = payload.DECODERS[name](memoryview(data), 1 << 16)
        assert len(content) <= (1 << 16) + payload.LZ4_BLOCK


def test_an_lzo_match_of_any_length_stays_in_its_block() -> None:
    """The longest length that a few bytes can say: 255 for each zero."""
    header = lzop(b"")[:-4]
    stream = b"\x15abcd" + b"\x20" + bytes(5000) + b"\x01" + b"\x00\x00" + b"\x11\x00\x00"
    data = header + (1 << 16).to_bytes(4, "big") + len(stream).to_bytes(4, "big") + stream + bytes(4)

    with pytest.raises(ValueError, match="damaged"):
        lzo.decompress(memoryview(data), 1 << 20)


# Archives and lists of modules.


@MANY
@given(st.data())
def test_an_archive_with_any_bytes_changed(tmp_path: Path, draw: st.DataObject) -> None:
    with open(tmp_path / "archive", "wb") as file:
        cpio.write(
            file, [cpio.Entry("dir", stat.S_IFDIR | 0o755), cpio.Entry("dir/file", stat.S_IFREG | 0o644, b"content")]
        )
    data = bytearray((tmp_path / "archive").read_bytes())
    for at, value in draw.draw(st.dictionaries(st.integers(0, 350), st.integers(0, 255), max_size=4)).items():
        data[at] = value

    with suppress(ImageError):
        entries, end = cpio.read(bytes(data))
        assert end <= len(data)
        assert sum(len(entry.data) for entry in entries) <= len(data)


DEPENDENCIES = [
    *("a.ko:", "a.ko: b.ko", "b.ko: a.ko", "x/c.ko.xz: a.ko b.ko a.ko"),
    *("softdep a pre: b post: c", "softdep c pre: a", "alias d a", "alias a* b"),
]
LINES = st.lists(
    st.one_of(
        st.text(alphabet="ab/_-.:ko* \t", max_size=30),
        st.sampled_from(DEPENDENCIES),
    ),
    max_size=12,
).map("\n".join)


@MANY
@given(LINES, LINES, LINES)
def test_any_list_of_modules(tmp_path: Path, dep: str, softdep: str, alias: str) -> None:
    for name, text in (("dep", dep), ("softdep", softdep), ("alias", alias), ("builtin", "")):
        (tmp_path / f"modules.{name}").write_text(text)

    with suppress(ConfigError):
        found = modules.closure(tmp_path, ["a", "d"])
        assert len(set(found)) == len(found)


def test_a_list_of_modules_cut_off_at_each_byte(tmp_path: Path) -> None:
    text = "kernel/a.ko.xz: kernel/b.ko.xz kernel/c.ko\nkernel/b.ko.xz: kernel/c.ko\nkernel/c.ko:\n"

    for length in range(len(text) + 1):
        (tmp_path / "modules.dep").write_text(text[:length])
        with suppress(ConfigError):
            assert modules.closure(tmp_path, ["a"])


# The configuration file.


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str | bytes], object]:
    """What a file with this text says, or its error."""

    def read(text: str | bytes) -> object:
        (tmp_path / "vm.yaml").write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        try:
            return cli_settings.read(str(tmp_path / "vm.yaml"))
        except KvmpyError as error:
            assert "\n" not in str(error)
            return error

    return read


TEXT = """kernel: bzImage
mem: 1G
disks:
  - root.img
  - {path: data.qcow2, format: qcow2, ro: on}
nets: [user]
devices: [virtio-rng, {virtio-balloon: {target: 64M}}]
"""


def test_a_configuration_cut_off_at_each_byte(config: Callable[[str | bytes], object]) -> None:
    whole = config(TEXT)

    found = [config(TEXT[:length]) for length in range(len(TEXT))]

    assert isinstance(whole, dict)
    assert all(isinstance(each, (dict, ConfigError)) for each in found)


WORDS = [
    *("kernel", "disks", "nets", ": ", "- ", "? ", "[", "]", "{", "}", "&a ", "*a", "<<", "!!x ", "|\n", "\n ", "\n"),
    *("'", '"', "#", "%", "---\n", "\t", "\0", "\u2028", "a"),
]


@MANY
@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join))
def test_any_words_as_configuration(config: Callable[[str | bytes], object], text: str) -> None:
    assert isinstance(config(text), (dict, ConfigError))


def test_a_configuration_of_keys_alone(config: Callable[[str | bytes], object]) -> None:
    """As many as there can be: looking for the ones that are there twice must not compare each with each."""
    text = "".join(f"a{number}: 1\n" for number in range(cli_settings.MAX_FILE // 12))

    assert "unknown key 'a0'" in str(config(text))


@pytest.mark.parametrize(
    "text",
    [
        "append: &a [*a]",
        "devices: [{virtio-rng: &a {k: *a}}]",
        "k0: &m0 {a: b}\n" + "".join(f"k{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 30)),
        "k0: &m0 [a, a]\n" + "".join(f"k{n}: &m{n} [*m{n - 1}, *m{n - 1}]\n" for n in range(1, 30)),
        "? [a]\n: b\n? [a]\n: c",
        "? " * 2000,
        "\n".join(" " * n + "a:" for n in range(300)),
    ],
    ids=["itself", "itself-deep", "merged", "doubled", "list-as-key", "questions", "steps"],
)
def test_configurations_that_explode(config: Callable[[str | bytes], object], text: str) -> None:
    assert isinstance(config(text), ConfigError)


# Requests to a shared folder.

REQUESTS: dict[int, bytes] = {
    Op.LOOKUP: b"file\0",
    Op.GETATTR: bytes(16),
    Op.SETATTR: bytes(88),
    Op.SYMLINK: b"link\0target\0",
    Op.MKNOD: bytes(16) + b"node\0",
    Op.MKDIR: bytes(8) + b"folder\0",
    Op.RENAME: bytes(8) + b"file\0other\0",
    Op.LINK: bytes(8) + b"name\0",
    Op.OPEN: bytes(8),
    Op.WRITE: bytes(40) + b"data",
    Op.SETXATTR: bytes(8) + b"user.name\0value",
    Op.GETXATTR: bytes(8) + b"user.name\0",
    Op.CREATE: bytes(16) + b"new\0",
    Op.FORGET: bytes(8),
    Op.BATCH_FORGET: (2).to_bytes(8, "little") + bytes(32),
}


@pytest.mark.parametrize("op", REQUESTS)
def test_a_request_cut_off_at_each_byte(tmp_path: Path, op: int) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "share").mkdir()
    (tmp_path / "share/file").write_text("content")
    server = FuseServer(tmp_path / "share")
    init = wire.IN_HEADER.pack(56, Op.INIT, 1, 0, 0, 0, 0, 0, 0) + wire.INIT_IN.pack(7, 38, 0, 0)
    server.serve([memoryview(init)], [memoryview(bytearray(80))])

    args = REQUESTS[op]
    for length in range(len(args)):
        for said in (length, len(args)):
            header = wire.IN_HEADER.pack(wire.IN_HEADER.size + said, op, 2, ROOT_ID, 0, 0, 0, 0, 0)
            answer = bytearray(4096)
            count = server.serve([memoryview(header + args[:length])], [memoryview(answer)])
            assert not count or wire.OUT_HEADER.unpack_from(answer)[0] == count
    server.close()

    assert sorted(os.listdir(tmp_path)) == ["secret", "share"]


# What a guest's agent says.

GREETING = frame(Kind.HELLO, HELLO)
FOLDER, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


def entry(mode: int, name: bytes, target: bytes = b"") -> bytes:
    return frame(Kind.ENTRY, bytes(Entry(mode, 0, 0, 1, 0, 0)) + protocol.strings(name, target))


TREE = entry(FOLDER, b"") + entry(FILE, b"a") + frame(Kind.DATA, b"content") + entry(LINK, b"b", b"a") + frame(Kind.END)


def saying(said: bytes) -> Callable[[], socket.socket]:
    """Connections to an agent that says this and no more."""

    def speak(mouth: socket.socket) -> None:
        with mouth, suppress(OSError):
            mouth.sendall(said)
            mouth.shutdown(socket.SHUT_WR)
            while mouth.recv(1 << 16):
                pass

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=speak, args=(theirs,)).start()
        return ours

    return connect


def hear(said: bytes) -> Files:
    """Files of a guest whose agent says this and no more."""
    return Files(saying(said))


ANSWER = (
    frame(Kind.STARTED, bytes(protocol.Number(77)))
    + frame(Kind.DATA, b"output", protocol.STDOUT)
    + frame(Kind.EOF, b"", protocol.STDOUT)
    + frame(Kind.EOF, b"", protocol.STDERR)
    + frame(Kind.EXIT, bytes(protocol.Exit(7, 0, 0, 0, 1, 2, 3, 4)))
)


def test_a_commands_answer_cut_off_at_each_byte() -> None:
    said = GREETING + ANSWER
    done = Agent(saying(said)).run(["true"])

    for length in range(len(said)):
        with pytest.raises(GuestLost):
            Agent(saying(said[:length])).run(["true"])

    assert (done.stdout, done.stderr, done.returncode) == (b"output", b"", 7)


@MANY
@given(st.dictionaries(st.integers(0, len(GREETING + ANSWER) - 1), st.integers(0, 255), max_size=3))
def test_a_commands_answer_with_any_bytes_changed(changes: dict[int, int]) -> None:
    said = bytearray(GREETING + ANSWER)
    for at, value in changes.items():
        said[at] = value

    with suppress(KvmpyError):
        Agent(saying(bytes(said))).run(["true"], timeout=0.5)


def test_a_tree_cut_off_at_each_byte(tmp_path: Path) -> None:
    said = GREETING + TREE
    hear(said).get("/x", tmp_path / "whole")

    for length in range(len(said)):
        with pytest.raises(KvmpyError):
            hear(said[:length]).get("/x", tmp_path / "tree")

    assert sorted(os.listdir(tmp_path / "whole")) == ["a", "b"]
    assert set(os.listdir(tmp_path)) == {"whole", "tree"}


NAMES = [b"", b"a", b"b", b"a/b", b"a/b/c", b"..", b"a/../..", b"/"]
TARGETS = [b"", b"a", b"..", b"../..", b"a/../../x", b"b/../../../secret", b"./..", b"/etc"]
ENTRIES = st.tuples(st.sampled_from([FOLDER, FILE, LINK, 0]), st.sampled_from(NAMES), st.sampled_from(TARGETS))


@MANY
@given(st.lists(ENTRIES, max_size=8))
def test_no_tree_leads_out(tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, bytes, bytes]]) -> None:
    """Whatever it is made of, no link in what is left leads to anything outside."""
    top = tmp_path_factory.mktemp("trees")
    root = entry(FOLDER, b"")
    with suppress(GuestError, HostError, ConfigError):
        hear(GREETING + root + b"".join(entry(*each) for each in entries) + frame(Kind.END)).get("/x", top / "in/tree")
    (top / "in").mkdir(exist_ok=True)
    with suppress(GuestError, HostError, ConfigError):
        hear(GREETING + root + b"".join(entry(*each) for each in entries) + frame(Kind.END)).get("/x", top / "in/tree")

    assert os.listdir(top) == ["in"]
    assert set(os.listdir(top / "in")) <= {"tree"}
    inside = (top / "in/tree").resolve()
    for path in (top / "in/tree").rglob("*"):
        with suppress(RuntimeError):  # links in a circle
            assert path.resolve().is_relative_to(inside)
