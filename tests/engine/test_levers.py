"""What saves memory changes neither losses nor gradients, apart from rounding; one process.

The same in two processes, and sharing, are in test_parallel.py.
"""

from __future__ import annotations

import pytest

from tests.engine.comparing import EXACT, assert_same, final, losses
from tests.engine.shared_runs import LEVERS, lever

# The losses are about 1; the momentum buffers are sums of gradients of about 0.01.
TOLERANCES = {
    "recompute": EXACT,
    "accumulate": {"rtol": 1e-5, "atol": 1e-6},
    "bfloat16": {"rtol": 5e-2, "atol": 2e-3},
    "all": {"rtol": 5e-2, "atol": 2e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levers")
    for name in LEVERS:
        lever(folder / name, name)
    return folder


@pytest.mark.parametrize("name", TOLERANCES)
def test_losses_gradients_and_weights(folder, name):
    for key in ("model", "optimizer"):
        found, expected = (final(folder / each)[key] for each in (name, "plain"))
        assert_same(found, expected, TOLERANCES[name], key)
    assert_same(losses(folder / name), losses(folder / "plain"), TOLERANCES[name])


def test_bfloat16_does_change_something(folder):
    assert losses(folder / "bfloat16").tolist() != losses(folder / "plain").tolist()
