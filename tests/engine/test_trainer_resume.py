"""Runs that go on: what they take up, what they refuse, what they report."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.engine import HookBase

from d2dense import checkpoint
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine import detectors
from tests.engine.comparing import assert_equal, rows
from tests.engine.fakes import FakeExperiment, make_batches


class Stop(Exception):
    pass


def interrupt(trainer, *, after):
    """Let ``trainer`` fail in the step after ``after`` completed ones, as a crash would."""
    step = trainer.step

    def failing(batches, **kwargs):
        if trainer.completed == after:
            raise Stop
        return step(batches, **kwargs)

    failing.model, failing.scaler, failing.guard = step.model, step.scaler, step.guard
    trainer.step = failing
    with pytest.raises(Stop):
        trainer.train()


def test_resume_goes_on_where_the_last_checkpoint_was(tmp_path):
    batches = [make_batches(1, 4)[0]]  # one batch: the order of the data plays no part
    settings = {
        "batches": batches,
        "norm": True,
        "max_iter": 8,
        "checkpoint_period": 2,
        "ema_enabled": True,
        "ema_decay": 0.9,
        "ema_warmup": True,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "test_names": (),
    }
    Trainer(FakeExperiment(tmp_path / "whole", **settings)).train()
    interrupt(Trainer(FakeExperiment(tmp_path / "parts", **settings)), after=5)
    trainer = Trainer(FakeExperiment(tmp_path / "parts", **settings), resume=True)
    assert trainer.completed == 4
    trainer.train()
    whole = checkpoint.read(tmp_path / "whole" / "model_final.pth")
    parts = checkpoint.read(tmp_path / "parts" / "model_final.pth")
    for key in ("model", "train_model"):
        assert_equal(parts[key], whole[key])
    assert_equal(parts["ema"]["weights"], whole["ema"]["weights"])
    assert parts["ema"]["updates"] == whole["ema"]["updates"] == 8
    assert [row["iteration"] for row in rows(tmp_path / "parts")] == [2, 5, 7]


def test_resume_without_a_checkpoint_starts_anew_and_a_finished_run_stays(tmp_path):
    experiment = FakeExperiment(tmp_path, test_names=())
    Trainer(experiment, resume=True).train()
    before = (tmp_path / "model_final.pth").stat().st_mtime_ns
    again = Trainer(FakeExperiment(tmp_path, test_names=()), resume=True)
    assert again.completed == 6
    again.train()
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="does not fit this config"):
        Trainer(FakeExperiment(tmp_path, norm=True), resume=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, 0.9, weight_decay=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.3)


@pytest.mark.parametrize(("before", "after"), [(sgd, adamw), (adamw, sgd)])
def test_another_optimizer_cannot_go_on(tmp_path, before, after):
    Trainer(FakeExperiment(tmp_path, test_names=(), optimizer=before)).train()
    names = rf"trained with {before(weight()).__class__.__name__}.*SOLVER.OPTIMIZER"
    with pytest.raises(UserError, match=names):
        Trainer(FakeExperiment(tmp_path, test_names=(), optimizer=after), resume=True)


def weight():
    return [torch.zeros(1, requires_grad=True)]


def test_options_of_the_optimizer_are_those_of_the_present_config(tmp_path):
    """As the learning rates are; the momentum that it has gathered goes on."""
    Trainer(FakeExperiment(tmp_path, test_names=(), optimizer=sgd)).train()
    saved = checkpoint.read(tmp_path / "model_final.pth")["optimizer"]["state"]

    def other(parameters):
        return torch.optim.SGD(parameters, 0.05, 0.8, weight_decay=0.2)

    experiment = FakeExperiment(tmp_path, test_names=(), optimizer=other, max_iter=8)
    trainer = Trainer(experiment, resume=True)
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.2)
    for number, parameter in enumerate(group["params"]):
        found = trainer.optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(found, saved[number]["momentum_buffer"])


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_a_checkpoint_of_another_program_cannot_go_on(tmp_path, has_optimizer):
    """A bare state dict, and what Detectron2's own trainer writes."""
    model = FakeExperiment(tmp_path).build_model()
    content = model.state_dict()
    if has_optimizer:
        content = {"model": content, "optimizer": sgd(model.parameters()).state_dict()}
        content |= {"scheduler": {"last_epoch": 3}, "iteration": 2}
    torch.save(content, tmp_path / "model_0000002.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    with pytest.raises(UserError, match="another program wrote it; load it as initial weights"):
        Trainer(FakeExperiment(tmp_path), resume=True)


class Counter(HookBase):
    """Counts steps, and reports how many there were."""

    count = 0

    def before_step(self):
        self.count += 1

    def after_step(self):
        self.trainer.storage.put_scalar("count", torch.tensor(self.count), smoothing_hint=False)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_hooks_of_users_are_reported_in_time_and_get_their_state_back(tmp_path):
    settings = {"checkpoint_period": 2, "max_iter": 8, "test_names": ()}
    trainer = Trainer(FakeExperiment(tmp_path, **settings))
    trainer.register_hooks([Counter(), None])
    interrupt(trainer, after=5)
    trainer = Trainer(FakeExperiment(tmp_path, **settings), resume=True)
    counter = Counter()
    trainer.register_hooks([counter])
    assert counter.count == 4
    trainer.train()
    assert {row["iteration"]: row["count"] for row in rows(tmp_path)} == {2: 3, 5: 6, 7: 8}


def test_a_saved_state_that_no_hook_takes_is_said(tmp_path, caplog):
    trainer = Trainer(FakeExperiment(tmp_path, test_names=()))
    trainer.register_hooks([Counter()])
    trainer.train()
    Trainer(FakeExperiment(tmp_path, test_names=()), resume=True).train()
    assert "no hook takes the saved state of Counter" in caplog.text


def test_the_normalizer_of_a_dense_detector_goes_on(tmp_path):
    """RetinaNet keeps it in a plain attribute, which no state dict has.

    Losses are equal to rounding only: TorchScript computes the first focal losses of a process in
    another order than the later ones.
    """

    def experiment(folder):
        made = FakeExperiment(folder, test_names=(), checkpoint_period=2, max_iter=4, log_period=1)
        made.batches = [[detectors.image(n, 1 + 3 * n)] for n in range(4)]
        made.build_model = lambda: detectors.build(detectors.retinanet_config())
        made.build_lr_multiplier = lambda: lambda progress: 1e-3
        return made

    Trainer(experiment(tmp_path / "whole")).train()
    interrupt(Trainer(experiment(tmp_path / "parts")), after=3)
    resumed = Trainer(experiment(tmp_path / "parts"), resume=True)
    assert resumed.model.loss_normalizer < 100
    resumed.train()
    found, expected = (
        {row["iteration"]: row["total_loss"] for row in rows(tmp_path / name)}
        for name in ("parts", "whole")
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_reports_after_a_resume_count_the_iterations_that_were_done(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = {"max_iter": 8, "log_period": 4, "checkpoint_period": 4, "eval_period": 4}
    with pytest.raises(IndexError):  # in the evaluation after four steps, before the report
        Trainer(FakeExperiment(tmp_path, script=[], **settings)).train()
    Trainer(FakeExperiment(tmp_path, **settings), resume=True).train()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("iter ")]
    assert [line.split()[1] for line in lines] == ["4/8", "8/8"]


def test_what_a_run_reported_before_its_first_checkpoint_is_not_reported_twice(tmp_path):
    settings = {"log_period": 1, "max_iter": 4, "test_names": ()}
    interrupt(Trainer(FakeExperiment(tmp_path, **settings)), after=2)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1]
    Trainer(FakeExperiment(tmp_path, **settings), resume=True).train()
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2, 3]


def test_only_the_newest_periodic_checkpoints_stay_also_after_resuming(tmp_path):
    settings = {"checkpoint_period": 1, "checkpoint_keep": 2, "max_iter": 6, "test_names": ()}
    interrupt(Trainer(FakeExperiment(tmp_path, **settings)), after=3)
    assert sorted(f.name for f in tmp_path.glob("model_0*")) == [
        "model_0000001.pth",
        "model_0000002.pth",
    ]
    Trainer(FakeExperiment(tmp_path, **settings), resume=True).train()
    assert sorted(f.name for f in tmp_path.glob("model_*")) == [
        "model_0000004.pth",
        "model_0000005.pth",
        "model_final.pth",
    ]
