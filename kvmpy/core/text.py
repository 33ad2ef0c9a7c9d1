"""Makes text of unknown origin fit for a terminal."""

from __future__ import annotations

from .typed import TYPE_CHECKING

if TYPE_CHECKING:
    import re

# ECMA-48, 5.4, 5.6 and 5.5: control sequences (colours, cursor), control strings (titles), other escape sequences.
# Patterns are compiled when they are used: that takes longer than loading a module.
ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
UNUSUAL = r"[^\n -~]"


def printable(text: str) -> str:
    """`text` as a terminal would leave it: without escape sequences and carriage returns, tabs expanded; `escaped`."""
    import re

    return escaped(re.sub(ESCAPES, "", text).replace("\r", "").expandtabs())


def escaped(text: str) -> str:
    """`text` with characters that do not print as themselves shown as `\\x..`, newlines excepted."""
    import re

    return re.sub(UNUSUAL, _shown, text)


def _shown(match: re.Match[str]) -> str:
    """As Python writes it in text; without its codec, which a process that is locked in could not load."""
    character = match.group()
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 1 << 8 else f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"
