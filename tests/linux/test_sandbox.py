"""Commands in a fresh machine: from Python, from the shell, and as README.md has them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest
from command import KVMPY, Start, wait_until
from networks import LIMIT, serve

import kvmpy

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "notes").write_text("from the host\n")
    return folder


@pytest.fixture(scope="module")
def sandbox(cloud: Path, shared: Path) -> Iterator[kvmpy.Sandbox]:
    """With the host's file system, and one folder twice: /shared and, only to be read, /given."""
    volumes = [f"{shared}:/shared", f"{shared}:/given:ro"]
    with kvmpy.Sandbox(kernel=cloud, volumes=volumes, env={"FROM": "sandbox"}) as sandbox:
        yield sandbox


def test_the_root_is_the_host_s_but_for_what_is_written(sandbox: kvmpy.Sandbox) -> None:
    name = "/usr/kvmpy-test"

    done = sandbox.run("sh", "-c", f"echo new >{name} && cat {name} && rm /etc/passwd && ls /etc/passwd", timeout=LIMIT)

    assert done.stdout == b"new\n"
    assert done.returncode == 2
    assert sandbox.files.read(os.__file__) == Path(os.__file__).read_bytes()  # /tmp is its own
    assert not Path(name).exists()
    assert Path("/etc/passwd").exists()
    sandbox.run("sh", "-c", "echo nobody:x:65534:65534::/:/bin/sh >/etc/passwd", check=True)


def test_volumes(sandbox: kvmpy.Sandbox, shared: Path) -> None:
    words = "cat /given/notes; echo written >/shared/answer; cat /given/answer; echo no >/given/answer"

    done = sandbox.run("sh", "-c", words, timeout=LIMIT)

    assert done.stdout == b"from the host\nwritten\n"
    assert b"Read-only file system" in done.stderr
    assert (shared / "answer").read_text() == "written\n"


def test_how_a_command_runs(sandbox: kvmpy.Sandbox) -> None:
    words = "pwd; id -u; echo $FROM $MORE; cat; echo error >&2; kill -9 $$"

    done = sandbox.run(
        "sh", "-c", words, input="in\n", cwd="/usr/lib", user="65534", env={"MORE": "x y"}, timeout=LIMIT
    )

    assert done.stdout == b"/usr/lib\n65534\nsandbox x y\nin\n"
    assert done.stderr == b"error\n"
    assert done.returncode == -9
    assert done.duration > 0


@pytest.mark.parametrize(
    ("words", "options", "stage", "status"),
    [
        (["no-such-command"], {}, "exec", 127),
        (["/etc/group"], {}, "exec", 126),
        (["true"], {"cwd": "/no-such-folder"}, "cwd", 125),
        (["true"], {"user": "no-such-user"}, "user", 125),
    ],
)
def test_a_command_that_cannot_be_started(
    sandbox: kvmpy.Sandbox, words: list[str], options: dict[str, str], stage: str, status: int
) -> None:
    with pytest.raises(kvmpy.CommandError) as caught:
        sandbox.run(*words, **options)  # type: ignore[arg-type]

    assert (caught.value.stage, caught.value.status) == (stage, status)
    assert caught.value.errno


def test_a_command_that_fails_or_takes_too_long(sandbox: kvmpy.Sandbox) -> None:
    """Nothing of it stays, wherever it has gone."""
    words = "(setsid sleep 1001 &); setsid sh -c 'sleep 1002 & sleep 1003' & echo begun; sleep 1004"
    with pytest.raises(kvmpy.CommandFailed, match="status 4"):
        sandbox.run("sh", "-c", "exit 4", check=True, timeout=LIMIT)
    with pytest.raises(kvmpy.TimedOut) as caught:
        sandbox.run("sh", "-c", words, timeout=4)

    assert caught.value.stdout == b"begun\n"
    assert sandbox.run("sh", "-c", "cat /proc/[0-9]*/cmdline", timeout=LIMIT).stdout.count(b"sleep") == 0


