"""Commands through the agent: streams, terminals, users, limits, ends of every kind; the agent is a process here."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import pytest
from agents import LIMIT, NativeAgent, build, has_ended, running

from kvmpy.core.errors import (
    AgentError,
    CommandError,
    CommandFailed,
    ConfigError,
    GuestLost,
    KvmpyError,
    TimedOut,
    TooLarge,
)
from kvmpy.guest import protocol
from kvmpy.guest.client import Agent
from kvmpy.guest.process import Process
from kvmpy.guest.protocol import HELLO, WINDOW, Exit, Kind, Number, frame

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def agent(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeAgent]:
    folder = tmp_path_factory.mktemp("running")
    with running(binary, folder) as agent:
        yield agent
    assert (folder / "says").read_bytes() == b""


def children(agent: NativeAgent) -> list[int]:
    pid = agent.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_no_children(agent: NativeAgent) -> bool:
    """Whether all that serve connections end, now or soon."""
    deadline = time.monotonic() + LIMIT
    while children(agent) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not children(agent)


@pytest.mark.parametrize(
    ("script", "stdout", "stderr", "returncode"),
    [
        ("exit 0", b"", b"", 0),
        ("exit 255", b"", b"", 255),
        ("printf out; printf err >&2; exit 3", b"out", b"err", 3),
        ("printf 'a\\000\\377\\n'", b"a\0\xff\n", b"", 0),
        ("kill -KILL $$", b"", b"", -9),
        ("kill -TERM $$", b"", b"", -15),
        ("cat", b"", b"", 0),
        ("exec >&- 2>&-; sleep 0.1; exit 4", b"", b"", 4),
    ],
)
def test_streams_and_ends(agent: NativeAgent, script: str, stdout: bytes, stderr: bytes, returncode: int) -> None:
    done = agent.run(["sh", "-c", script])

    assert (done.stdout, done.stderr, done.returncode) == (stdout, stderr, returncode)
    assert 0 < done.duration < LIMIT


def test_a_core_dump_is_told(agent: NativeAgent, tmp_path: Path) -> None:
    limits = {resource.RLIMIT_CORE: (0, 0)}
    with agent.popen(["sh", "-c", "kill -SEGV $$"], cwd=str(tmp_path), rlimits=limits) as process:
        assert process.wait(LIMIT) == -signal.SIGSEGV
        assert process.usage is not None
        assert (process.usage.core, process.usage.maxrss > 0) == (0, True)


def test_much_input_and_output_at_once(agent: NativeAgent) -> None:
    data = os.urandom(1 << 16) * 48  # 3 MiB, more than all windows and pipes together

    assert agent.run(["cat"], input=data).stdout == data


def test_stderr_with_stdout(agent: NativeAgent) -> None:
    done = agent.run(["sh", "-c", "echo 1; echo 2 >&2; echo 3"], stderr=STDOUT)

    assert (done.stdout, done.stderr) == (b"1\n2\n3\n", b"")


def test_input_that_nobody_reads(agent: NativeAgent) -> None:
    """The command takes some, or none, and ends."""
    assert agent.run(["head", "-c", "3"], input=b"abc" * 1_000_000).stdout == b"abc"
    assert agent.run(["true"], input=b"x" * 3_000_000).returncode == 0
    with agent.popen(["sh", "-c", "exec <&-; echo closed; sleep 60"], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == b"closed\n"
        with pytest.raises(BrokenPipeError):
            for _ in range(100):
                process.stdin.write(b"x" * 10000)
                process.stdin.flush()


def test_who_reads_one_stream_is_not_held_up_by_the_other(agent: NativeAgent) -> None:
    script = "head -c 3000000 /dev/zero >&2 & head -c 3000000 /dev/zero; wait; exit 6"
    with agent.popen(["sh", "-c", script], stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout and process.stderr
        assert len(process.stdout.read(3_000_000)) == 3_000_000  # it ends only when stderr is read
        assert len(process.stderr.read()) == 3_000_000
        assert process.wait(LIMIT) == 6


def test_who_does_not_read_stops_the_command(agent: NativeAgent) -> None:
    with agent.popen(["sh", "-c", "head -c 100000000 /dev/zero; echo end >&2"], stdout=PIPE, stderr=PIPE) as process:
        with pytest.raises(TimedOut):
            process.wait(0.3)
        assert process.stdout
        assert sum(len(buffer) for buffer in process._buffers.values()) == WINDOW
        assert len(process.stdout.read(50_000_000)) == 50_000_000
        process.kill(group=True)
        assert process.wait(LIMIT) == -9


def test_lines_back_and_forth(agent: NativeAgent) -> None:
    with agent.popen(["sh", "-c", "while read line; do echo got $line; done; echo end"], stdin=PIPE, stdout=PIPE) as p:
        assert p.stdin and p.stdout
        for word in (b"one", b"two"):
            p.stdin.write(word + b"\n")
            p.stdin.flush()
            assert p.stdout.readline() == b"got " + word + b"\n"
        p.stdin.close()
        assert list(p.stdout) == [b"end\n"]
        assert p.wait(LIMIT) == 0


def test_the_end_of_a_command_is_not_that_of_what_it_leaves(agent: NativeAgent) -> None:
    with agent.popen(["sh", "-c", "(sleep 0.4; echo late) & exit 2"], stdout=PIPE) as process:
        assert process.stdout
        assert process.wait(LIMIT) == 2
        assert process.poll() == 2
        assert process.stdout.read() == b"late\n"


def test_poll_and_signals(agent: NativeAgent) -> None:
    with agent.popen(
        ["sh", "-c", "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.02; done"], stdout=PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(LIMIT) == 9
        assert process.stdout.read() == b"caught\n"
        process.terminate()  # nothing: it has ended
    with agent.popen(["sleep", "60"]) as process:
        process.terminate()
        assert process.wait(LIMIT) == -15


def test_a_timeout_kills_all_of_it_and_keeps_the_output(agent: NativeAgent) -> None:
    begin = time.monotonic()
    with pytest.raises(TimedOut, match=r"killed after 0\.3 s") as caught:
        agent.run(["sh", "-c", "echo $$; echo err >&2; sleep 60 & sleep 60"], timeout=0.3)

    assert time.monotonic() - begin < 5
    assert (caught.value.stderr, caught.value.status) == (b"err\n", 124)
    assert has_ended(int(caught.value.stdout))


ESCAPES = "setsid sleep 60 & (setsid sh -c 'sleep 60 & echo $! >>pids; sleep 60' &); echo $! >>pids; sleep 60"


def escaped(folder: Path) -> list[int]:
    """What a command that has run ESCAPES there has left outside its session."""
    deadline = time.monotonic() + LIMIT
    pids: list[int] = []
    while len(pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        with suppress(FileNotFoundError):
            pids = [int(word) for word in (folder / "pids").read_text().split()]
    return pids


def test_a_timeout_kills_what_has_left_the_session_too(agent: NativeAgent, tmp_path: Path) -> None:
    with pytest.raises(TimedOut):
        agent.run(["sh", "-c", ESCAPES], cwd=str(tmp_path), timeout=0.5)

    pids = escaped(tmp_path)
    assert len(pids) == 2
    assert all(has_ended(pid) for pid in pids)


def test_a_lost_connection_kills_what_has_left_the_session_too(agent: NativeAgent, tmp_path: Path) -> None:
    process = agent.popen(["sh", "-c", ESCAPES], cwd=str(tmp_path))
    pids = escaped(tmp_path)
    process.close()

    assert len(pids) == 2
    assert all(has_ended(pid) for pid in (process.pid, *pids))


def test_what_a_command_leaves_is_killed_or_goes_on(agent: NativeAgent) -> None:
    """Nobody is killed who was not asked for."""
    with agent.popen(["sh", "-c", "setsid sleep 60 >&- & echo $!"], stdout=PIPE) as process:
        assert process.stdout
        left = int(process.stdout.read())
        assert process.wait(LIMIT) == 0
    os.kill(left, signal.SIGKILL)  # it has been there

    with agent.popen(["sh", "-c", "setsid sleep 60 & echo $!; exit 3"], stdout=PIPE) as process:
        assert process.stdout
        left = int(process.stdout.readline())
        assert process.wait(LIMIT) == 3
        process.kill_all()
        assert process.stdout.read() == b""  # nobody has it open any more
        assert has_ended(left)


def test_orphans_are_reaped_while_the_command_runs(agent: NativeAgent) -> None:
    script = "for i in 1 2 3; do (true &); done; sleep 0.2; cat /proc/$PPID/task/$PPID/children; echo; echo $$"

    children, command = agent.run(["sh", "-c", script]).stdout.decode().splitlines()

    assert children.split() == [command]


def test_output_has_a_limit(agent: NativeAgent, tmp_path: Path) -> None:
    script = "echo $$ >pid; head -c 100000 /dev/zero; sleep 60"
    zeros = agent.run(["head", "-c", "1000", "/dev/zero"], limit=1000)
    with pytest.raises(TooLarge, match="more than 1000 bytes; give it a larger limit") as caught:
        agent.run(["sh", "-c", script], limit=1000, cwd=str(tmp_path))

    assert zeros.stdout == bytes(1000)
    assert caught.value.stdout == bytes(1000)
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_communicate_goes_on_after_a_limit(agent: NativeAgent) -> None:
    with agent.popen(["head", "-c", "1000000", "/dev/zero"], stdout=PIPE) as process:
        with pytest.raises(TooLarge):
            process.communicate(limit=300_000)
        assert process.communicate(timeout=LIMIT) == (bytes(1_000_000), b"")


def test_a_guest_that_never_stops_talking_keeps_nobody_beyond_the_timeout() -> None:
    """Frames without end, none of which is what is waited for."""
    ours, theirs = socket.socketpair()
    more = frame(Kind.WINDOW, bytes(Number(1))) * 1000

    def talk() -> None:
        with suppress(OSError):
            theirs.sendall(frame(Kind.HELLO, HELLO) + frame(Kind.STARTED, bytes(Number(7))))
            while True:
                theirs.sendall(more)

    talker = threading.Thread(target=talk)
    talker.start()
    with Process(lambda: ours, ["x"], stdin=PIPE) as process, pytest.raises(TimedOut):
        process.wait(0.2)
    theirs.close()
    talker.join(LIMIT)


@pytest.mark.parametrize(("status", "number"), [(256, 0), (0xFFFFFFFF, 0), (0, 200), (0, 0xFFFFFFFF)])
def test_an_end_that_makes_no_sense(status: int, number: int) -> None:
    ours, theirs = socket.socketpair()
    end = frame(Kind.EXIT, bytes(Exit(status, number, 0, 0, 0, 0, 0, 0)))
    theirs.sendall(frame(Kind.HELLO, HELLO) + frame(Kind.STARTED, bytes(Number(7))) + end)

    with theirs, Process(lambda: ours, ["x"]) as process, pytest.raises(GuestLost, match="sent an end with status"):
        process.wait(LIMIT)


def usage(pid: int) -> tuple[int, int, int]:
    """Of a process: how many descriptors and children it has, and KiB of memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    (rss,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    offspring = [tasks.read_text() for tasks in Path(f"/proc/{pid}/task").glob("*/children")]
    return len(os.listdir(f"/proc/{pid}/fd")), len(" ".join(offspring).split()), rss


@pytest.mark.parametrize("count", [int(os.environ.get("KVMPY_TEST_COMMANDS", "500"))])
def test_nothing_is_left_of_many_short_commands(agent: NativeAgent, count: int) -> None:
    for _ in range(20):
        agent.run(["true"])
    assert has_no_children(agent)
    before = usage(os.getpid()), usage(agent.process.pid), threading.active_count()

    for _ in range(count):
        assert agent.run(["true"]).returncode == 0

    assert has_no_children(agent)
    (fds, children, rss), of_agent, threads = usage(os.getpid()), usage(agent.process.pid), threading.active_count()
    assert (fds, children, threads) == (before[0][0], before[0][1], before[2])
    assert of_agent[:2] == before[1][:2]
    assert rss - before[0][2] < 4096 and of_agent[2] - before[1][2] < 64


# Ports.


def test_a_port_of_the_guest(agent: NativeAgent) -> None:
    data = os.urandom(3_000_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = agent.dial(server.getsockname()[1], LIMIT)
        far, _ = server.accept()
    with near, far:
        far.settimeout(LIMIT)
        near.settimeout(LIMIT)
        sender = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
        sender.start()
        received = b"".join(iter(lambda: far.recv(1 << 20), b""))
        sender.join(LIMIT)
        far.sendall(b"answer")
        far.close()
        answer = b"".join(iter(lambda: near.recv(100), b""))

    assert received == data
    assert answer == b"answer"
    assert has_no_children(agent)


def test_a_port_at_which_nobody_listens(agent: NativeAgent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    for number, why in ((port, "Connection refused"), (0, "Invalid argument"), (70000, "Invalid argument")):
        with pytest.raises(AgentError, match=f"port {number} of the guest: {why}") as caught:
            agent.dial(number, LIMIT)
        assert caught.value.stage == "port"


def test_communicate_goes_on_after_a_timeout(agent: NativeAgent) -> None:
    with agent.popen(["sh", "-c", "read x; echo $x; sleep 0.4; echo end"], stdin=PIPE, stdout=PIPE) as process:
        with pytest.raises(TimedOut) as caught:
            process.communicate(b"hello\n", timeout=0.15)
        assert caught.value.stdout == b"hello\n"
        assert process.communicate() == (b"hello\nend\n", b"")


def test_whose_connection_ends_is_killed_with_its_children(agent: NativeAgent) -> None:
    process = agent.popen(["sh", "-c", "sleep 60 & echo $!; sleep 60"], stdout=PIPE)
    assert process.stdout
    child = int(process.stdout.readline())
    process.close()

    assert has_ended(process.pid)
    assert has_ended(child)
    with pytest.raises(GuestLost, match="let go of"):
        process.wait(1)


def test_the_agent_dies_in_the_middle(binary: Path, tmp_path: Path) -> None:
    with running(binary, tmp_path) as agent, agent.popen(["sleep", "60"], stdout=PIPE) as process:
        (server,) = children(agent)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(GuestLost, match="connection to the guest is lost") as caught:
            process.wait(LIMIT)
        assert caught.value.status == 255
        assert has_ended(process.pid)
        agent.process.kill()
        agent.process.wait()
        with pytest.raises(GuestLost, match="cannot reach"):
            agent.run(["true"])


@pytest.mark.parametrize(
    ("args", "options", "stage", "number", "status"),
    [
        (["nothing-like-it"], {}, "exec", errno.ENOENT, 127),
        (["/nowhere/x"], {}, "exec", errno.ENOENT, 127),
        (["/etc/passwd/x"], {}, "exec", errno.ENOTDIR, 127),
        ([""], {}, "exec", errno.ENOENT, 127),
        (["/etc/passwd"], {}, "exec", errno.EACCES, 126),
        (["/etc"], {}, "exec", errno.EACCES, 126),
        (["{tmp}/text"], {}, "exec", errno.ENOEXEC, 126),
        (["{tmp}/script"], {}, "loader", errno.ENOENT, 127),
        (["text"], {"env": {"PATH": "/nowhere:{tmp}"}}, "exec", errno.ENOEXEC, 126),
        (["true"], {"cwd": "/nowhere"}, "cwd", errno.ENOENT, 125),
        (["true"], {"cwd": "/etc/passwd"}, "cwd", errno.ENOTDIR, 125),
        (["true"], {"user": "nobody-like-this"}, "user", errno.ENOENT, 125),
        (["true"], {"user": "root:no-such-group"}, "user", errno.ENOENT, 125),
        (["true"], {"user": "4294967295"}, "user", errno.ENOENT, 125),
        (["true"], {"rlimits": {99: (0, 0)}}, "limit", errno.EINVAL, 125),
        (["true", "x" * 200_000], {}, "exec", errno.E2BIG, 126),
    ],
)
def test_what_cannot_be_started(
    agent: NativeAgent,
    tmp_path: Path,
    args: list[str],
    options: dict[str, object],
    stage: str,
    number: int,
    status: int,
) -> None:
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    (tmp_path / "script").write_text("#!/nowhere/sh\n")
    (tmp_path / "script").chmod(0o755)
    env = {"PATH": f"/nowhere:{tmp_path}"} if "env" in options else None

    with pytest.raises(CommandError) as caught:
        agent.popen([word.replace("{tmp}", str(tmp_path)) for word in args], **{**options, "env": env})

    assert (caught.value.stage, caught.value.errno, caught.value.status) == (stage, number, status)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([], {}),
        (["x" * (3 << 20)], {}),
        (["true"], {"rlimits": dict.fromkeys(range(17), (0, 0))}),
        (["true"], {"stdout": STDOUT}),
        (["true"], {"stdin": 5}),
    ],
)
def test_what_is_refused_before_the_guest_is_asked(
    agent: NativeAgent, args: list[str], options: dict[str, int]
) -> None:
    with pytest.raises(ConfigError):
        agent.popen(args, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null byte"):
        agent.popen(["a\0b"])


def test_environment_folder_mask_and_limits(agent: NativeAgent) -> None:
    script = "pwd; umask; ulimit -n; echo $PATH; echo $HOME; echo $A; set -- $(cat /proc/$$/stat); echo $1 $5 $6"
    done = agent.run(
        ["sh", "-c", script],
        cwd="/usr",
        umask=0o027,
        rlimits={resource.RLIMIT_NOFILE: (77, 88)},
        env={"A": "b c", "PATH": "/bin:/usr/bin"},
    )

    *lines, ids = done.stdout.decode().splitlines()
    assert lines[:4] == ["/usr", "0027", "77", "/bin:/usr/bin"]
    assert lines[4:] == [Path("~").expanduser().as_posix(), "b c"] or lines[5] == "b c"
    assert len(set(ids.split())) == 1  # it leads its session and its group


def test_nothing_of_the_agent_is_left_in_a_command(agent: NativeAgent) -> None:
    """Neither descriptors, nor signals that are ignored or blocked."""
    done = agent.run(["sh", "-c", "ls /proc/self/fd; grep -E 'Sig(Blk|Ign)' /proc/self/status"])

    assert done.stdout.split() == [b"0", b"1", b"2", b"3", b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]


@needs_root
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("nobody", "65534 65534 65534"),
        ("65534", "65534 65534 65534"),
        ("nobody:daemon", "65534 1 1"),
        ("nobody:7", "65534 7 7"),
        ("12345", "12345 0 0"),
        ("12345:54321", "12345 54321 54321"),
        ("root", "0 0 0"),
    ],
)
def test_users(agent: NativeAgent, user: str, ids: str) -> None:
    done = agent.run(["sh", "-c", "echo $(id -u) $(id -g) $(id -G)"], user=user)

    assert done.stdout.decode().strip() == ids


