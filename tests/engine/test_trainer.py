"""The training loop on a tiny model: checkpoints, resuming, averages, evaluation, reports."""

from __future__ import annotations

import logging
import pickle
import re
import types

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from torch import nn

from d2dense import checkpoint
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine.comparing import assert_equal, rows, weights
from tests.engine.fakes import FakeExperiment, TinyModel, make_batches


def test_training_writes_checkpoints_metrics_and_results(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = Trainer(FakeExperiment(tmp_path, checkpoint_period=2, eval_period=3))
    results = trainer.train()
    assert set(results) == {"first"}
    names = {file.name for file in tmp_path.glob("*.pth")}
    periodic = {f"model_{iteration:07d}.pth" for iteration in (1, 3, 5)}
    assert names == periodic | {"model_final.pth"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    content = checkpoint.read(tmp_path / "model_final.pth")
    assert content["iteration"] == 5
    assert {"model", "optimizer", "scheduler", "scaler", "iteration"} <= set(content)
    assert "ema" not in content
    assert_equal(content["model"], trainer.model.state_dict())
    assert checkpoint.read(tmp_path / "model_0000001.pth")["iteration"] == 1

    found = {row["iteration"]: row for row in rows(tmp_path)}
    assert set(found) == {2, 5}
    for row in found.values():
        assert row["total_loss"] == pytest.approx(row["loss_first"] + row["loss_second"], rel=0.5)
        for name in ("lr", "time", "data_time", "images_per_second", "eta_seconds", "max_mem_mb"):
            assert row[name] >= 0, name
        assert row["fake/score"] == pytest.approx(results["first"]["fake"]["score"], abs=1.0)
    assert found[5]["fake/score"] == results["first"]["fake"]["score"]
    assert found[5]["lr"] == pytest.approx(0.05 * (1 - 5 / 6))
    assert found[5]["eta_seconds"] == 0
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_console_has_one_line_per_period(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Trainer(FakeExperiment(tmp_path, max_iter=7, log_period=3, test_names=())).train()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("iter ")]
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    pattern = (
        r"iter \d+/7  eta \d+:\d\d:\d\d  total_loss \S+  loss_first \S+  loss_second \S+  "
        r"lr \S+  images/s \S+  data \S+s  step \S+s  mem \d+MB"
    )
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_losses_are_reported_per_iteration_and_throughput_counts_every_image(tmp_path):
    batches = make_batches(6, 2)
    experiment = FakeExperiment(
        tmp_path, batches=batches, accumulation_steps=2, max_iter=3, log_period=3, test_names=()
    )
    trainer = Trainer(experiment)
    trainer.train()
    assert experiment.built_models[0].calls == 6
    assert len(trainer.storage.history("total_loss").values()) == 3
    (row,) = rows(tmp_path)
    assert row["images_per_second"] * row["time"] == pytest.approx(4)


def test_seeded_runs_end_with_identical_weights(tmp_path):
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        Trainer(FakeExperiment(tmp_path / name, seed=seed, norm=True, test_names=())).train()
        runs.append(weights(tmp_path / name / "model_final.pth"))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0]["stem.weight"], runs[2]["stem.weight"])


def test_initial_weights_are_loaded(tmp_path):
    first = Trainer(FakeExperiment(tmp_path / "a", test_names=()))
    first.train()
    path = str(tmp_path / "a" / "model_final.pth")
    second = Trainer(FakeExperiment(tmp_path / "b", init_checkpoint=path, seed=7))
    assert_equal(second.model.state_dict(), first.model.state_dict())
    assert second.completed == 0
    pickled = tmp_path / "a.pkl"
    pickled.write_bytes(pickle.dumps({"model": first.model.state_dict()}))
    with pytest.raises(UserError, match="allow_pickle"):
        Trainer(FakeExperiment(tmp_path / "d", init_checkpoint=str(pickled)))
    Trainer(FakeExperiment(tmp_path / "e", init_checkpoint=str(pickled), allow_pickle=True))
    with pytest.raises(UserError, match="does not exist"):
        Trainer(FakeExperiment(tmp_path / "c", init_checkpoint=str(tmp_path / "none.pth")))


