"""Linear layers and convolutions that do more in one pass give what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from d2dense.layers import Linear, fold_frozen_norms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_with_and_without_gradients(relu, bias):
    torch.manual_seed(0)
    layer, x = Linear(12, 20, bias=bias), torch.randn(3, 7, 12).transpose(0, 1)
    expected = x.double() @ layer.weight.double().t()
    expected = expected + (layer.bias.double() if bias else 0)
    expected = expected.clamp(min=0) if relu else expected
    with torch.no_grad():
        torch.testing.assert_close(layer(x, relu=relu).double(), expected, atol=1e-6, rtol=1e-5)
    kept = layer(x, relu=relu)
    assert kept.requires_grad
    torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_macs_are_counted():
    layer = Linear(12, 20)
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(3, 7, 12))
    assert counter.get_total_flops() == 2 * 21 * 12 * 20


@torch.no_grad()
def test_other_ways_stay_open():
    layer = Linear(4, 6)
    assert layer(torch.ones(0, 4)).shape == (0, 6)
    assert layer.double()(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    layer, x = layer.float(), torch.randn(2, 4)
    traced = torch.jit.trace(layer, x)
    assert "mkldnn" not in str(traced.graph)
    torch.testing.assert_close(traced(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_frozen_norms_fold_into_their_convolutions(bias):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(8)
    for each in (norm.weight, norm.bias, norm.running_mean):
        each.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    conv = Conv2d(4, 8, 3, bias=bias, norm=norm)
    x = torch.randn(2, 4, 9, 9)
    expected = conv(x)
    assert fold_frozen_norms(conv) is conv
    assert conv.norm is None
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)
