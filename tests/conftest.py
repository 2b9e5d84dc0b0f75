"""Fixtures that every test folder shares."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("tests.projects.parity")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("D2DENSE_TEST_DATA", ROOT.parent / "shared" / "data"))


# Seconds for a test that is marked "long"; the limit of all others is in pyproject.toml.
LONG_TIMEOUT = 3600


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT))


def pytest_collection_finish():
    """Spare the garbage collector, here and in forks, what stays until the end, which is every
    module, and let it look less often at graphs and models, of which tests make many.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """A test that draws without a seed draws the same numbers alone and in the suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# What a process of a run imports before it begins.
IMPORTED = ["d2dense.engine.train_net", "cednet", "codetr", "fscascade", "hfgd"]
IMPORTED += ["tests.stuck_processes"]


@pytest.fixture(scope="session", autouse=True)
def processes_start_in_a_moment():
    """The processes of a run are forks of a server that has imported everything, which each would
    do for itself otherwise: more seconds than most of these runs take. Those that a command starts
    in a test are not: they are started as for a user.
    """
    if torch.cuda.is_available():
        yield  # a fork cannot use CUDA
        return
    multiprocessing.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2dense.engine.launch._START_METHOD", "forkserver")
        yield


@pytest.fixture(scope="session", autouse=True)
def checks_of_files_start_in_a_moment():
    """Each exported file is checked by a fork of a fresh process, as ``tools/export_matrix.py``
    does it; the value is the function that starts an interpreter per file, for tests of that.
    """
    from d2dense.export import verification

    original = verification._run_fresh
    with verification.FreshServer() as server, pytest.MonkeyPatch.context() as patch:

        def run(path, images, start=None):
            if start is None:
                start = verification._start if path.suffix == ".onnx" else server._ask
            return original(path, images, start=start)

        patch.setattr(verification, "_run_fresh", run)
        yield original


@pytest.fixture(scope="session", autouse=True)
def nothing_is_drawn_for_tensors_without_values():
    """PyTorch decides in Python, step by step, what a draw on the meta device would look like: up
    to half of the time that large models take to build there.
    """

    def skipping(fill):
        def call(self, *args, **kwargs):
            return self if self.is_meta else fill(self, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "uniform_", "erfinv_"):
            patch.setattr(torch.Tensor, name, skipping(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real datasets; they are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real test data in {SHARED_DATA} (set D2DENSE_TEST_DATA)")
    return SHARED_DATA
