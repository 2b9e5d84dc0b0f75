"""Running out of memory: what counts as that, and which remedies are named."""

from __future__ import annotations

import pytest
import torch

from d2dense.engine.memory import evaluation_levers, explained_shortage, training_levers
from d2dense.engine.settings import RunSettings
from d2dense.engine.trainer import Trainer
from d2dense.errors import UserError
from tests.engine.fakes import FakeExperiment

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.2 GiB is free.\nProcess 1 has 77 GiB memory in use."
)
ABSURD = 2**58


def settings(**changes):
    return RunSettings(output_dir="unused", max_iter=1, **changes)


def names(**changes):
    return [lever.yacs.split()[0] for lever in training_levers(settings(**changes))]


def explain(error):
    with explained_shortage("here", evaluation_levers()):
        raise error


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), "asked for another 2.50 GiB"),
        (RuntimeError("CUDA error: out of memory"), ""),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (MemoryError(), ""),
    ],
)
def test_every_shortage_is_one_line(error, asked):
    with pytest.raises(UserError, match="out of memory here") as found:
        explain(error)
    assert asked in str(found.value)
    assert "INPUT.MAX_SIZE_TEST / dataloader.test.mapper.augmentations.max_size" in str(found.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("memory")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)):
        explain(error)


def test_a_real_shortage_on_the_cpu_in_forward_backward_build_and_evaluation(tmp_path):
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient + torch.empty(ABSURD).sum()

    def in_forward(model, batch):
        return torch.empty(ABSURD)

    def in_backward(model, batch):
        return {"loss": Greedy.apply(model.head.weight.sum())}

    def in_evaluation(model, batch):
        if not model.training:
            torch.empty(ABSURD)
        return {"loss": model.head.weight.sum()}

    for name, forward in (
        ("in iteration 0", in_forward),
        ("in iteration 0", in_backward),
        ("in the evaluation", in_evaluation),
    ):
        experiment = FakeExperiment(tmp_path)
        trainer = Trainer(experiment)
        trainer.model.forward = forward.__get__(trainer.model)
        with pytest.raises(UserError, match=rf"out of memory {name} \(asked for another \d+"):
            trainer.train()
    experiment.build_model = lambda: torch.nn.Linear(2**29, 2**29)
    with pytest.raises(UserError, match="out of memory while the model was built"):
        Trainer(experiment)


def test_only_what_is_not_in_use_is_named(monkeypatch):
    amp, recompute = "SOLVER.AMP.ENABLED", "TRAIN.ACTIVATION_CHECKPOINTING"
    parts, batch = "SOLVER.ACCUMULATION_STEPS", "SOLVER.IMS_PER_BATCH"
    images, sharding = "INPUT.MAX_SIZE_TRAIN", "TRAIN.SHARDING"
    assert names() == [amp, recompute, parts, batch, images]
    assert names(amp_enabled=True, activation_checkpointing=True) == [parts, batch, images]
    levers = training_levers(settings(accumulation_steps=2, total_batch_size=8))
    assert "SOLVER.ACCUMULATION_STEPS 4" in [lever.yacs for lever in levers]
    # one image at a time cannot be split
    assert names(accumulation_steps=4, total_batch_size=4) == [amp, recompute, images]
    monkeypatch.setattr("d2dense.engine.memory.comm.get_world_size", lambda: 4)
    assert names(total_batch_size=4) == [amp, recompute, sharding, sharding, images]
    assert names(total_batch_size=4, sharding="zero1") == [amp, recompute, sharding, images]
    assert names(total_batch_size=4, sharding="fsdp") == [amp, recompute, images]
