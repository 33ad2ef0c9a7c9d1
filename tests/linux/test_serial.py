"""Where the console can go besides standard output: nothing is lost on the way, however slow the reader."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from command import KVMPY, Boot, Start, wait_until

SIZE = 40_000  # bytes of output
LINE = 64  # of them in each line

TYPED = b"tty; seq 1 50\nexit\n"
SHOWN = b"\n/dev/ttyS0\r\n" + b"".join(b"%d\r\n" % number for number in range(1, 51))

# `kvmpy` with a buffer for the console that such an output fills many times over.
SMALL_BUFFER = """
import sys
import kvmpy.console
from kvmpy.__main__ import main
kvmpy.console.OUTPUT_LIMIT = 4096
sys.exit(main())
"""


def test_file(boot: Boot, cloud: Path, tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("left from before")

    done = boot("-k", cloud, "--serial", f"file={log}", "--exec", "seq 1 200")

    assert (done.status, done.stdout, done.stderr) == (0, "", "")
    assert log.read_text() == "".join(f"{number}\n" for number in range(1, 201))


def test_unix_socket(start: Start, cloud: Path, tmp_path: Path) -> None:
    path = tmp_path / "console"
    command = start(KVMPY, "boot", "-k", cloud, "--append", "quiet", "--serial", f"unix={path}")
    wait_until(path.exists, "the socket")

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(TYPED)
        heard = b"".join(iter(lambda: client.recv(4096), b""))
    done = command.end()

    assert (done.status, done.stdout, done.stderr) == (0, "", "")
    assert SHOWN in heard
    assert not path.exists()


def test_pty(start: Start, cloud: Path) -> None:
    command = start(KVMPY, "boot", "-k", cloud, "--append", "quiet", "--serial", "pty")
    command.expect_error("the console is at /dev/pts/")
    terminal = os.open(command.stderr.split()[-1], os.O_RDWR | os.O_NOCTTY)
    heard = b""

    os.write(terminal, TYPED)
    with suppress(OSError):  # EIO: kvmpy has closed its end
        while data := os.read(terminal, 4096):
            heard += data
    os.close(terminal)
    done = command.end()

    assert (done.status, done.stdout) == (0, "")
    assert SHOWN in heard


def test_slow_reader_gets_every_byte(start: Start, cloud: Path) -> None:
    lines = SIZE // LINE
    command = start(
        sys.executable, "-c", SMALL_BUFFER, "boot", "-k", cloud,
        "--exec", f"i=0; while [ $i -lt {lines} ]; do printf '%0{LINE - 1}d\\n' $i; i=$((i+1)); done",
    )  # fmt: skip
    command.narrow()
    wait_until(lambda: command.unread() > 0, "output")
    time.sleep(2)  # meanwhile all buffers fill; the pipe not to its last byte, as small writes to it are never split

    done = command.end()

    assert done.status == 0
    assert done.stdout == "".join(f"{number:0{LINE - 1}}\n" for number in range(lines))
