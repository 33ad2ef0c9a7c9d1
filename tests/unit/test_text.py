"""Text of unknown origin, made fit for a terminal without loading anything for what is ordinary."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmpy.core.text import escaped, printable


def test_what_does_not_print_is_shown_as_python_writes_it() -> None:
    characters = [chr(code) for code in (*range(0x3000), 0xD800, 0xFEFF, 0xFFFF, 0x1F600, 0xE0001, 0x10FFFF)]

    shown = [escaped(character) for character in characters]

    expected = [
        character if character == "\n" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in characters
    ]
    assert shown == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07said", "said"),
        ("one\r\ntwo\tthree", "one\ntwo     three"),
        ("\x07\x9b31m", "\\x07\\x9b31m"),
    ],
)
def test_as_a_terminal_would_leave_it(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_nothing_is_loaded_for_it() -> None:
    """A process that is locked in could not."""
    program = (
        "import sys; from kvmpy.core.text import printable; old = set(sys.modules); printable('\\u0007 \\udc80\\t');"
    )

    done = subprocess.run(
        [sys.executable, "-c", program + "print(set(sys.modules) - old)"], capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("set()\n", "")
