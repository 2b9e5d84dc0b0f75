"""Steps that are not finite: found before the optimizer moves, by all processes."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine.guard import NonFiniteError
from d2dense.engine.launch import launch
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine import workers
from tests.engine.fakes import FakeExperiment, TinyModel, make_batches

BAD_IMAGE = 6  # in the second batch of make_batches(4, 4)


def named(batches, bad=(BAD_IMAGE,), value=float("nan")):
    """Give the images file names, and the ``bad`` ones targets that break the loss."""
    for batch in batches:
        for each in batch:
            each["file_name"] = f"photos/{each['image_id']}.jpg"
            if each["image_id"] in bad:
                each["target"] = torch.tensor([value, 0.0])
    return batches


def build(folder, **settings):
    settings = {"batches": named(make_batches(4, 4)), "test_names": (), **settings}
    return Trainer(FakeExperiment(folder, **settings))


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_raise_names_loss_iteration_and_files_and_the_weights_stay(tmp_path, value):
    trainer = build(tmp_path, batches=named(make_batches(4, 4), value=value))
    before = []
    step = trainer.step
    trainer.step = lambda *a, **k: (before.append(copies(trainer.model)), step(*a, **k))[1]
    trainer.step.guard, trainer.step.scaler = step.guard, step.scaler
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "\n" not in message
    for part in ("iteration 1", "loss_first", "photos/6.jpg", "photos/4.jpg", "non_finite.policy"):
        assert part in message, part
    assert "photos/3.jpg" not in message
    assert "loss_second" not in message
    assert len(before) == 2
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[-1][name])


def test_skip_leaves_out_exactly_the_bad_steps(tmp_path, caplog):
    """The run equals one whose optimizer never sees that batch; statistics of norms as well."""
    caplog.set_level(logging.WARNING)
    settings = {"max_iter": 5, "norm": True, "ema_enabled": True, "ema_decay": 0.5}
    good = make_batches(4, 4)
    skipping = build(
        tmp_path / "skip", batches=named(make_batches(4, 4)), non_finite_policy="skip", **settings
    )
    skipping.train()
    plain = build(tmp_path / "plain", batches=good, **settings)
    step = plain.step

    def without_the_second(batches, *, iteration, stop):
        if iteration != 1:
            return step(batches, iteration=iteration, stop=stop)
        next(batches)
        return type(plain.result)(losses={}, images=4, data_seconds=0.0, applied=False)

    without_the_second.guard, without_the_second.scaler = step.guard, step.scaler
    plain.step = without_the_second
    plain.train()
    contents = [checkpoint.read(tmp_path / f / "model_final.pth") for f in ("skip", "plain")]
    for key in ("model", "train_model"):
        for name, value in contents[1][key].items():
            assert torch.equal(contents[0][key][name], value), name
    assert contents[0]["ema"]["updates"] == contents[1]["ema"]["updates"] == 4
    assert contents[0]["skipped_steps"] == 1
    (warning,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "iteration 1" in warning
    assert "photos/6.jpg" in warning
    lines = (tmp_path / "skip" / "metrics.json").read_text().splitlines()
    assert all(json.loads(line)["total_loss"] > 0 for line in lines)  # never NaN


def test_skip_has_a_cap_that_a_resume_remembers(tmp_path):
    always = named(make_batches(4, 4), bad=range(16))
    settings = {"batches": always, "non_finite_policy": "skip", "max_skipped_steps": 2}
    with pytest.raises(NonFiniteError, match=r"iteration 2.*3 steps.*more than.*max_skips = 2"):
        build(tmp_path / "a", **settings).train()
    some = named(make_batches(6, 4), bad=(4, 17))
    settings = {"batches": some, "max_iter": 6, "checkpoint_period": 3, **settings}
    settings |= {"batches": some, "max_skipped_steps": 1}
    with pytest.raises(NonFiniteError, match="iteration 4"):
        build(tmp_path / "b", **settings).train()
    again = Trainer(FakeExperiment(tmp_path / "b", **{**settings, "test_names": ()}), resume=True)
    assert again.completed == 3
    with pytest.raises(NonFiniteError, match="iteration 4"):
        again.train()


def test_a_bad_part_of_an_accumulated_step_counts(tmp_path):
    parts = [half for batch in named(make_batches(4, 4)) for half in (batch[:2], batch[2:])]
    trainer = build(tmp_path, batches=parts, accumulation_steps=2)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert "iteration 1" in str(caught.value)
    assert "photos/6.jpg, photos/7.jpg" in str(caught.value)
    assert "photos/4.jpg" not in str(caught.value)


class BadGradient(TinyModel):
    """Its loss is finite and its gradient is not: the square root at zero."""

    def forward(self, batch):
        losses = super().forward(batch)
        if self.training and batch[0]["image_id"] == 4:
            losses["loss_root"] = (self.head.weight.sum() * 0).sqrt()
        return losses


class Raising(TinyModel):
    """As Detectron2's proposal generator when it meets NaN."""

    def forward(self, batch):
        if self.training and batch[0]["image_id"] == 4:
            raise FloatingPointError("Predicted boxes contain NaN. Training has diverged.")
        return super().forward(batch)


