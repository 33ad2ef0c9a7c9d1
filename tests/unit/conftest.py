"""The dimension `transport`: a test that names it runs on each."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["mmio", "pci"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