@pytest.mark.parametrize("ema_eval", [True, False])
def test_averaged_weights_equal_the_recurrence_and_are_evaluated_and_saved(tmp_path, ema_eval):
    settings = {"batches": make_batches(1, 4), "norm": True, "max_iter": 5}
    plain = Trainer(FakeExperiment(tmp_path / "plain", checkpoint_period=1, **settings))
    initial = {name: value.clone() for name, value in plain.model.state_dict().items()}
    plain.train()
    expected = initial
    for iteration in range(5):
        raw = weights(tmp_path / "plain" / f"model_{iteration:07d}.pth")
        for name, value in raw.items():
            mean = 0.8 * expected[name] + 0.2 * value
            expected[name] = mean if value.is_floating_point() else value

    trainer = Trainer(
        FakeExperiment(
            tmp_path / "ema", ema_enabled=True, ema_decay=0.8, ema_eval=ema_eval, **settings
        )
    )
    results = trainer.train()
    content = checkpoint.read(tmp_path / "ema" / "model_final.pth")
    for name, value in expected.items():
        torch.testing.assert_close(content["ema"]["weights"][name], value)
    # training itself is not touched, and "model" is what the evaluation used
    assert_equal(content.get("train_model", content["model"]), raw)
    assert_equal(content["model"], content["ema"]["weights"] if ema_eval else raw)
    fresh = FakeExperiment(tmp_path / "fresh", norm=True)
    model = fresh.build_model().eval()
    checkpoint.load_weights(model, tmp_path / "ema" / "model_final.pth")
    outputs = [model(batch)[0]["value"].sum().item() for batch in fresh.build_test_loader("")]
    assert results["first"]["fake"]["score"] == pytest.approx(sum(outputs) / 4, rel=1e-5)


def test_best_checkpoint_and_early_stop(tmp_path):
    script = [1.0, 5.0, 4.0, float("nan"), 3.0, 9.0]
    experiment = FakeExperiment(
        tmp_path,
        script=script,
        max_iter=20,
        eval_period=2,
        best_metric="fake/score",
        early_stop_patience=3,
        checkpoint_period=2,
    )
    trainer = Trainer(experiment)
    trainer.train()
    assert script == [9.0]
    assert trainer.completed == 10
    assert "no better fake/score in 3 evaluations" in trainer.stop_reason
    assert_equal(weights(tmp_path / "model_best.pth"), weights(tmp_path / "model_0000003.pth"))
    final = checkpoint.read(tmp_path / "model_final.pth")
    assert final["iteration"] == 9
    assert final["hooks"]["PeriodicEvaluation"]["best"]["value"] == 5.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert [row["iteration"] for row in rows(tmp_path)][-1] == 9


@pytest.mark.parametrize("change", [{"best_metric": "fake/score-per-class"}, {"best_mode": "min"}])
def test_patience_starts_anew_with_another_goal(tmp_path, change):
    settings = {
        "best_metric": "fake/score",
        "early_stop_patience": 2,
        "eval_period": 2,
        "max_iter": 20,
    }
    first = Trainer(FakeExperiment(tmp_path, script=[3.0, 2.0, 2.0], **settings))
    first.train()
    assert first.completed == 6
    again = Trainer(FakeExperiment(tmp_path, script=[2.0] * 9, **settings | change), resume=True)
    again.train()
    assert again.completed == 12  # a new best at 8, and two evaluations more


def test_lower_can_be_better_and_a_wrong_metric_is_named(tmp_path):
    settings = {"eval_period": 2, "best_mode": "min", "best_metric": "fake/score"}
    trainer = Trainer(FakeExperiment(tmp_path / "a", script=[3.0, 1.0, 2.0], **settings))
    trainer.train()
    assert checkpoint.read(tmp_path / "a" / "model_best.pth")["iteration"] == 3
    settings["best_metric"] = "fake/scor"
    with pytest.raises(UserError, match="did you mean 'fake/score'"):
        Trainer(FakeExperiment(tmp_path / "b", **settings)).train()


def test_several_test_sets_are_evaluated_each_under_its_name(tmp_path):
    experiment = FakeExperiment(
        tmp_path, test_names=("a", "b"), best_metric="b/fake/score", eval_period=3
    )
    results = Trainer(experiment).train()
    assert set(results) == {"a", "b"}
    assert (tmp_path / "model_best.pth").is_file()
    assert {"a/fake/score", "b/fake/score"} <= set(rows(tmp_path)[-1])


