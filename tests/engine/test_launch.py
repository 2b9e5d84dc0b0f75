"""Several processes: spawned here, or described by the environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine import launch as launching
from d2dense.engine.launch import ProcessDied, launch
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError, run_tool
from tests.commands import Command
from tests.engine import workers
from tests.engine.fakes import FakeExperiment, make_batches


def notes(folder):
    return [json.loads((folder / f"note{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_machines": 2}, "--dist-url"),
        ({"dist_url": "somewhere"}, "'somewhere' names no place to meet; expected tcp://HOST:PORT"),
        ({"dist_url": "tcp://host"}, "'tcp://host' names no place"),
        ({"dist_url": "tcp://host:99999"}, "names no place"),
        ({"num_gpus": 0}, "must be 1 or more"),
        ({"machine_rank": 1}, "--machine-rank 1 must be from 0 to 0"),
        ({"device": "cuda", "num_gpus": 99}, "--device cpu"),
    ],
)
def test_launches_that_cannot_work(changes, words):
    with pytest.raises(UserError, match=words):
        launch(workers.describe, workers.arguments(**changes))


def test_two_processes_train_like_one(tmp_path):
    launch(workers.train, workers.arguments(output_dir=str(tmp_path / "two")))
    first, second = notes(tmp_path / "two")
    assert first["backend"] == "gloo"
    # one bucket: one exchange per optimizer step, although each step has two batches
    assert first["exchanges"] == second["exchanges"] == 3
    assert second["results"] == {}
    batches = make_batches(8, 4)
    whole = FakeExperiment(
        tmp_path / "one",
        batches=[a + b for a, b in zip(batches[::2], batches[1::2])],
        max_iter=3,
        clip_enabled=True,
        clip_type="full_model",
        clip_value=0.5,
        ema_enabled=True,
        ema_decay=0.5,
        best_metric="fake/score",
    )
    results = Trainer(whole).train()
    assert first["results"]["first"]["fake"] == pytest.approx(results["first"]["fake"], rel=1e-5)
    one, two = (checkpoint.read(tmp_path / name / "model_final.pth") for name in ("one", "two"))
    for key in ("model", "train_model"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value)
    rows = [
        json.loads((tmp_path / name / "metrics.json").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    for name in ("total_loss", "loss_first", "loss_second", "lr", "fake/score"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5), name
    assert rows[1]["images_per_second"] * rows[1]["time"] == pytest.approx(8)
    assert (tmp_path / "two" / "model_best.pth").is_file()


def test_a_parameter_that_one_process_does_not_use_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"depends on unused.weight, unused.bias; .*ddp.find_unused"
    ):
        launch(workers.unused_on_the_second, workers.arguments(output_dir=str(tmp_path)))


def test_all_processes_stop_early_together_and_unused_parameters_are_no_obstacle(tmp_path):
    launch(workers.stop_early, workers.arguments(output_dir=str(tmp_path)))
    assert notes(tmp_path) == [2, 2]


def test_cpu_processes_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(workers.count_threads, workers.arguments(output_dir=str(tmp_path)))
    counts = [int((tmp_path / f"threads{rank}").read_text()) for rank in (0, 1)]
    assert counts == [max(1, os.cpu_count() // 2)] * 2


def test_flags_that_contradict_the_launcher(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--num-gpus 3, but torchrun or srun started 2"):
        launch(workers.describe, workers.arguments(num_gpus=3))


def test_a_killed_process_ends_the_others_and_is_named(monkeypatch, capsys):
    """The other process neither exchanges anything nor obeys SIGTERM."""
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ProcessDied, match=r"\(pid \d+\) was ended by SIGKILL") as caught:
        launch(workers.die_on_the_second, workers.arguments())
    assert time.monotonic() - start < 60
    assert "--resume" in str(caught.value)

    def main():
        raise caught.value

    assert run_tool(main) == 1
    assert capsys.readouterr().err.count("\n") == 1


class _Ended:
    """A process of which all is known."""

    def __init__(self, exitcode):
        self.exitcode = exitcode


@pytest.mark.timeout(30)
def test_waiting_for_processes_that_have_all_ended_returns_at_once():
    """The last two may end between two looks, so that the second one finds nobody alive."""
    assert launching._wait_for_one([_Ended(0), _Ended(0)]) is None
    ended = [_Ended(0), _Ended(-9)]
    assert launching._wait_for_one(ended) is ended[1]


def test_a_users_mistake_in_a_process_is_one_user_error():
    with pytest.raises(UserError, match=r"^found one thing, expected another$"):
        launch(workers.fail_on_the_second, workers.arguments())


def test_a_defect_in_a_process_keeps_its_traceback():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="in crash"):
        launch(workers.crash, workers.arguments())


def test_torchrun_is_picked_up(tmp_path, repo_root):
    environment = {**os.environ, "NOTES": str(tmp_path), "PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.engine.workers"]
    subprocess.run(command, env=environment, cwd=repo_root, check=True, capture_output=True)
    assert [note["rank"] for note in notes(tmp_path)] == [0, 1]
    assert all(note["world"] == 2 and note["sum"] == 3 for note in notes(tmp_path))
    assert [note["local"] for note in notes(tmp_path)] == [0, 1]


def test_srun_is_picked_up(tmp_path, repo_root):
    """Two tasks on one node, with the variables that srun sets for each of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "1",
        "MASTER_PORT": str(port),
    }
    environment = {**os.environ, **step, "NOTES": str(tmp_path), "PYTHONPATH": str(repo_root)}
    tasks = [
        Command(
            ["-m", "tests.engine.workers"],
            environ={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=repo_root,
            log=tmp_path / f"log{rank}",
        )
        for rank in (0, 1)
    ]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert [(note["rank"], note["local"], note["sum"]) for note in notes(tmp_path)] == [
        (0, 0, 3),
        (1, 1, 3),
    ]
