"""Runs that are stopped again and again, in any way, end as one that nothing stopped."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine.signals import Preempted
from d2dense.engine.trainer import Trainer
from tests.engine.fakes import FakeExperiment, make_batches
from tests.tools.interrupted import assert_same

TIMED = ("time", "data_time", "eta_seconds", "images_per_second", "max_mem_mb")
SETTINGS = {
    "max_iter": 11,
    "eval_period": 4,
    "log_period": 3,
    "checkpoint_period": 3,
    "checkpoint_keep": 2,
    "accumulation_steps": 2,
    "norm": True,
    "ema_enabled": True,
    "ema_decay": 0.7,
    "best_metric": "fake/score",
}
VARIANTS = {
    "plain": {},
    "with steps left out": {"non_finite_policy": "skip"},
    "reports across checkpoints": {"log_period": 5, "eval_period": 3, "checkpoint_period": 4},
    "everything at every step": {"log_period": 1, "eval_period": 1, "checkpoint_period": 1},
}
# (how, where), one for each attempt: signals before and during a step, or before an evaluation,
# and crashes; steps and evaluations are counted from the beginning of the attempt
PLANS = {
    "a signal before each step": [("before", 0)] * 12,
    "a signal in each step": [("during", 0)] * 12,
    "each evaluation interrupted, twice": [("evaluation", 0), ("evaluation", 0)] * 4,
    **{f"anything, {seed}": None for seed in range(3)},
}


class Crash(Exception):
    pass


def plan(name):
    if PLANS[name] is not None:
        return PLANS[name]
    draw = random.Random(int(name.rpartition(" ")[2]))
    kinds = ("before", "during", "evaluation", "crash")
    return [(draw.choice(kinds), draw.randrange(5)) for _ in range(12)]


def build(folder, variant, *, resume=False):
    batches = make_batches(7, 4)
    if variant == "with steps left out":
        batches[3][1]["target"] = torch.tensor([math.nan, 0.0])
    settings = {**SETTINGS, **VARIANTS[variant], "batches": batches}
    return Trainer(FakeExperiment(folder, **settings), resume=resume)


def interrupt(trainer, how, where):
    """Let something happen to the attempt of ``trainer``."""
    step, evaluate, start, evaluations = trainer.step, trainer.evaluate, trainer.completed, []

    def stepping(batches, *, iteration, stop):
        here = iteration - start == where
        if here and how == "crash":
            raise Crash
        if here and how == "before":
            trainer.stop_request.signal = "SIGTERM"
        result = step(batches, iteration=iteration, stop=bool(trainer.stop_request))
        if here and how == "during":
            trainer.stop_request.signal = "SIGTERM"
        return result

    def evaluating():
        if how == "evaluation" and len(evaluations) == where:
            trainer.stop_request.signal = "SIGTERM"
        evaluations.append(None)
        return evaluate()

    stepping.scaler, stepping.guard = step.scaler, step.guard
    trainer.step, trainer.evaluate = stepping, evaluating


def run(folder, variant, attempts):
    for number, (how, where) in enumerate([*attempts, ("not at all", 0)]):
        trainer = build(folder, variant, resume=number > 0)
        interrupt(trainer, how, where)
        try:
            trainer.train()
        except (Crash, Preempted):
            continue
        return number
    raise AssertionError("the last attempt did not end")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for variant in VARIANTS:
        build(folder / variant, variant).train()
    return folder


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    found = [{k: v for k, v in row.items() if k not in TIMED} for row in found]
    return sorted(found, key=lambda row: row["iteration"])


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_ends_as_if_nothing_had_happened(whole, tmp_path, variant, name):
    assert run(tmp_path, variant, plan(name)) > 1
    for file in ("model_final.pth", "model_best.pth"):
        contents = [checkpoint.read(folder / file) for folder in (tmp_path, whole / variant)]
        assert_same(*contents, file)
    assert rows(tmp_path) == rows(whole / variant)