def test_a_guest_that_says_too_much(sandbox: kvmpy.Sandbox) -> None:
    with pytest.raises(kvmpy.TooLarge, match="more than 100000 bytes") as caught:
        sandbox.run("cat", "/dev/zero", limit=100_000, timeout=LIMIT)
    with pytest.raises(kvmpy.TooLarge, match='"/dev/zero" in the guest has more than 100000 bytes'):
        sandbox.files.read("/dev/zero", limit=100_000)

    assert caught.value.stdout == bytes(100_000)


def test_a_guest_without_memory(sandbox: kvmpy.Sandbox) -> None:
    """The command is killed, or told so; the agent stays."""
    done = sandbox.run("tail", "/dev/zero", timeout=LIMIT)  # a line without an end

    assert done.returncode in (-signal.SIGKILL, 1)
    assert sandbox.run("echo", "here", timeout=LIMIT).stdout == b"here\n"


def test_a_port_is_published_while_it_runs_and_without_a_network(sandbox: kvmpy.Sandbox) -> None:
    program = "import socket; s = socket.create_server(('127.0.0.1', 80)); print('up', flush=True); c = s.accept()[0]; "
    program += "c.sendall(c.makefile('rb').read()[::-1])"
    # the interpreter itself: that of an environment may have its libraries below /tmp, which guests have of their own
    with sandbox.popen(os.path.realpath(sys.executable), "-I", "-S", "-c", program, stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        port = sandbox.publish("127.0.0.1:0:80")
        with socket.create_connection(("127.0.0.1", port), LIMIT) as stream:
            stream.sendall(b"abc" * 10_000)
            stream.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: stream.recv(1 << 16), b""))

    assert answer == b"cba" * 10_000


def test_several_at_once_with_much_data(sandbox: kvmpy.Sandbox) -> None:
    data = os.urandom(1 << 20)

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: sandbox.run("cat", input=data, timeout=LIMIT).stdout, range(4)))

    assert done == [data] * 4


