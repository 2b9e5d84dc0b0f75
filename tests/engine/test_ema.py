"""The average of the weights against its recurrence, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from d2dense.engine.ema import ModelEMA
from d2dense.engine.settings import RunSettings
from d2dense.errors import UserError


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def train(net, steps, after_step):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(inputs).pow(3).sum().backward()
        optimizer.step()
        after_step(step)


@pytest.mark.parametrize("warmup", [False, True])
def test_average_equals_the_recurrence(warmup):
    net = model()
    ema = ModelEMA(net, decay=0.9, warmup=warmup)
    expected = {name: value.clone() for name, value in net.state_dict().items()}

    def after_step(step):
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()

    train(net, 6, after_step)
    assert set(ema.weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ema.weights[name], value, rtol=1e-5, atol=1e-6)
    assert ema.weights["1.num_batches_tracked"] == 6
    assert not torch.allclose(ema.weights["0.weight"], net.state_dict()["0.weight"])


def test_a_time_constant_gives_the_published_momentum():
    """(1 - 1e-4) exp(-(1 + t) / 2000) + 1e-4 of the new weights, of norms' buffers too."""
    net = model()
    ema = ModelEMA(net, decay=0.9999, time_constant=2000.0)
    expected = {k: v.double().clone() for k, v in net.state_dict().items()}

    def after_step(step):
        ema.update()
        momentum = (1 - 1e-4) * math.exp(-(1 + step) / 2000) + 1e-4
        for name, value in net.state_dict().items():
            expected[name] = (1 - momentum) * expected[name] + momentum * value.double()

    train(net, 3, after_step)
    ema.updates = 6000  # much later
    train(net, 2, lambda step: after_step(6000 + step))
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(ema.weights[name].double(), expected[name], rtol=1e-5, atol=1e-7)


def test_one_start_at_a_time():
    with pytest.raises(ValueError, match="time constant"):
        ModelEMA(model(), decay=0.9, warmup=True, time_constant=10.0)
    with pytest.raises(UserError, match=r"SOLVER.EMA / train.ema"):
        RunSettings(output_dir="", max_iter=1, ema_warmup=True, ema_time_constant=1.0)


def test_applied_swaps_in_and_back_also_after_an_error():
    net = model()
    ema = ModelEMA(net, decay=0.5)
    train(net, 3, lambda step: ema.update())
    raw = {name: value.clone() for name, value in net.state_dict().items()}

    def use_and_fail():
        with ema.applied():
            for name, value in net.state_dict().items():
                assert torch.equal(value, ema.weights[name])
            assert torch.is_grad_enabled()
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        use_and_fail()
    for name, value in net.state_dict().items():
        assert torch.equal(value, raw[name])


def test_state_goes_on_in_another_object():
    first, second = model(), model()
    ema = ModelEMA(first, decay=0.9, warmup=True)
    train(first, 3, lambda step: ema.update())
    second.load_state_dict(first.state_dict())
    copy = ModelEMA(second, decay=0.9, warmup=True)
    copy.load_state_dict(ema.state_dict())
    train(first, 3, lambda step: ema.update())
    train(second, 3, lambda step: copy.update())
    for name, value in ema.weights.items():
        assert torch.equal(value, copy.weights[name])


def test_decay_out_of_range():
    with pytest.raises(ValueError, match="decay"):
        ModelEMA(model(), decay=1.0)