@needs_root
def test_the_folder_is_entered_with_the_users_rights(agent: NativeAgent, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)

    with pytest.raises(CommandError) as caught:
        agent.run(["true"], user="nobody", cwd=str(tmp_path / "closed"))

    assert (caught.value.stage, caught.value.errno) == ("cwd", errno.EACCES)


# Terminals.


def read_until(process: Process, text: bytes) -> bytes:
    assert process.stdout
    shown = b""
    while text not in shown:
        data = process.stdout.read1(65536)
        assert data, shown
        shown += data
    return shown


def type_in(process: Process, keys: bytes) -> None:
    assert process.stdin
    process.stdin.write(keys)
    process.stdin.flush()


def test_a_terminal(agent: NativeAgent) -> None:
    script = "trap 'stty size' WINCH; stty size; test -t 0 && test -t 1 && test -t 2 && : >/dev/tty && echo is-one; cat"
    with agent.popen(["sh", "-c", script + "; while :; do sleep 0.02; done"], tty=(40, 132)) as process:
        assert process.stderr is None
        assert read_until(process, b"is-one\r\n") == b"40 132\r\nis-one\r\n"
        type_in(process, b"typed\n\x04")
        assert read_until(process, b"typed\r\ntyped\r\n")
        process.resize(50, 100)
        assert read_until(process, b"50 100\r\n")
        type_in(process, b"\x03")
        assert process.wait(LIMIT) == -signal.SIGINT


