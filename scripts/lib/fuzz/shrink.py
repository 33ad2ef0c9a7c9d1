"""Makes a failing case short, and keeps it as a file that is tried for ever after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .run import Case
from .runner import attempt

MOST = 400  # attempts


def shrink(case: Case, engine: str, kind: str) -> Case:
    """A shorter case that fails in the same way, by leaving out operations, then parts of them."""
    left = MOST

    def fails(ops: list[Any]) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and attempt(case._replace(ops=ops), engine).kind == kind

    return case._replace(ops=_parts(_fewer(case.ops, fails), fails))


def _fewer(ops: list[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    """Delta debugging: leave out halves, then quarters, down to single ones."""
    step = max(1, len(ops) // 2)
    while True:
        at = 0
        while at < len(ops):
            shorter = ops[:at] + ops[at + step :]
            if shorter and fails(shorter):
                ops = shorter
            else:
                at += step
        if step == 1:
            return ops
        step //= 2


def _parts(ops: list[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    for number, op in enumerate(ops):
        for simpler in _simpler(op):
            shorter = [*ops[:number], simpler, *ops[number + 1 :]]
            if fails(shorter):
                ops = shorter
                break
    return ops


def _simpler(op: Any) -> Iterator[Any]:
    """Forms of an operation with less in them, the simplest first."""
    if op[0] == "start" and op[3]:
        yield [*op[:3], []]
    if op[0] == "chain":
        _, queue, segments, odd = op
        if odd:
            yield [*op[:3], {}]
        for number in range(len(segments)):
            yield ["chain", queue, segments[:number] + segments[number + 1 :], odd]


def save(case: Case, kind: str, folder: Path) -> Path:
    """Write the case to a file in `folder`, whose name tells what it is."""
    text = json.dumps(case._asdict(), separators=(",", ":")) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = folder / f"{case.device}-{case.transport}-{kind.replace('.', '-')}-{digest}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(path: Path) -> Case:
    return Case(**json.loads(path.read_text()))