def test_a_process_to_talk_to(sandbox: kvmpy.Sandbox) -> None:
    with sandbox.popen("sh", stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"echo $((6*7))\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"42\n"
        process.stdin.write(b"exit 5\n")
        process.stdin.close()
        assert process.wait(LIMIT) == 5


def test_trees(sandbox: kvmpy.Sandbox, tmp_path: Path) -> None:
    (tmp_path / "tree/folder").mkdir(parents=True)
    (tmp_path / "tree/folder/file").write_bytes(bytes(range(256)))
    (tmp_path / "tree/link").symlink_to("folder/file")

    sandbox.files.put(tmp_path / "tree", "/opt/tree")
    sandbox.run("mv", "/opt/tree/folder/file", "/opt/tree/folder/moved", check=True, timeout=LIMIT)
    sandbox.files.get("/opt/tree", tmp_path / "back")

    assert (tmp_path / "back/folder/moved").read_bytes() == bytes(range(256))
    assert (tmp_path / "back/link").readlink() == Path("folder/file")


def test_pause(sandbox: kvmpy.Sandbox) -> None:
    process = sandbox.popen("sh", "-c", "while :; do :; done")
    sandbox.pause()
    used = sandbox.metrics()["cpu_seconds"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sandbox.run, "echo", "awake")
        with pytest.raises(kvmpy.TimedOut):
            sandbox.run("true", timeout=0.5)

        assert sandbox.metrics()["cpu_seconds"] - used < 0.1
        assert not waiting.done()
        sandbox.resume()
        process.close()
        assert waiting.result(LIMIT).stdout == b"awake\n"


def held(after: float = 0) -> tuple[int, int]:
    """How many descriptors and threads this process has; the ends of connections are agreed upon with the guest."""
    time.sleep(after)
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_nothing_is_left_of_short_commands(sandbox: kvmpy.Sandbox) -> None:
    sandbox.run("true", timeout=LIMIT)  # so that its files are known
    wait_until(lambda: held() == held(after=2), "an idle sandbox")
    before = held()

    for _ in range(20):
        sandbox.run("true", timeout=LIMIT)

    wait_until(lambda: all(now <= was for now, was in zip(held(), before, strict=True)), f"no more than {before}")


def test_the_kernel_is_silent(sandbox: kvmpy.Sandbox) -> None:
    metrics = sandbox.metrics()

    assert sandbox.logs() == ""
    assert 0 < metrics["memory_used"] <= metrics["memory"]
    assert 0 < metrics["ready_seconds"] < metrics["seconds"]


def test_a_volume_that_is_not_there(cloud: Path, tmp_path: Path) -> None:
    with pytest.raises(kvmpy.NotFoundError, match="nowhere"):
        kvmpy.Sandbox(kernel=cloud, volumes={tmp_path / "nowhere": "/x"}).start()


def test_run_with_a_terminal(start: Start, cloud: Path) -> None:
    traps = "trap 'echo caught' INT; trap 'stty size' WINCH; trap 'exit 9' QUIT"
    words = f"{traps}; echo ready; while :; do sleep 0.1; done"
    command = start(KVMPY, "run", "--kernel", cloud, "--root", "none", "--tty", "--", "sh", "-c", words, terminal=True)

    command.expect("ready\r\n")
    command.type("\x03")
    command.expect("caught\r\n")
    command.resize(101, 37)
    command.expect("37 101\r\n")
    command.type("\x1c")  # Ctrl-\
    status = command.wait(LIMIT)

    assert status == 9
    assert command.stderr == ""


def test_run_when_the_guest_is_lost(start: Start, cloud: Path) -> None:
    words = "echo before; sleep 1; echo c >/proc/sysrq-trigger"

    done = start(KVMPY, "run", "--kernel", cloud, "--root", "none", "--", "sh", "-c", words).end()

    assert (done.status, done.stdout) == (255, "before\n")
    assert done.stderr.startswith("kvmpy: the guest is lost: guest kernel panicked (sysrq triggered crash)\n| ")


def test_network(start: Start, cloud: Path, pingable: str, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("hello-42\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = "cat /etc/resolv.conf; wget -q -O - http://10.0.2.2:$PORT/page; echo up; nc -l -p 80"

    with serve(tmp_path) as server:
        options = ["--kernel", cloud, "--root", "none", "--net", "user", "--publish", f"{port}:80"]
        command = start(KVMPY, "run", *options, "--env", f"PORT={server}", "--", "sh", "-c", words)
        command.expect("nameserver 10.0.2.3\n")
        command.expect("hello-42\nup\n")
        time.sleep(1)  # for nc to listen
        with socket.create_connection(("127.0.0.1", port), LIMIT) as stream:
            stream.sendall(b"through\n")
        command.expect("through\n")

    assert command.end().status == 0


def readme() -> str:
    """The section with the examples."""
    match = re.search(r"^## Run a command in a fresh machine\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[1]


def test_readme_in_the_shell(cloud: Path, environment: dict[str, str], shared: Path) -> None:
    (session,) = re.findall(r"^```\n(\$ .*?)^```", readme(), re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.MULTILINE)
    path = f"{Path(KVMPY).parent}:{os.environ['PATH']}"

    outputs = [
        subprocess.run(
            ["sh", "-c", command],
            cwd=shared,
            env=environment | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        for command, _ in commands
    ]

    assert len(commands) == 2
    assert [done.stdout for done in outputs] == [expected for _, expected in commands]
    assert [done.stderr for done in outputs] == ["", ""]


def test_readme_in_python(cloud: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = re.findall(r"^```python\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(shared)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)

    assert (done.returncode, done.stderr) == (0, "")
    assert "was killed after 0.5 s" in done.stdout


# Run by pytest in the test below, which reads its report.
LOST = """
import kvmpy, pytest

def test_passes(kvm_sandbox):
    assert kvm_sandbox.run("uname").stdout == b"Linux\\n"
    waiting = kvm_sandbox.popen("sleep", "1000")
    with pytest.raises(kvmpy.GuestLost, match=r"guest kernel panicked \\(sysrq triggered crash\\)") as caught:
        kvm_sandbox.run("sh", "-c", "echo note >/dev/console; echo c >/proc/sysrq-trigger")
    with pytest.raises(kvmpy.GuestLost, match="panicked"):
        waiting.wait(60)
    assert (caught.value.stop.reason, caught.value.status) == (kvmpy.Reason.PANIC, 255)
    assert "sysrq triggered crash" in caught.value.report
    assert "Kernel panic" in kvm_sandbox.logs()
    kvm_sandbox.run("true")
"""


def test_pytest_plugin_and_a_guest_that_is_lost(cloud: Path, tmp_path: Path) -> None:
    (tmp_path / "test_demo.py").write_text(LOST)
    words = ["-p", "no:kvmpy", "-p", "kvmpy.pytest_plugin", "-p", "no:cacheprovider", "-c", "/dev/null"]

    command = [sys.executable, "-m", "pytest", *words, "--kvm-kernel", str(cloud), "--rootdir", tmp_path, tmp_path]
    report = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT).stdout

    assert "GuestLost: the guest is lost: guest kernel panicked (sysrq triggered crash)" in report
    assert re.search(r"kvmpy: state of machine -+\nkvmpy: guest kernel panicked \(sysrq triggered crash\)", report)
    assert "last exits, the latest first" in report
    assert re.search(r"kvmpy: oops of machine -+\n.*Kernel panic - not syncing: sysrq triggered crash\n", report)
    assert re.search(r"kvmpy: console of machine -+\n(.*\n)*.*sysrq_handle_crash", report)  # its last lines


def test_a_pool_hands_out_no_dead_machine(cloud: Path) -> None:
    with kvmpy.SandboxPool(size=1, kernel=cloud, root="none", mem="128M") as pool:
        wait_until(lambda: len(pool) == 1, "a machine that is ready")
        (dead,) = pool._ready
        assert isinstance(dead, kvmpy.Sandbox)
        dead.machine.stop(kvmpy.Stop(kvmpy.Reason.QUIT))
        assert dead.wait(LIMIT) is not None

        with pool.take(LIMIT) as sandbox:
            assert sandbox is not dead
            assert sandbox.run("uname", timeout=LIMIT).stdout == b"Linux\n"


# Run by a process that is killed at the end.
OWNER = """
import asyncio, sys, kvmpy

async def main():
    sandbox = await kvmpy.AsyncSandbox(kernel=sys.argv[1], root="none", network="user").start()
    many = await asyncio.gather(*(sandbox.run("sh", "-c", f"sleep 0.2; echo {n}") for n in range(5)))
    assert [done.stdout for done in many] == [b"%d\\n" % n for n in range(5)]
    try:
        await asyncio.wait_for(sandbox.run("sh", "-c", "setsid sleep 1001 & sleep 1002"), 2)
    except TimeoutError:
        pass
    try:
        await sandbox.run("sleep", "1003", timeout=0.5)
    except kvmpy.TimedOut:
        pass
    while b"sleep 100" in (await sandbox.run("ps", timeout=60)).stdout:
        await asyncio.sleep(0.1)
    assert await sandbox.files.read("/etc/hosts")
    await sandbox.pause()
    await sandbox.resume()
    print("ready", sandbox.publish("127.0.0.1:0:80"), flush=True)
    await sandbox.run("sleep", "1000")

asyncio.run(main())
"""


def test_asyncio_and_the_death_of_the_owner(start: Start, cloud: Path, pingable: str) -> None:
    command = start(sys.executable, "-c", OWNER, cloud)
    command.expect("ready ")
    helpers = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(pid) == command.pid]
    os.kill(command.pid, signal.SIGKILL)
    command.wait(LIMIT)

    assert len(helpers) == 1  # passt
    wait_until(lambda: parent_of(helpers[0]) == 0, "the end of passt")
    assert command.stderr == ""


def parent_of(pid: int) -> int:
    """The parent of a process; 0 when there is no such process any more."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(parent)
