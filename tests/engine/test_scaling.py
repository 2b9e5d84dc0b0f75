"""Learning rates that follow the batch, and what is said when the number of processes changes."""

from __future__ import annotations

import logging

import pytest
import torch

from d2dense import config
from d2dense.engine.experiment import YamlExperiment
from d2dense.engine.scaling import lr_factor, scale_learning_rates, world_change_message
from d2dense.engine.settings import RunSettings
from d2dense.errors import UserError


def settings(**changes):
    return RunSettings(output_dir="x", max_iter=1, **changes)


def optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 0.01))])


@pytest.mark.parametrize(
    ("rule", "batch", "expected"),
    [("none", 64, 1.0), ("linear", 64, 4.0), ("sqrt", 64, 2.0), ("linear", 4, 0.25)],
)
def test_rates_follow_the_batch(rule, batch, expected, caplog):
    caplog.set_level(logging.INFO)
    chosen = settings(lr_rule=rule, total_batch_size=batch, reference_batch_size=16)
    assert lr_factor(chosen) == expected
    scaled = optimizer()
    scale_learning_rates(scaled, chosen)
    assert [g["lr"] for g in scaled.param_groups] == pytest.approx(
        [0.1 * expected, 0.01 * expected]
    )
    lines = [record.getMessage() for record in caplog.records]
    if rule == "none":
        assert not lines
    else:
        assert lines == [
            f"learning rates times {expected:g}: rule {rule}, {batch} images per step, meant for "
            f"16; the largest is {0.1 * expected:g}"
        ]


def test_a_rule_needs_the_batch():
    assert lr_factor(settings()) == 1.0  # no rule, no batch: nothing to know
    with pytest.raises(UserError, match=r"'sqrt'.*SOLVER\.IMS_PER_BATCH / dataloader"):
        scale_learning_rates(optimizer(), settings(lr_rule="sqrt"))


def place(world, batch, steps=1):
    return {"world_size": world, "total_batch_size": batch, "accumulation_steps": steps}


@pytest.mark.parametrize(
    ("saved", "now", "rule", "words"),
    [
        (
            place(8, 16),
            place(2, 16, 4),
            "none",
            [
                "8 processes of 2 images (16 per step)",
                "2 processes of 2 images 4 times (16 per step)",
                "learning rates and the order of the images stay",
            ],
        ),
        (
            place(2, 8),
            place(1, 4),
            "none",
            [
                "with 1 process of 4 images (4 per step)",
                "learning rates stay those of the config (SOLVER.LR_SCALING.RULE",
                "4 instead of 8 images per step",
            ],
        ),
        (place(2, 8), place(2, 4), "sqrt", ["learning rates follow the batch by the rule sqrt"]),
        (place(2, 0), place(1, 0), "none", ["the run used 2 processes and goes on with 1 process"]),
        (place(2, 0), place(2, 4), "none", ["4 instead of other images per step"]),
    ],
)
def test_what_another_number_of_processes_means(saved, now, rule, words):
    message = world_change_message(saved, now, rule=rule)
    assert "\n" not in message
    for each in words:
        assert each in message


def test_nothing_to_say_when_nothing_changed():
    assert world_change_message(place(4, 8), place(4, 8)) is None
    # the same images and rates: only the memory per process differs
    assert world_change_message(place(4, 8, 2), place(4, 8)) is None


def yaml_config(**solver):
    cfg = config.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.CLASS_COUNT = "check"
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    cfg.TEST.EVAL_PERIOD = 1
    return cfg


REFERENCE = {
    "REFERENCE_WORLD_SIZE": 8,
    "IMS_PER_BATCH": 16,
    "BASE_LR": 0.1,
    "MAX_ITER": 5000,
    "STEPS": (4000,),
    "WARMUP_ITERS": 100,
    "CHECKPOINT_PERIOD": 1000,
}


def test_detectron2s_reference_world_size(monkeypatch, caplog):
    """The numbers are those of Detectron2's own documentation of the key."""
    caplog.set_level(logging.INFO)
    cfg = yaml_config(**REFERENCE)
    before = cfg.dump()
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 16)
    exp = YamlExperiment(cfg)
    assert cfg.dump() == before
    solver, run = exp.cfg.SOLVER, exp.settings
    assert (run.total_batch_size, solver.BASE_LR, run.max_iter) == (32, pytest.approx(0.2), 2500)
    assert (solver.STEPS, solver.WARMUP_ITERS, run.checkpoint_period) == ((2000,), 50, 500)
    assert solver.REFERENCE_WORLD_SIZE == 16  # the saved config gives the same run again
    assert run.eval_period == 1  # and not 0, which is never
    caplog.clear()
    optimizer = exp.build_optimizer(torch.nn.Linear(1, 1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert line.startswith("SOLVER.REFERENCE_WORLD_SIZE 8, 16 processes: ")
    assert "SOLVER.IMS_PER_BATCH 16 -> 32" in line
    assert "SOLVER.MAX_ITER 5000 -> 2500" in line


def test_as_many_processes_as_the_reference_change_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for world, reference in ((8, 8), (3, 0)):
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda world=world: world)
        exp = YamlExperiment(yaml_config(**{**REFERENCE, "REFERENCE_WORLD_SIZE": reference}))
        assert (exp.settings.total_batch_size, exp.settings.max_iter) == (16, 5000)
        exp.build_optimizer(torch.nn.Linear(1, 1))
    assert not caplog.records


def test_reference_world_sizes_that_cannot_work():
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 16 cannot be shared by .* 3 processes"):
        YamlExperiment(yaml_config(**{**REFERENCE, "REFERENCE_WORLD_SIZE": 3}))
    cfg = yaml_config(**REFERENCE)
    cfg.SOLVER.LR_SCALING.RULE = "linear"
    with pytest.raises(UserError, match="would both scale the learning rate"):
        YamlExperiment(cfg)
