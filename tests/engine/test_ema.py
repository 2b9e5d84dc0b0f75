"""The average of the weights against its recurrence, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2dense.engine.ema import ModelEMA


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
