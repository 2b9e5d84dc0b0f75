"""Several processes: spawned here, or described by the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine.launch import environment_processes, launch
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine import workers
from tests.engine.fakes import FakeExperiment, make_batches

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def notes(folder):
    return [json.loads((folder / f"note{rank}.json").read_text()) for rank in (0, 1)]


def test_environment_of_torchrun():
    place = environment_processes(TORCHRUN)
    assert (place.rank, place.world_size) == (5, 8)
    assert (place.local_rank, place.local_size) == (1, 4)
    assert place.init_method == "env://"


def test_environment_of_srun():
    place = environment_processes(SLURM)
    assert (place.rank, place.world_size) == (5, 8)
    assert (place.local_rank, place.local_size) == (1, 4)
    assert place.init_method == "tcp://gpu007:23456"
    given = environment_processes({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "99"})
    assert given.init_method == "tcp://head:99"
    with pytest.raises(UserError, match="ntasks-per-node"):
        environment_processes({**SLURM, "SLURM_STEP_NUM_NODES": "3"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("one", "one"),
        ("a,b", "a"),
        ("n[3,5]", "n3"),
        ("n[01-04]-ib,x", "n01-ib"),
        ("login-1,gpu[2-3]", "login-1"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    place = environment_processes({**SLURM, "SLURM_STEP_NODELIST": nodelist})
    assert place.init_method.startswith(f"tcp://{host}:")


def test_a_plain_shell_and_a_batch_script_start_one_process():
    assert environment_processes({}) is None
    assert environment_processes({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_machines": 2}, "--dist-url"),
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


def test_all_processes_stop_early_together_and_unused_parameters_are_no_obstacle(tmp_path):
    launch(workers.stop_early, workers.arguments(output_dir=str(tmp_path)))
    assert notes(tmp_path) == [2, 2]


def test_cpu_processes_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(workers.count_threads, workers.arguments(output_dir=str(tmp_path)))
    counts = [int((tmp_path / f"threads{rank}").read_text()) for rank in (0, 1)]
    assert counts == [max(1, os.cpu_count() // 2)] * 2


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
