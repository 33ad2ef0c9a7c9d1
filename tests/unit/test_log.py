"""Log lines: structlog late, and a guest that cannot flood them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmpy.core import log as log_module
from kvmpy.core.log import BURST, PERIOD, Log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_level_event_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    Log("info").info("boot", kernel="k", mem=512)

    assert capsys.readouterr().err == "kvmpy: info: boot kernel=k mem=512\n"


def test_below_the_threshold_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    Log("warning").info("boot")

    assert capsys.readouterr().err == ""


def test_a_flood_is_cut_off_and_counted(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    log = Log()

    for _ in range(1000):
        log.warning("guest pokes")
    flooded = capsys.readouterr().err.splitlines()
    clock[0] += PERIOD
    log.warning("guest pokes")

    assert len(flooded) == BURST
    assert capsys.readouterr().err == f"kvmpy: warning: guest pokes suppressed={1000 - BURST}\n"


def test_one_event_does_not_silence_another(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    log = Log()

    for _ in range(1000):
        log.warning("noisy")
    log.warning("rare")

    assert "rare" in capsys.readouterr().err


def test_structlog_is_loaded_by_the_first_line_only() -> None:
    code = """
import sys
from kvmpy.core.log import log
log.debug("unseen")
print("structlog" in sys.modules)
log.warning("seen")
print("structlog" in sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.split() == ["False", "True"], done.stderr
