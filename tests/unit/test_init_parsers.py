"""What the guest's init reads, cut off and changed at will, with a compiler that finds wrong accesses to memory."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scale import examples

GUESTS = Path(__file__).parents[2] / "guests"
LIMIT = 60.0  # seconds
FAKE = "long fake(long, long, long, long, long, long, long);\n"
CALL = "{\n\treturn fake(number, a, b, c, d, e, f);\n}\n"

SUPERBLOCK = bytes(1024) + bytes(0x38) + b"\x53\xef" + bytes(0x2E) + bytes(16) + b"abc".ljust(16, b"\0") + bytes(64)
INPUTS = [
    b"root=LABEL=abc rootfstype=ext4 kvmpy.ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.3 init=/bin/sh rw\n",
    b"kvmpy.ip=1.2.3.4::5.6.7.8:9.9.9.9::eth0:off:" + b"x" * 200,
    b"tag0\0/mnt/one\0rw\0tag1\0/a/b/c\0ro\0",
    b"00000000-00000fff : Reserved\n  c0000000-c0000fff : device\nfed00000-fed003ff : HPET\n",
    b"lib/modules/a.ko\nlib/modules/b.ko\n",
    b"nodev\tsysfs\n\text4\n\txfs\nnodev\tproc\n",
    b"ls /\ncat a b c\npoweroff\n",
    b"a " * 100,
    b"root=" * 900,
    b"0" * 40000,
    SUPERBLOCK,
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """init_parsers.c around guests/init.c, whose system calls are its own."""
    folder = tmp_path_factory.mktemp("parsers")
    header = (GUESTS / "free.h").read_text()
    found = re.sub(
        r"(static inline long syscall6\([^{]*\)\n)\{.*?\n\}\n", lambda m: FAKE + m[1] + CALL, header, flags=re.S
    )
    assert found != header
    (folder / "free.h").write_text(found)
    (folder / "init.c").write_bytes((GUESTS / "init.c").read_bytes())
    options = ["-std=gnu11", "-g", "-O1", "-w", "-DHOSTED", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("init_parsers.c")
    command = ["gcc", *options, "-I", folder, "-o", folder / "parsers", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if "cannot find -lasan" in done.stderr or "libasan" in done.stderr:
        pytest.skip("this compiler has no address sanitizer")
    assert done.returncode == 0, done.stderr
    return folder / "parsers"


def parse(program: Path, inputs: list[bytes]) -> None:
    """All of them, one after the other in one process."""
    (program.parent / "inputs").write_bytes(b"".join(struct.pack("<I", len(data)) + data for data in inputs))
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    command = [program, program.parent / "inputs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")


def cuts(data: bytes) -> Iterator[bytes]:
    yield from (data[:length] for length in (*range(min(len(data), 1200)), len(data)))


def test_inputs_cut_off_at_each_byte(program: Path) -> None:
    parse(program, [piece for data in INPUTS for piece in cuts(data)])


def test_lists_longer_than_the_room_for_them(program: Path) -> None:
    """Of a file that procfs makes, the end is wherever the buffer ends."""
    line = b"00000000-00000fff : a\n"
    parse(program, [bytes(n) and b" " * n + line * 3000 for n in range(1, len(line) + 2)])


PIECES = [
    *INPUTS[:8],
    b"\0",
    b"\n",
    b" ",
    b"=",
    b":",
    b".",
    b"-",
    b"9" * 30,
    b"f" * 30,
    b"kvmpy.ip=",
    b"\xff",
    b"root=",
]


@settings(max_examples=examples(10))
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join), max_size=30))
def test_any_pieces(program: Path, inputs: list[bytes]) -> None:
    parse(program, inputs)
