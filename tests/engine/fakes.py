"""A tiny experiment for tests of the engine; importable, so that spawned processes find it."""

from __future__ import annotations

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from d2dense.engine.settings import RunSettings
from d2dense.solver.schedule import PolyParamScheduler

SIZE = 6


class TinyModel(nn.Module):
    """Two losses in training, one output per image in evaluation.

    ``norm`` adds a BatchNorm, ``unused`` a layer that no loss depends on.
    """

    def __init__(self, *, norm: bool = False, unused: bool = False):
        super().__init__()
        self.unused = nn.Linear(1, 1) if unused else None
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        images = torch.stack([each["image"] for each in batch]).to(self.head.weight.device)
        features = torch.relu(self.norm(self.stem(images))).mean(dim=(2, 3))
        outputs = self.head(features)
        if not self.training:
            return [{"value": output} for output in outputs]
        target = torch.stack([each["target"] for each in batch]).to(outputs)
        # means over the batch, so that two half batches average to the whole one
        errors = (outputs.float() - target).square().mean(dim=0)
        return {"loss_first": errors[0], "loss_second": errors[1]}


class FakeEvaluator(DatasetEvaluator):
    """Report the mean output; ``script`` replaces it by given values, one per evaluation."""

    def __init__(self, script=None):
        self.script = script

    def reset(self):
        self.values = []

    def process(self, inputs, outputs):
        self.values += [float(output["value"].sum()) for output in outputs]

    def evaluate(self):
        values = [value for part in comm.all_gather(self.values) for value in part]
        value = sum(values) / len(values)
        if self.script is not None:
            value = self.script.pop(0)
        return {"fake": {"score": value, "score-per-class": 1.0}} if comm.is_main_process() else {}


def make_batches(count: int, size: int, *, seed: int = 0) -> list[list[dict]]:
    """Return ``count`` batches of ``size`` images, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            {
                "image": torch.randn(3, SIZE, SIZE, generator=generator),
                "target": torch.randn(2, generator=generator),
                "image_id": index * size + each,
                "height": SIZE,
                "width": SIZE,
            }
            for each in range(size)
        ]
        for index in range(count)
    ]


class FakeExperiment:
    """What the trainer needs of an experiment, without a config.

    Args:
        batches: training batches of all processes; each takes its equal share.
        script: values that the test set's ``fake/score`` takes, one per evaluation.
    """

    def __init__(
        self,
        output_dir,
        *,
        batches=None,
        norm=False,
        unused=False,
        test_names=("first",),
        script=None,
        optimizer=None,
        **settings,
    ):
        settings = {"max_iter": 6, "seed": 3, "device": "cpu", "log_period": 3, **settings}
        self.settings = RunSettings(output_dir=str(output_dir), **settings)
        self.batches = batches or make_batches(4, 4)
        self.norm = norm
        self.unused = unused
        self.test_names = list(test_names)
        self.script = script
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.05, 0.9))
        self.built_models = []

    def build_model(self):
        self.built_models.append(TinyModel(norm=self.norm, unused=self.unused))
        return self.built_models[-1].to(self.settings.device)

    def for_tests(self, model):
        return model

    def build_optimizer(self, model):
        return self.optimizer(model.parameters())

    def build_lr_multiplier(self):
        return PolyParamScheduler(power=1.0)

    def build_train_loader(self, *, seed=None, start_batch=0):
        rank, world = comm.get_rank(), comm.get_world_size()
        start = start_batch % len(self.batches)
        ordered = self.batches[start:] + self.batches[:start]
        return [batch[rank::world] for batch in ordered]

    def build_test_loader(self, name):
        batches = make_batches(4, 1, seed=9)
        return batches[comm.get_rank() :: comm.get_world_size()]

    def build_evaluator(self, name, output_dir):
        return FakeEvaluator(self.script)