def test_the_end_of_input_on_a_terminal(agent: NativeAgent) -> None:
    with agent.popen(["sh", "-c", "cat; echo end"], tty=(24, 80)) as process:
        out, _ = process.communicate(b"line\n", LIMIT)

    assert process.returncode == 0
    assert out.replace(b"^D\b\b", b"") == b"line\r\nline\r\nend\r\n"


def test_hanging_up_a_terminal(agent: NativeAgent) -> None:
    process = agent.popen(["sh", "-c", "trap '' HUP; echo ready; while :; do sleep 0.02; done"], tty=(24, 80))
    read_until(process, b"ready")
    process.close()

    assert has_ended(process.pid)


# Many.


def test_many_at_once_from_many_threads(agent: NativeAgent) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: agent.run(["sh", "-c", f"cat; exit {n}"], input=b"%d" % n), range(40)))

    assert [(one.returncode, one.stdout) for one in done] == [(n, b"%d" % n) for n in range(40)]


def test_one_command_from_many_threads(agent: NativeAgent) -> None:
    """One writes, two read, one waits."""
    with agent.popen(["sh", "-c", "tee /dev/stderr; exit 8"], stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        data = os.urandom(1 << 20)
        with ThreadPoolExecutor(4) as pool:
            waited = pool.submit(process.wait, LIMIT)
            out, err = pool.submit(process.stdout.read), pool.submit(process.stderr.read)
            pool.submit(process.stdin.write, data).result(LIMIT)
            process.stdin.close()
            assert (out.result(LIMIT), err.result(LIMIT), waited.result(LIMIT)) == (data, data, 8)


def test_short_commands_leave_nothing_behind(agent: NativeAgent) -> None:
    agent.run(["true"])
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), len(fds(agent))
    for _ in range(150):
        agent.run(["true"])

    assert (len(os.listdir("/proc/self/fd")), threading.active_count(), len(fds(agent))) == before
    assert has_no_children(agent)


