"""`kvmpy run` carries a command as well when it is locked in."""

from __future__ import annotations

import pytest
from test_relay import *  # noqa: F403 - the tests


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKED", "1")
