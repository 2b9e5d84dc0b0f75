"""The whole launcher, killed with SIGKILL again and again, ends where a run without kills does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from d2dense import checkpoint
from d2dense.engine.launch import launch
from d2dense.engine.signals import Preempted
from tests.checkpoint.kills import kill_again_and_again
from tests.tools import interrupted

pytestmark = pytest.mark.long


def options(folder, period):
    return [
        f"train.output_dir={folder}",
        "train.max_iter=100000",
        f"train.checkpointer.period={period}",
        "train.checkpointer.max_to_keep=2",
        "train.eval_period=0",
        "dataloader.train.num_workers=1",
    ]


def test_fifty_kills_change_nothing(repo_root, configs, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    interrupted.use_noisy_detector(configs["lazy"])

    def start():
        environ = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tools/train_net.py", "--config-file", configs["lazy"]]
        return subprocess.Popen(
            [*command, "--resume", *options(killed, 1)],
            cwd=repo_root,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    result = kill_again_and_again(killed, start, kills=50, seed=21, longest=0.4)
    print(result)
    assert result.during_save >= 3
    _, state = checkpoint.CheckpointFolder(killed).resume()
    args = interrupted.arguments(
        configs["lazy"],
        options(whole, 100_000),
        stream=tmp_path / "stream",
        stop=("signal", state["iteration"] + 1),
    )
    with pytest.raises(Preempted):
        launch(interrupted.run, args)
    (file,) = whole.glob("model_*.pth")
    interrupted.assert_same(state, checkpoint.read(file))