def fds(agent: NativeAgent) -> list[str]:
    return os.listdir(f"/proc/{agent.process.pid}/fd")


def test_check(agent: NativeAgent) -> None:
    with pytest.raises(CommandFailed, match="ended with status 3") as caught:
        agent.run(["sh", "-c", "echo out; exit 3"], check=True)
    with pytest.raises(CommandFailed, match="was ended by signal 15") as killed:
        agent.run(["sh", "-c", "kill $$"], check=True)

    assert (caught.value.status, caught.value.stdout, killed.value.status) == (3, b"out\n", 143)


def test_no_streams_at_all(agent: NativeAgent) -> None:
    with agent.popen(["sh", "-c", "cat; echo lost; exit 3"], stdin=DEVNULL) as process:
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
        assert process.wait(LIMIT) == 3


# A guest that is not to be trusted: what the client does with an agent that says this.


@contextmanager
def saying(*frames: bytes) -> Iterator[Agent]:
    """An agent that says this to whoever connects, then closes."""
    speakers: list[threading.Thread] = []

    def speak(mouth: socket.socket) -> None:
        with mouth, suppress(BrokenPipeError):
            mouth.sendall(b"".join(frames))

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        speakers.append(threading.Thread(target=speak, args=(theirs,)))
        speakers[-1].start()
        return ours

    yield Agent(connect)
    for speaker in speakers:
        speaker.join()


