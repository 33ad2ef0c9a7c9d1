"""ARCHITECTURE.md's map has every module, with the sentence that the module itself begins with."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_module_map() -> None:
    rows = []
    for path in sorted((ROOT / "kvmpy").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        sentence = docstring.split("\n\n")[0].replace("\n", " ")
        rows.append(f"| `{path.relative_to(ROOT / 'kvmpy')}` | {sentence} |")

    text = (ROOT / "ARCHITECTURE.md").read_text()

    assert [row for row in rows if row not in text] == []
    assert text.count("| `") == len(rows)


def test_security_names_what_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()

    named = set(re.findall(r"`((?:tests|scripts)/[\w./]+)`", text))

    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