def of(model, experiment):
    experiment.build_model = lambda: model()
    return experiment


def test_gradients_are_looked_at_when_steps_may_be_left_out(tmp_path):
    batches = named(make_batches(4, 4), bad=())
    experiment = FakeExperiment(
        tmp_path, batches=batches, test_names=(), non_finite_policy="skip", max_iter=4
    )
    trainer = Trainer(of(BadGradient, experiment))
    trainer.train()
    assert trainer.step.guard.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_message_does_not_call_broken_weights_good(tmp_path):
    """The gradient of one step breaks them, the loss of the next one shows it."""
    batches = named(make_batches(4, 4), bad=())
    experiment = FakeExperiment(tmp_path, batches=batches, test_names=(), max_iter=4)
    with pytest.raises(
        NonFiniteError, match=r"iteration 2: .*not finite any more.*last checkpoint"
    ):
        Trainer(of(BadGradient, experiment)).train()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    batches = named(make_batches(4, 4), bad=())
    experiment = FakeExperiment(
        tmp_path, batches=batches, test_names=(), checkpoint_period=1, max_iter=4
    )
    with pytest.raises(NonFiniteError, match=r"weights are NaN.*not.*saved"):
        Trainer(of(BadGradient, experiment)).train()
    content = checkpoint.read(tmp_path / "model_0000000.pth")
    assert not (tmp_path / "model_0000001.pth").exists()
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    assert checkpoint.CheckpointFolder(tmp_path).resume()[1]["iteration"] == 0


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_forward_pass_that_finds_nan_itself(tmp_path, policy):
    batches = named(make_batches(4, 4), bad=())
    experiment = FakeExperiment(
        tmp_path, batches=batches, test_names=(), non_finite_policy=policy, max_iter=4
    )
    trainer = Trainer(of(Raising, experiment))
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"forward_pass.*photos/4.jpg"):
            trainer.train()
        assert trainer.completed == 1
    else:
        trainer.train()
        assert trainer.completed == 4
        assert trainer.step.guard.skipped == 1


def test_loss_scaling_that_leaves_every_step_out_ends_the_run(tmp_path):
    """Its losses are finite and its gradients never are: the scale is halved to nothing."""
    batches = [batch for batch in make_batches(4, 4) if batch[0]["image_id"] == 4]
    experiment = FakeExperiment(
        tmp_path, batches=batches, test_names=(), max_iter=100, log_period=10
    )
    trainer = Trainer(of(BadGradient, experiment))
    trainer.step.scaler = torch.amp.GradScaler("cpu")  # float16 itself needs a GPU
    with pytest.raises(NonFiniteError, match=r"iteration 49: the loss scale .*AMP.DTYPE"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_constant_losses_and_frozen_models_are_no_obstacle(tmp_path):
    """A loss without a gradient beside one with; buffers of every type."""

    class Odd(TinyModel):
        def __init__(self):
            super().__init__(norm=True)
            self.register_buffer("flag", torch.tensor(True))

        def forward(self, batch):
            losses = super().forward(batch)
            return losses | {"loss_count": torch.tensor(3)} if self.training else losses

    experiment = FakeExperiment(tmp_path, test_names=(), non_finite_policy="skip", max_iter=2)
    trainer = Trainer(of(Odd, experiment))
    trainer.train()
    assert trainer.completed == 2


def test_two_processes_stop_or_go_on_together(tmp_path):
    """NaN on the second process only; both hear of it in the same step."""
    for policy in ("raise", "skip"):
        (tmp_path / policy).mkdir()
    launch(workers.bad_on_the_second, workers.arguments(output_dir=str(tmp_path)))
    notes = [json.loads((tmp_path / f"note{rank}.json").read_text()) for rank in range(2)]
    for note in notes:
        assert note["raise"]["completed"] == 1
        assert "iteration 1" in note["raise"]["message"]
        assert "process 1" in note["raise"]["message"]
        assert "photos/" in note["raise"]["message"]
        assert note["raise"]["moved"] is False
        assert note["skip"]["completed"] == 6
        assert note["skip"]["skipped"] == 1
        assert note["skip"]["message"] == ""
        assert note["forward"]["skipped"] == 1
    assert notes[0]["raise"]["message"] == notes[1]["raise"]["message"]
    assert notes[0]["skip"]["sum"] == notes[1]["skip"]["sum"]
