"""What the benchmark makes of its figures: rounds, medians, ratios, verdicts."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LIB = Path(__file__).parents[2] / "scripts" / "lib"
BARE, OURS, THREADS, URING = "bare C loop", "kvmpy", "QEMU threads", "QEMU io_uring"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(LIB)
    return importlib.import_module("bench.harness")


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(LIB)
    return importlib.import_module("bench.targets")


def row(harness: ModuleType, unit: str, figures: dict[str, list[float]], name: str = "blk") -> list[dict[str, Any]]:
    """The records of a row with one case."""
    case = "4K read depth 32"
    return harness.Row(name, {(case, unit): figures}).records()  # type: ignore[no-any-return]


def test_ratio_is_taken_round_by_round(harness: ModuleType) -> None:
    """A machine that gets slower for both changes no ratio."""
    (_, ours) = row(harness, "us", {BARE: [10, 20, 40], OURS: [20, 40, 100]})

    assert ours["median"] == 40
    assert ours["over_bare"] == 20
    assert ours["ratios"]["bare"] == {"median": 2, "lowest": 2, "highest": 2.5, "to": BARE}


@pytest.mark.parametrize(("unit", "better"), [("IOPS", URING), ("MB/s", URING), ("us", THREADS), ("cpu us", THREADS)])
def test_compared_with_the_better_qemu(harness: ModuleType, unit: str, better: str) -> None:
    records = row(harness, unit, {OURS: [3, 3, 3], THREADS: [1, 1, 9], URING: [2, 2, 2]})

    assert records[0]["ratios"]["qemu"]["to"] == better


def test_each_round_begins_with_another(harness: ModuleType, tmp_path: Path) -> None:
    order: list[str] = []

    def run(name: str) -> Iterator[Any]:
        order.append(name)
        yield harness.Figure("case", "us", 1.0)

    options = harness.Options(3, 0.1, False, tmp_path, "")
    measured = harness.Row("exits")
    measured.measure(options, {name: lambda name=name: run(name) for name in "abc"})

    assert "".join(order) == "abcbcacab"
    assert measured.figures["case", "us"] == {name: [1.0] * 3 for name in "abc"}


def test_who_fails_is_left_out(harness: ModuleType, tmp_path: Path) -> None:
    def fails() -> Iterator[Any]:
        yield harness.Figure("case", "us", 1.0)
        raise harness.Failed("did not end")

    options = harness.Options(2, 0.1, False, tmp_path, "")
    measured = harness.Row("exits")
    measured.measure(options, {"good": lambda: [harness.Figure("case", "us", 2.0)], "bad": fails})

    assert measured.figures["case", "us"] == {"good": [2.0, 2.0]}
    assert measured.failures == ["exits: bad did not end"]


@pytest.mark.parametrize(("ours", "met"), [(120, True), (119, False)])
def test_verdict(harness: ModuleType, targets: ModuleType, ours: float, met: bool) -> None:
    records = row(harness, "IOPS", {OURS: [ours], URING: [100]})

    (verdict,) = targets.judge(records)

    assert verdict["met"] is met
    assert ("MISSED" in targets.table([verdict])) is not met


def test_nothing_to_compare_with_is_no_verdict(harness: ModuleType, targets: ModuleType) -> None:
    assert targets.judge(row(harness, "IOPS", {OURS: [100]})) == []


def test_table_has_each_contender(harness: ModuleType) -> None:
    text = harness.table(row(harness, "IOPS", {OURS: [1234.5], URING: [100]}))

    assert "1,234" in text
    assert "12.35 (12.35..12.35)" in text  # x QEMU


def test_rounds_in_another_host(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has failed there is left out, with what it did."""
    emulated = importlib.import_module("bench.emulated")
    results = {"rounds": {"a": [{"cold [ms]": 1.0}, {"cold [ms]": 3.0}], "b": []}, "failures": {"b": "timed out"}}

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "results.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(emulated.subprocess, "run", run)
    row = harness.Row("run")
    row.measure(harness.Options(2, 0.1, False, tmp_path, ""), emulated.rounds("program.py", tmp_path, {}, 10))

    assert row.figures == {("cold", "ms"): {"a": [1.0, 3.0]}}
    assert row.failures == ["run: b timed out"]