GREETING = frame(Kind.HELLO, HELLO)
STARTED = frame(Kind.STARTED, bytes(Number(5)))


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [GREETING],
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [frame(Kind.HELLO, b"XXXX" + HELLO[4:])],
        [frame(Kind.HELLO, HELLO[:4] + b"\2\0\2\0")],
        [frame(Kind.HELLO, b"")],
        [GREETING, GREETING],
        [GREETING, frame(Kind.ERROR, b"short")],
        [GREETING, frame(Kind.ERROR, bytes(protocol.Error(1, 100000)))],
        [GREETING, frame(Kind.EXIT, bytes(protocol.Exit.SIZE))],
        [GREETING, frame(Kind.STARTED, b"xx")],
        [GREETING, STARTED],
        [GREETING, STARTED, STARTED],
        [GREETING, STARTED, frame(Kind.EOF, stream=1), frame(Kind.EOF, stream=1)],
        [GREETING, STARTED, frame(Kind.EOF, stream=1), frame(Kind.DATA, b"x", 1)],
        [GREETING, STARTED, frame(Kind.DATA, b"x", 0)],
        [GREETING, STARTED, *[frame(Kind.DATA, bytes(65536), 2)] * 5],
        [GREETING, STARTED, frame(Kind.ENTRY)],
        [GREETING, STARTED, frame(Kind.EXIT, b"")],
        [GREETING, STARTED, frame(Kind.WINDOW, b"", 0)],
    ],
)
def test_an_agent_that_makes_no_sense(frames: list[bytes]) -> None:
    with saying(*frames) as agent, pytest.raises(GuestLost):
        agent.run(["x"], timeout=5)


def test_an_agent_without_means() -> None:
    failure = frame(Kind.ERROR, bytes(protocol.Error(protocol.Stage.SYSTEM, errno.EAGAIN)) + b"processes")
    with saying(GREETING, failure) as agent, pytest.raises(AgentError, match="processes") as caught:
        agent.run(["x"])

    assert (caught.value.stage, caught.value.errno, isinstance(caught.value, KvmpyError)) == ("system", 11, True)


def test_what_a_guest_says_in_an_error_does_nothing_to_a_terminal() -> None:
    failure = frame(Kind.ERROR, bytes(protocol.Error(protocol.Stage.CWD, errno.EACCES)) + b"\x1b]0;title\x07\n\xff")
    with saying(GREETING, failure) as agent, pytest.raises(CommandError) as caught:
        agent.run(["x"])

    assert str(caught.value).isprintable()


def test_an_agent_that_is_silent() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(TimedOut, match="not started"):
        Agent(lambda: ours).run(["x"], timeout=0.1)
