"""Learning-rate curves against their closed forms, through the object that applies them."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.config import instantiate

from d2dense.solver.schedule import LRSchedule, PolyParamScheduler

MAX_ITER, WARMUP, START = 200, 20, 0.1


def rates(node, lrs=(0.5,)):
    """Return the learning rate of each group at every iteration."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    schedule = LRSchedule(torch.optim.SGD(groups, lr=1.0), instantiate(node), max_iter=MAX_ITER)
    found = []
    for iteration in range(MAX_ITER):
        schedule.apply(iteration)
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        assert schedule.lr == max(found[-1])
    return found


def warmed(curve, iteration):
    """Linear from START * curve(0) to the curve's value where the warm-up ends."""
    if iteration >= WARMUP:
        return curve(iteration)
    share = iteration / WARMUP
    return START * curve(0) * (1 - share) + curve(WARMUP) * share


CURVES = {
    "poly": (
        {"power": 0.9, "end_factor": 0.01},
        lambda t: 0.01 + 0.99 * (1 - t / MAX_ITER) ** 0.9,
    ),
    "cosine": (
        {"end_factor": 0.02},
        lambda t: 0.02 + 0.98 * (1 + math.cos(math.pi * t / MAX_ITER)) / 2,
    ),
    "multistep": (
        {"milestones": [100, 150], "gamma": 0.1},
        lambda t: 0.1 ** sum(t >= milestone for milestone in (100, 150)),
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_curve_with_warmup_equals_its_closed_form(name):
    common = pytest.importorskip("d2dense.config.common")
    settings, curve = CURVES[name]
    node = getattr(common, name)(
        max_iter=MAX_ITER, warmup_iters=WARMUP, warmup_factor=START, **settings
    )
    for iteration, (first, second) in enumerate(rates(node, lrs=(0.5, 0.05))):
        assert first == pytest.approx(0.5 * warmed(curve, iteration), rel=1e-6), iteration
        assert second == pytest.approx(first / 10)


def test_poly_reaches_its_end_and_stays():
    curve = PolyParamScheduler(power=2.0, end_factor=0.25)
    assert curve(0.0) == 1.0
    assert curve(0.5) == pytest.approx(0.25 + 0.75 * 0.25)
    assert curve(1.0) == curve(1.1) == 0.25


def test_rates_follow_the_present_config_after_loading_a_state(caplog):
    def build(lr):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        return LRSchedule(optimizer, PolyParamScheduler(power=1.0), max_iter=10)

    old, same, lower = build(1.0), build(1.0), build(0.1)
    old.apply(4)
    same.load_state_dict(old.state_dict())
    assert not caplog.records
    lower.load_state_dict(old.state_dict())
    assert "initial learning rates" in caplog.text
    same.apply(5)
    lower.apply(5)
    assert (same.lr, lower.lr) == (pytest.approx(0.5), pytest.approx(0.05))
