"""The protocol of the agent: both ends have the same numbers, and neither is upset by anything that comes."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from agents import GUESTS, LIMIT, NativeAgent, build_with_sanitizers, has_ended, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scale import examples

from kvmpy.core.errors import GuestError
from kvmpy.guest import protocol
from kvmpy.guest.protocol import HELLO, Exec, FileRequest, Kind, Parser, frame

EXEC_TRUE = frame(Kind.EXEC, bytes(Exec(0, 0o22, 0, 0, 1, 0, 0)) + protocol.strings(b"/", b"", b"true"))
STAT_ROOT = frame(Kind.STAT, bytes(FileRequest(0, 0, 0, 0, 0, 0)) + protocol.strings(b"/"))
GREETING = frame(Kind.HELLO, HELLO)


def c_names(prefix: str = "") -> dict[str, int]:
    text = (GUESTS / "agent/agent.h").read_text()
    return {name: int(value) for name, value in re.findall(rf"\b{prefix}([A-Z]+) = ([0-9]+)\b", text)}


def test_both_ends_have_the_same_numbers() -> None:
    names = c_names()

    assert {kind.name: names[kind.name] for kind in Kind} == {kind.name: kind.value for kind in Kind}
    assert c_names("STAGE_") == {stage.name: stage.value for stage in protocol.Stage}
    assert c_names("RUN_") == {flag.name: flag.value for flag in protocol.Run}
    assert c_names("HOW_") == {flag.name: flag.value for flag in protocol.How}
    assert (names["PORT"], names["VERSION"]) == (protocol.PORT, protocol.VERSION)


def test_the_document_has_the_same_numbers() -> None:
    text = (GUESTS / "PROTOCOL.md").read_text()
    rows = {name: int(value) for name, value in re.findall(r"^\| ([A-Z]+) \| ([0-9]+) \|", text, re.MULTILINE)}

    assert rows == {kind.name: kind.value for kind in (*Kind, *protocol.Stage, *protocol.How)}
    assert all(f"{flag.name} {flag.value}" in text for flag in protocol.Run)
    assert all(f" {number} " in text for number in (protocol.PORT, protocol.WINDOW)) and "65536" in text


FRAMES = st.tuples(st.sampled_from(Kind), st.integers(0, 2), st.binary(max_size=300)).filter(
    lambda item: item[0] != Kind.DATA or item[2]
)


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(0, 3000), max_size=8))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: list[tuple[Kind, int, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(frame(kind, payload, number) for kind, number, payload in frames)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = Parser()

    found = [item for at, end in pairwise(places) for item in parser.feed(stream[at:end])]

    assert found == frames
    assert parser.is_empty


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    parser = Parser()

    with suppress(GuestError):
        assert sum(protocol.Header.SIZE + len(payload) for _, _, payload in parser.feed(data)) <= len(data)


@given(st.binary(max_size=100))
def test_any_payload_is_understood_or_refused(payload: bytes) -> None:
    for parse in (protocol.parse_entry, protocol.parse_error):
        with suppress(GuestError):
            parse(payload)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<IBBH", protocol.MAX_DATA + 1, Kind.DATA, 1, 0),
        struct.pack("<IBBH", 0xFFFFFFFF, Kind.DATA, 1, 0),
        struct.pack("<IBBH", 0, 0, 0, 0),
        struct.pack("<IBBH", 0, 255, 0, 0),
        struct.pack("<IBBH", 0, Kind.DATA, 3, 0),
        struct.pack("<IBBH", 0, Kind.END, 1, 1),
        struct.pack("<IBBH", 0, Kind.DATA, 1, 0),
    ],
    ids=["length", "huge", "kind-0", "kind-255", "stream", "zero", "no-data"],
)
def test_a_bad_header_is_refused_at_once(header: bytes) -> None:
    with pytest.raises(GuestError, match="bad frame"):
        Parser().feed(header)


# The agent's end, built with what finds wrong accesses to memory.


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeAgent]:
    folder = tmp_path_factory.mktemp("agent")
    binary = build_with_sanitizers(folder)
    if binary is None:
        pytest.skip("this compiler has no address sanitizer")
    with running(binary, folder) as agent:
        yield agent
        assert agent.process.poll() is None
    assert (folder / "says").read_text() == ""


def converse(agent: NativeAgent, data: bytes) -> list[protocol.Frame]:
    """Send all, then its end; what the agent has answered until it closed."""
    parser = Parser()
    found = []
    with agent.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        while True:
            try:
                received = connection.recv(1 << 16)
            except ConnectionResetError:
                received = b""
            if not received:
                return found
            found += parser.feed(received)


def errors(frames: list[protocol.Frame]) -> list[tuple[int, int, str]]:
    return [protocol.parse_error(payload) for kind, _, payload in frames if kind == Kind.ERROR]


def test_the_hardened_agent_serves(hardened: NativeAgent, tmp_path: Path) -> None:
    hardened.files.write(tmp_path / "a/b/c", b"content" * 20000, parents=True, atomic=True)
    hardened.files.put(tmp_path / "a", tmp_path / "copy")
    hardened.files.get(tmp_path / "copy", tmp_path / "back")
    hardened.files.remove(tmp_path / "copy", recursive=True)

    assert (tmp_path / "back/b/c").read_bytes() == b"content" * 20000
    assert hardened.run(["sh", "-c", "cat; echo err >&2; exit 7"], input=b"x" * 600000).stdout == b"x" * 600000
    assert hardened.run(["true"], user="nobody:0").returncode == 0
    assert [info.name for info in hardened.files.list(tmp_path)] == ["a", "back"]


def test_who_waits_for_the_agents_hello_has_it_before_the_request(hardened: NativeAgent) -> None:
    with hardened.connect() as connection:
        connection.sendall(GREETING)
        assert connection.recv(100) == GREETING
        connection.sendall(STAT_ROOT)
        assert Parser().feed(connection.recv(100))[0][0] == Kind.ENTRY


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=100))
def test_any_bytes_to_the_agent(hardened: NativeAgent, data: bytes) -> None:
    converse(hardened, data)


@pytest.mark.parametrize("request_frame", [EXEC_TRUE, STAT_ROOT], ids=["exec", "stat"])
def test_a_conversation_cut_off_at_each_byte(hardened: NativeAgent, request_frame: bytes) -> None:
    data = GREETING + request_frame

    for length in range(len(data)):
        assert {kind for kind, _, _ in converse(hardened, data[:length])} <= {Kind.HELLO, Kind.ERROR}
    assert Kind.ERROR not in {kind for kind, _, _ in converse(hardened, data)}


@pytest.mark.parametrize("request_frame", [EXEC_TRUE, STAT_ROOT], ids=["exec", "stat"])
def test_a_request_with_each_of_its_bytes_changed(hardened: NativeAgent, request_frame: bytes) -> None:
    """The bytes of its name excepted, by which another program would run."""
    name = request_frame.find(b"/\0")

    for at in range(name):
        for value in (0, 1, 0x7F, 0xFF):
            converse(hardened, GREETING + request_frame[:at] + bytes([value]) + request_frame[at + 1 :])


KINDS = st.sampled_from([*(kind.value for kind in Kind if kind is not Kind.EXEC), 0, 99, 255])
# A request for files is not among what is made up at will: it could remove some of this machine.
REQUESTS = st.sampled_from([EXEC_TRUE, STAT_ROOT])


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUESTS, st.lists(st.tuples(KINDS, st.integers(0, 3), st.binary(max_size=40)), max_size=6))
def test_any_frames_to_the_agent(
    hardened: NativeAgent, request_frame: bytes, frames: list[tuple[int, int, bytes]]
) -> None:
    data = b"".join(struct.pack("<IBBH", len(payload), kind, stream, 0) + payload for kind, stream, payload in frames)

    converse(hardened, GREETING + request_frame + data)


@settings(max_examples=examples(80), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 40),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.lists(st.sampled_from([b"", b"\0", b"true\0", b"A=b\0", b"/\0", b"root\0", b"x"]), max_size=12),
)
def test_any_exec_to_the_agent(
    hardened: NativeAgent, flags: int, argc: int, envc: int, limits: int, parts: list[bytes]
) -> None:
    """Counts are small or huge; what is run, if anything, is `true`."""
    for count, words, bound in ((argc % 6, envc % 6, limits % 3), (argc, envc, limits)):
        payload = bytes(Exec(flags, 0o22, 1, 1, count, words, bound)) + b"".join(parts)
        converse(hardened, GREETING + frame(Kind.EXEC, payload))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (frame(Kind.STAT), (1, 71, "HELLO must come first")),
        (frame(Kind.HELLO, b"XXXX" + HELLO[4:]), (1, 71, "HELLO must come first")),
        (frame(Kind.HELLO, HELLO + b"\0"), (1, 71, "HELLO must come first")),
        (frame(Kind.HELLO, HELLO[:4] + b"\2\0\3\0"), (1, 93, "this agent speaks version 1")),
        (GREETING + frame(Kind.ENTRY), (1, 38, "no such request")),
        (GREETING + struct.pack("<IBBH", 0, 77, 0, 0), (1, 38, "no such request")),
        (GREETING + struct.pack("<IBBH", 70000, Kind.READ, 0, 0), (1, 71, "bad header")),
        (GREETING + struct.pack("<IBBH", 3 << 20, Kind.EXEC, 0, 0), (1, 71, "bad header")),
        (GREETING + frame(Kind.EXEC, b"abc"), (1, 71, "bad EXEC")),
        (GREETING + frame(Kind.EXEC, bytes(Exec(0, 0, 0, 0, 2, 0, 0)) + b"/\0\0sh\0"), (1, 71, "EXEC ends early")),
        (
            GREETING + frame(Kind.EXEC, bytes(Exec(0, 0, 0, 0, 1, 0, 0)) + b"/\0\0sh\0x\0"),
            (1, 71, "EXEC goes on behind its end"),
        ),
        (GREETING + frame(Kind.STAT, bytes(FileRequest.SIZE) + b"/etc"), (1, 71, "bad file request")),
        (GREETING + frame(Kind.STAT, bytes(FileRequest.SIZE) + b"/\0/\0"), (1, 71, "bad file request")),
        (GREETING + frame(Kind.STAT, bytes(FileRequest.SIZE) + b"a" * 5000 + b"\0"), (8, 36, "a" * 4096)),
    ],
    ids=lambda value: value[2][:30] if isinstance(value, tuple) else "",
)
def test_what_the_agent_refuses(hardened: NativeAgent, data: bytes, error: tuple[int, int, str]) -> None:
    found = errors(converse(hardened, data))

    assert found == [error]


@pytest.mark.parametrize(
    "data",
    [
        frame(Kind.DATA, b"no stdin was asked for"),
        frame(Kind.EXEC, EXEC_TRUE[8:]),
        frame(Kind.WINDOW, b"\xff\xff\xff\xff", 1) * 2,
        frame(Kind.WINDOW, b"\1\0\0\0", 0),
        frame(Kind.RESIZE, bytes(4)),
        frame(Kind.SIGNAL, bytes(3)),
        frame(Kind.END),
        struct.pack("<IBBH", 0xFFFFFFFF, Kind.DATA, 0, 0),
    ],
    ids=[
        "data",
        "exec",
        "window-overflow",
        "window-of-stdin",
        "resize",
        "short-signal",
        "end",
        "length",
    ],
)
def test_what_the_agent_refuses_while_a_command_runs(hardened: NativeAgent, data: bytes) -> None:
    sleep = frame(Kind.EXEC, bytes(Exec(0, 0o22, 0, 0, 2, 0, 0)) + protocol.strings(b"/", b"", b"sleep", b"60"))
    parser = Parser()
    found: list[protocol.Frame] = []
    with hardened.connect() as connection:
        connection.settimeout(LIMIT)
        connection.sendall(GREETING + sleep)
        while Kind.STARTED not in [kind for kind, _, _ in found]:
            found += parser.feed(connection.recv(1 << 16))
        pid = protocol.Number.read(found[-1][2]).value
        connection.sendall(data)
        while not errors(found):
            found += parser.feed(connection.recv(1 << 16))

    assert errors(found)[0][:2] == (1, 71)
    assert has_ended(pid)
