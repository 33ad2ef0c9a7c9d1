"""The folders of machines with a name: who has a name, what others see of it, and what crashes leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmpy import named
from kvmpy.core.errors import ConfigError, HostError
from kvmpy.host import vsocket

LIMIT = 30.0  # seconds

# A process that owns the name in argv[1] until its input ends.
OWNER = """
import sys
from kvmpy import named
claim = named.claim(sys.argv[1])
claim.note_owner()
claim.note(running=True, command=["sleep"])
print("up", flush=True)
sys.stdin.read()
claim.note(status=3)
"""

Own = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "kvmpy"


@pytest.fixture
def own() -> Iterator[Own]:
    """Starts a process that owns a name."""
    started = []

    def own(name: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", OWNER, name]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        return process

    yield own
    for process in started:
        with process:
            process.kill()


def test_one_machine_from_its_beginning_to_its_end(base: Path) -> None:
    claim = named.claim("web")
    claim.note_owner()
    begun = named.find("web")
    claim.note(running=True, env={"A": "\udcff"})
    running = named.find("web")
    claim.note(status=7)
    claim.close()
    ended = named.find("web")

    assert [begun.state, running.state, ended.state] == ["starting", "running", "exited"]
    assert running.facts["env"] == {"A": "\udcff"}
    assert running.facts["pid"] == os.getpid()
    assert ended.end() == 'machine "web" has ended with status 7'
    assert [machine.name for machine in named.all_of()] == ["web"]
    ended.remove()
    assert named.all_of() == []
    assert not (base / "web").exists()


def test_others_cannot_look_in(base: Path) -> None:
    named.claim("web").note(env={"TOKEN": "secret"})

    modes = [stat.S_IMODE(path.stat().st_mode) for path in (base, base / "web", base / "web/facts", base / "web/lock")]

    assert modes == [0o700, 0o700, 0o600, 0o600]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", ".a", "a" * 64, "ä", "a\n", "a:b", "a b"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="invalid name"):
        named.claim(name)
    with pytest.raises(ConfigError, match="invalid name"):
        named.find(name)


def test_names_that_are_given_by_us() -> None:
    claims = [named.claim(None), named.claim("m3"), named.claim(None)]

    assert [claim.name for claim in claims] == ["m1", "m3", "m2"]


def test_a_name_that_is_in_use(own: Own) -> None:
    own("web")

    with pytest.raises(ConfigError, match='the name "web" is in use; `kvmpy stop web` ends that machine'):
        named.claim("web")
    with pytest.raises(ConfigError, match='machine "web" runs; `kvmpy stop web` first, or `kvmpy rm -f`'):
        named.find("web").remove()


def test_of_many_who_want_a_name_one_has_it() -> None:
    won: list[named.Claim] = []
    lost: list[ConfigError] = []

    def race() -> None:
        try:
            won.append(named.claim("web"))
        except ConfigError as error:
            lost.append(error)

    threads = [threading.Thread(target=race) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(won), len(lost)) == (1, 15)
    assert named.find("web").is_alive


def test_an_owner_that_was_killed(own: Own, base: Path) -> None:
    process = own("web")
    (base / "web/vsock").touch()

    process.kill()
    process.wait(LIMIT)

    machine = named.find("web")
    assert machine.state == "lost"
    assert machine.end() == f'machine "web" is lost: process {process.pid}, which owned it, has died'
    with pytest.raises(ConfigError, match="is lost"):
        machine.must_run()
    named.claim("web")
    assert not (base / "web/vsock").exists()
    assert named.find("web").facts == {}


def test_the_end_of_an_owner_is_waited_for(own: Own) -> None:
    process = own("web")
    machine = named.find("web")

    assert not machine.wait(0.05)
    assert process.stdin is not None
    process.stdin.close()
    assert machine.wait(LIMIT)
    assert named.find("web").facts["status"] == 3


def test_a_signal_is_for_the_owner_alone(own: Own) -> None:
    process = own("web")
    machine = named.find("web")
    recycled = named.Named("web", "running", machine.facts | {"process_started": 1})

    recycled.send_signal(signal.SIGKILL)
    assert process.poll() is None
    machine.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == -signal.SIGKILL
    machine.send_signal(signal.SIGKILL)  # to nobody
    named.Named("web", "starting", {}).send_signal(signal.SIGKILL)


def test_a_child_of_the_owner_holds_the_name() -> None:
    claim = named.claim("web")
    held, let_go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(let_go)
        os.read(held, 1)
        os._exit(0)
    os.close(held)

    claim.close()

    assert named.find("web").is_alive
    os.close(let_go)
    os.waitpid(child, 0)
    assert not named.find("web").is_alive


def test_what_is_let_go_of_is_not_changed_any_more() -> None:
    first = named.claim("web")
    first.close()
    named.claim("web")

    first.note(status=1)
    first.close()

    assert named.find("web").facts == {}
    assert named.find("web").is_alive


def test_a_folder_that_has_gone(base: Path) -> None:
    claim = named.claim("web")
    found = claim.is_found()

    shutil.rmtree(base)

    assert found
    assert not claim.is_found()
    claim.close()
    assert claim.is_found()


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_change(base: Path, mode: int) -> None:
    base.mkdir()
    base.chmod(mode)

    with pytest.raises(HostError, match="can be changed by others; set XDG_RUNTIME_DIR to a folder of yours alone"):
        named.all_of()


def test_a_folder_that_cannot_be(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "none"))
    with pytest.raises(HostError, match=r"cannot make .*: No such file or directory; set XDG_RUNTIME_DIR"):
        named.claim("web")

    deep = base.parent / ("x" * 80)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(HostError, match="is too long for the path of a socket; set XDG_RUNTIME_DIR to a shorter one"):
        named.claim("web")


def test_facts_that_are_damaged(base: Path) -> None:
    named.claim("web").close()
    (base / "web/facts").write_bytes(b'{"pid": 7}\n{"status": 1')

    assert (named.find("web").state, named.find("web").facts) == ("lost", {"pid": 7})


def test_no_room_for_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = named.claim("web")
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)

    with pytest.raises(HostError, match=r"cannot write .*facts\": No space left on device; make room for it"):
        claim.note(status=1)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "nobody listens at port 1024 of the guest"),
        (b"ERR\n", "is no guest"),
        (b"x" * 1000, "is no guest"),
    ],
)
def test_who_answers_at_the_socket_is_no_guest(tmp_path: Path, answer: bytes, why: str) -> None:
    path = tmp_path / "vsock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer_one() -> None:
            client, _ = listener.accept()
            with client:
                assert client.recv(100) == b"CONNECT 1024\n"
                client.sendall(answer)

        thread = threading.Thread(target=answer_one)
        thread.start()
        with pytest.raises(ConnectionRefusedError, match=why):
            vsocket.call(path, 1024, LIMIT)
        thread.join()


def test_nothing_of_the_stream_is_lost_with_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        stream, client = None, None

        def answer_one() -> None:
            nonlocal client
            client, _ = listener.accept()
            client.sendall(b"OK 1073741824\nfirst")

        thread = threading.Thread(target=answer_one)
        thread.start()
        stream = vsocket.call(path, 1024, LIMIT)
        thread.join()

        assert stream.recv(100) == b"first"
        stream.close()
        client.close()
