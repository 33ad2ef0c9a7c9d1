"""Makes text of unknown origin fit for a terminal."""

from __future__ import annotations

# ECMA-48, 5.4, 5.6 and 5.5: control sequences (colours, cursor), control strings (titles), other escape sequences.
ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
NAMED = {"\n": "\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """`text` as a terminal would leave it: without escape sequences and carriage returns, tabs expanded; `escaped`."""
    if "\x1b" in text:
        import re  # loading it takes longer than a start

        text = re.sub(ESCAPES, "", text)
    return escaped(text.replace("\r", "").expandtabs())


def escaped(text: str) -> str:
    """`text` with characters that do not print as themselves shown as `\\x..`, newlines excepted."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return NAMED.get(character) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )
