"""Ways of sharing a run out: what each process holds, and that results do not depend on it.

All runs take six steps in two processes on the CPU. Sharing the optimizer state is equal to the
last bit; FSDP adds gradients in another order, so it is compared to ``FSDP`` below.
"""

from __future__ import annotations

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine import parallel
from d2dense.engine.launch import launch
from d2dense.engine.parallel import Replicas, build_parallel
from d2dense.engine.settings import RunSettings
from d2dense.errors import UserError
from tests.engine import shared_runs
from tests.engine.comparing import EXACT, assert_same, final, losses, rows
from tests.engine.shared_runs import LEVERS, MODES, REAL, RUNS, deep, images_of_test
from tests.engine.workers import arguments

FSDP = {"rtol": 1e-5, "atol": 1e-6}


def tolerance(*modes):
    return FSDP if "fsdp" in modes else EXACT


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The folder of all runs, and the error that the last one ends with."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(UserError) as error:
        launch(shared_runs.run_all, arguments(output_dir=str(folder)))
    return folder, str(error.value)


@pytest.fixture(scope="module")
def folder(ending):
    return ending[0]


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
@pytest.mark.parametrize("kind", RUNS)
def test_checkpoints_equal_those_of_processes_that_hold_everything(folder, kind, mode):
    found, expected = final(folder / kind / mode), final(folder / kind / "none")
    for key in ("model", "optimizer", "scheduler", "scaler", "iteration", "skipped_steps"):
        assert_same(found[key], expected[key], tolerance(mode), key)
    assert expected["skipped_steps"] == (1 if kind == "skip" else 0)
    last = [rows(folder / kind / each)[-1] for each in (mode, "none")]
    for name in ("loss_first", "loss_second", "total_loss", "lr"):
        assert last[0][name] == pytest.approx(last[1][name], rel=1e-5, abs=0), name


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_averages_are_shared_too_and_are_what_is_evaluated(folder, mode):
    """The second process has no test image: under FSDP it would miss the first one's forwards."""
    paths = [folder / "adamw" / each for each in (mode, "none")]
    found, expected = map(final, paths)
    for key in ("ema", "train_model"):
        assert_same(found[key], expected[key], tolerance(mode), key)
    assert expected["ema"]["updates"] == shared_runs.STEPS
    scores = [rows(path)[-1]["fake/score"] for path in paths]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[0] == pytest.approx(score(found["model"]), rel=1e-4)


def score(weights):
    """Evaluate a checkpoint by hand, in one process."""
    model = shared_runs.DeepModel().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        outputs = [model(batch)[0]["value"].sum().item() for batch in images_of_test()]
    return sum(outputs) / len(outputs)


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_in_one_part_lets_all_leave_out_the_step(folder, mode):
    content = final(folder / "scaled" / mode)
    assert content["scaler"]["scale"] == shared_runs.SCALE / 2
    buffers = content["optimizer"]["state"].values()
    assert all(each["momentum_buffer"].isfinite().all() for each in buffers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("saved", MODES)
def test_a_checkpoint_goes_on_in_every_mode(folder, saved, mode):
    found = final(folder / "adamw" / f"{saved}-{mode}")
    expected = final(folder / "adamw" / "none")
    for key in ("model", "train_model", "optimizer", "ema"):
        assert_same(found[key], expected[key], tolerance(saved, mode), key)


def test_each_process_holds_its_share(folder):
    held = [torch.load(folder / f"held{rank}.pth") for rank in range(2)]
    for kind in RUNS:
        whole = held[0][f"{kind}-none"]
        assert whole == held[1][f"{kind}-none"]
        assert whole["state"] > 0
        for mode in ("zero1", "fsdp"):
            parts = [each[f"{kind}-{mode}"] for each in held]
            assert sum(part["state"] for part in parts) == whole["state"]
            assert all(part["state"] < 0.7 * whole["state"] for part in parts)
        assert sum(each[f"{kind}-fsdp"]["weights"] for each in held) == whole["weights"]
        assert all(each[f"{kind}-zero1"]["weights"] == whole["weights"] for each in held)


@pytest.mark.parametrize("saved", MODES)
def test_one_process_goes_on_with_what_two_saved(folder, tmp_path, saved):
    """With the images of both: its losses are means over the same batches."""
    content = checkpoint.read(folder / "adamw" / saved / "model_0000002.pth")
    states = {}
    for mode in MODES:
        trainer = deep(tmp_path / mode, "adamw", mode)
        assert type(trainer.parallel) is Replicas
        trainer.load_state_dict(content)
        states[mode] = trainer.state_dict()
    for state in states.values():
        for key in ("model", "train_model", "optimizer", "ema"):
            assert_same(state[key], content[key], EXACT, key)


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
@pytest.mark.parametrize("name", REAL)
def test_models_of_others_train_the_same(folder, name, mode):
    """A cascade detector with batch norm, where one process sees no box in the second step; a Swin
    of Detectron2; a ViT of timm; blocks whose norms exchange statistics, also when recomputed.
    """
    found, expected = final(folder / name / mode), final(folder / name / "none")
    loose = {"rtol": 1e-4, "atol": 1e-5} if mode == "fsdp" else EXACT
    for key in ("model", "optimizer"):
        assert_same(found[key], expected[key], loose, key)


@pytest.mark.parametrize("name", LEVERS)
def test_two_processes_equal_one_with_every_lever(folder, tmp_path, name):
    """Activation checkpointing is equal to the bit at the same number of processes; other sums have
    another order, and bfloat16 rounds each process's share.
    """
    shared_runs.lever(tmp_path, "plain")
    loose = {"rtol": 1e-5, "atol": 1e-6}
    if name in ("bfloat16", "all"):
        loose = {"rtol": 5e-2, "atol": 2e-3}
    found, plain = folder / "levers" / name, folder / "levers" / "plain"
    for key in ("model", "optimizer"):
        assert_same(final(found)[key], final(tmp_path)[key], loose, key)
        if name == "recompute":
            assert_same(final(found)[key], final(plain)[key], EXACT, key)
    assert_same(losses(found), losses(tmp_path), loose)


def test_a_forward_that_fails_in_one_process_ends_all_and_names_the_image(ending):
    assert "process 1 for broken.jpg" in ending[1]
    assert "the boxes diverged" in ending[1]


def test_losses_that_use_other_blocks_in_some_processes_are_an_error_in_all(folder):
    for rank in range(2):
        error = (folder / "disagree" / f"error{rank}.txt").read_text()
        assert "same blocks" in error
        assert "zero1" in error


def settings(**changes):
    return RunSettings(output_dir="unused", max_iter=1, device="cpu", **changes)


@pytest.mark.parametrize(("option", "key"), [("compile", "COMPILE"), ("channels_last", "CHANNELS")])
def test_what_fsdp_cannot_do_is_said_before_the_run(option, key):
    with pytest.raises(UserError, match=f"{key}.*zero1"):
        build_parallel(settings(sharding="fsdp", **{option: True}))
    build_parallel(settings(sharding="zero1", **{option: True}))


@pytest.mark.parametrize("norm", [torch.nn.SyncBatchNorm, torch.nn.BatchNorm2d])
def test_a_failed_forward_is_replaced_only_where_no_process_waits_inside(norm, monkeypatch):
    monkeypatch.setattr(parallel.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda model, **options: model)
    guarded = Replicas(settings()).wrap(torch.nn.Sequential(norm(2)))
    assert guarded.replace_failed == (norm is torch.nn.BatchNorm2d)
