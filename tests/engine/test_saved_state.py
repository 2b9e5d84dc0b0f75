"""A checkpoint whose parts are of other types is named before anything is used."""

from __future__ import annotations

import copy

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine.fakes import FakeExperiment

SETTINGS = {"max_iter": 4, "checkpoint_period": 2, "ema_enabled": True, "test_names": ()}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    Trainer(FakeExperiment(folder, **{**SETTINGS, "max_iter": 2})).train()
    return checkpoint.read(folder / "model_0000001.pth")


def resume(content, folder):
    checkpoint.write(folder / "model_0000001.pth", content)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    return Trainer(FakeExperiment(folder, **SETTINGS), resume=True)


def test_what_was_saved_is_taken(content, tmp_path):
    trainer = resume(content, tmp_path)
    trainer.train()
    assert trainer.completed == 4


def test_a_history_without_values_is_none(content, tmp_path):
    emptied = copy.deepcopy(content)
    emptied["hooks"]["StepRecord"]["recent"]["loss_first"].clear()
    trainer = resume(emptied, tmp_path)
    trainer.train()
    assert trainer.completed == 4


SPOILED = {
    "iteration of text": (lambda c: c.update(iteration="1"), "iteration is '1'"),
    "negative iteration": (lambda c: c.update(iteration=-7), "iteration is -7"),
    "images of text": (lambda c: c["progress"].update(images="many"), r"progress\.images"),
    "negative seed": (lambda c: c["progress"].update(seed=-1), r"progress\.seed"),
    "no progress": (lambda c: c.update(progress=None), "progress is a NoneType"),
    "skipped steps": (lambda c: c.update(skipped_steps=None), "skipped_steps"),
    "no random state": (lambda c: c["random"].__setitem__(0, True), r"random\.0 is a bool"),
    "random state of another kind": (
        lambda c: c["random"][0].update(python=[3, 4]),
        "cannot resume",
    ),
    "random words that are no whole numbers": (
        lambda c: c["random"][0]["numpy"].__setitem__(1, torch.full((624,), float("nan"))),
        "numpy's random state has torch.float32 words",
    ),
    "short random state": (lambda c: c["random"][0].update(torch=torch.zeros(3)), "cannot resume"),
    "a part that would hide a method": (
        lambda c: c["hooks"]["StepRecord"].update(flush=3),
        r"hooks\.StepRecord",
    ),
    "a count of text": (lambda c: c["hooks"]["StepRecord"].update(steps="x"), r"StepRecord\.steps"),
    "negative seconds": (
        lambda c: c["hooks"]["StepRecord"].update(earlier_seconds=-1e300),
        r"earlier_seconds is -1e\+300, expected seconds",
    ),
    "seconds that are no number": (
        lambda c: c["hooks"]["StepRecord"].update(data_seconds=float("nan")),
        r"data_seconds is nan",
    ),
    "values that are no pairs": (
        lambda c: c["hooks"]["StepRecord"]["recent"]["loss_first"].update(values=[[1.0]]),
        r"values\.0 has 1 entries",
    ),
    "values without a hint": (
        lambda c: c["hooks"]["StepRecord"]["recent"]["loss_first"].pop("smoothed"),
        "lacks smoothed",
    ),
    "evaluations": (
        lambda c: c["hooks"]["PeriodicEvaluation"].update(without_best=[]),
        "without_best",
    ),
    "another shape of an average": (
        lambda c: c["ema"]["weights"].update({"stem.weight": torch.zeros(1)}),
        r"average of stem\.weight",
    ),
    "complex weights": (
        lambda c: c["train_model"].update({"stem.weight": torch.zeros(4, 3, 3, 3) * 1j}),
        r"train_model\.stem\.weight has complex values",
    ),
    "a complex momentum": (
        lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(4, 3, 3, 3) * 1j),
        r"momentum_buffer has complex values",
    ),
    "another shape of a momentum": (
        lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)),
        "momentum_buffer",
    ),
    "a momentum of another name": (
        lambda c: c["optimizer"]["state"].__setitem__(0, {"other": torch.zeros(4, 3, 3, 3)}),
        "same parts",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_other_parts_are_one_line(content, tmp_path, case):
    change, reason = SPOILED[case]
    spoiled = copy.deepcopy(content)
    change(spoiled)
    with pytest.raises(UserError, match=reason):
        resume(spoiled, tmp_path)