def test_a_crash_in_an_evaluation_loses_no_training_and_resuming_repeats_it(tmp_path):
    settings = {"eval_period": 4, "checkpoint_period": 4, "best_metric": "fake/score"}
    trainer = Trainer(FakeExperiment(tmp_path, script=[], **settings))
    with pytest.raises(IndexError):
        trainer.train()
    resumed = Trainer(FakeExperiment(tmp_path, script=[2.0, 1.0], **settings), resume=True)
    assert resumed.completed == 4
    resumed.train()
    assert checkpoint.read(tmp_path / "model_best.pth")["iteration"] == 3


def test_evaluation_leaves_training_mode_and_step_time_alone(tmp_path):
    import time

    experiment = FakeExperiment(tmp_path, eval_period=1, max_iter=3, log_period=1)
    load = experiment.build_test_loader
    experiment.build_test_loader = lambda name: time.sleep(0.3) or load(name)
    trainer = Trainer(experiment)
    trainer.train()
    assert trainer.model.training
    assert all(row["time"] < 0.25 for row in rows(tmp_path))


def test_channels_last_reaches_weights_and_features(tmp_path):
    trainer = Trainer(FakeExperiment(tmp_path, channels_last=True, test_names=()))
    layouts = []
    trainer.model.stem.register_forward_hook(
        lambda module, inputs, output: layouts.append(
            output.is_contiguous(memory_format=torch.channels_last)
        )
    )
    trainer.train()
    assert layouts == [True] * 6
    assert trainer.model.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_is_opt_in_and_changes_no_result(tmp_path, monkeypatch):
    import functools

    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    runs = []
    for enabled in (False, True):
        trainer = Trainer(FakeExperiment(tmp_path / str(enabled), compile=enabled))
        assert (trainer.model._compiled_call_impl is not None) == enabled
        trainer.train()
        runs.append(weights(tmp_path / str(enabled) / "model_final.pth"))
    assert set(runs[0]) == set(runs[1])
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value)


def test_an_empty_training_loader_is_said(tmp_path):
    experiment = FakeExperiment(tmp_path)
    experiment.build_train_loader = lambda **stream: []
    with pytest.raises(UserError, match="no batch"):
        Trainer(experiment).train()


def test_a_new_run_sets_the_metrics_of_an_earlier_one_aside(tmp_path):
    for earlier in ([], ["metrics-1.json"], ["metrics-1.json", "metrics-2.json"]):
        Trainer(FakeExperiment(tmp_path, test_names=())).train()
        assert sorted(f.name for f in tmp_path.glob("metrics-*")) == earlier
        assert [row["iteration"] for row in rows(tmp_path)] == [2, 5]


class ScriptedLoss(TinyModel):
    """Its loss is a TorchScript function of its own, which PyTorch profiles in its first calls."""

    def __init__(self):
        super().__init__()
        code = sigmoid_focal_loss.__code__
        own = types.FunctionType(code, sigmoid_focal_loss.__globals__, "own_focal_loss")
        own.__annotations__ = sigmoid_focal_loss.__annotations__
        self.focal_loss = torch.jit.script(own)
        generator = torch.Generator().manual_seed(0)
        self.scores = nn.Parameter(torch.randn(5000, 3, generator=generator))
        self.targets = (torch.rand(5000, 3, generator=generator) > 0.9).float()
        self.seen = []
        self.scores.register_hook(lambda gradient: self.seen.append(gradient.clone()))

    def forward(self, batch):
        losses = super().forward(batch)
        loss = self.focal_loss(self.scores, self.targets, 0.25, 2.0, "sum")
        return losses | {"loss_focal": loss}


def test_scripted_losses_have_the_same_bits_in_their_first_calls_and_later(tmp_path):
    """With a rate of zero nothing changes, so every step must give the same gradient."""
    experiment = FakeExperiment(
        tmp_path, test_names=(), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0)
    )
    experiment.build_model = ScriptedLoss
    trainer = Trainer(experiment)
    trainer.train()
    first, *others = trainer.model.seen
    assert len(others) == 5
    assert first.abs().sum() > 0
    assert all(torch.equal(first, each) for each in others)
