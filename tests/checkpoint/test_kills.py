"""SIGKILL at random moments of saving never leaves a folder that cannot be resumed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.checkpoint import saver
from tests.checkpoint.kills import kill_again_and_again


def run_of(folder, repo_root):
    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.saver", str(folder)],
            cwd=repo_root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def assert_exact(state):
    expected = saver.content(state["iteration"])["model"]["w"]
    assert torch.equal(state["model"]["w"], expected)


def survive(tmp_path, repo_root, *, kills, seed):
    result = kill_again_and_again(
        tmp_path,
        run_of(tmp_path, repo_root),
        kills=kills,
        seed=seed,
        longest=0.3,
        check=assert_exact,
    )
    print(f"seed {seed}: {result}")
    assert len(list(tmp_path.glob("model_*.pth"))) <= 3  # keep = 2, and one that is not listed yet
    return result


def test_a_few_kills(tmp_path, repo_root):
    survive(tmp_path, repo_root, kills=3, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", [11, 12])
def test_many_kills(tmp_path, repo_root, seed):
    result = survive(tmp_path, repo_root, kills=40, seed=seed)
    assert result.during_save >= 5
