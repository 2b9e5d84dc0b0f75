"""Two profiles of every property: a quick one, and a long one for ``make test-long``."""

from __future__ import annotations

import pytest

from tests.fuzz.harness import Canary


@pytest.fixture(params=["quick", pytest.param("long", marks=pytest.mark.long)])
def profile(request) -> str:
    return request.param


@pytest.fixture
def canary(tmp_path) -> Canary:
    return Canary(tmp_path / "canary")
