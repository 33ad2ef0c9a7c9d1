"""The interactive console: at a pipe, a file and a terminal, which is always given back as it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from command import KVMPY, Boot, Start

# A shell on the terminal, as the user has it: says how kvmpy ended, and whether it has left the terminal as it was.
SHELL = """
before=$(stty -g)
sh -c 'echo pid=$$; exec "$0" "$@"' "$@"
echo status=$?
[ "$(stty -g)" = "$before" ] && echo terminal restored
"""


def test_typing_through_a_pipe(start: Start, cloud: Path) -> None:
    console = start(KVMPY, "boot", "-k", cloud, "--append", "quiet")
    console.type("echo hello-$((6*7)); tty\nexit\n")  # long before anybody listens

    done = console.end()

    assert done.status == 0
    assert "\nhello-42\r\n/dev/ttyS0\r\n" in done.stdout
    assert done.stderr == ""


def test_typing_from_a_file(boot: Boot, cloud: Path, tmp_path: Path) -> None:
    """More of it than fits into the UART and what waits before it; the shell, and with it the guest, ends with it."""
    lines = [f"n=$((n+{number}))" for number in range(340)]
    (tmp_path / "typed").write_text("\n".join([*lines, "echo sum=$n", ""]))

    with open(tmp_path / "typed") as typed:
        done = boot("-k", cloud, "--append", "quiet", stdin=typed.fileno())

    assert done.status == 0
    assert f"\nsum={sum(range(340))}\r\n" in done.stdout


def test_nothing_to_read(start: Start, cloud: Path) -> None:
    """With stdin closed there is nobody to type anything: the shell hears of the end of its input."""
    done = start("sh", "-c", 'exec "$0" "$@" <&-', KVMPY, "boot", "-k", cloud, "--append", "quiet").end()

    assert (done.status, done.stderr) == (0, "")


def test_terminal(start: Start, cloud: Path) -> None:
    console = start("sh", "-c", SHELL, "sh", KVMPY, "boot", "-k", cloud, "--append", "quiet", terminal=True)
    kvmpy = int(console.expect(r"pid=\d+").removeprefix("pid="))
    console.expect("# ")

    os.kill(kvmpy, signal.SIGWINCH)
    console.type("echo one-$((0+1))\r")
    console.expect(r"\$\(\(0\+1\)\)\r+\none-1\r+\n")  # echoed by the guest, once
    console.type("echo be''gun; sleep 1000\r")
    console.expect(r"begun\r+\n")  # the shell has given the terminal its usual modes back
    console.type("\x03")  # Ctrl-c is for the guest
    console.expect(r"\^C")
    console.expect("# ")  # the shell has read nothing of the next line before
    console.type("stty -icanon; dd bs=1 count=1 2>/dev/null | od -An -tx1\r")
    console.expect(r"tx1\r+\n")
    console.type("\x01\x01")
    console.expect(r" 01\r+\n")
    console.type("\x01h")
    console.expect_error("Ctrl-a x")
    console.type("\x01b")
    console.type("h")
    console.expect("sysrq: HELP")
    console.type("\x01x")

    console.expect("status=0\r\nterminal restored")


def test_sigterm_gives_the_terminal_back(start: Start, cloud: Path) -> None:
    console = start("sh", "-c", SHELL, "sh", KVMPY, "boot", "-k", cloud, "--append", "quiet", terminal=True)
    kvmpy = int(console.expect(r"pid=\d+").removeprefix("pid="))
    console.expect("# ")

    os.kill(kvmpy, signal.SIGTERM)

    console.expect(f"status={128 + signal.SIGTERM}\r\nterminal restored")
