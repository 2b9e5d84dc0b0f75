"""The dilated convolution against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from cednet.dilated import DilatedDepthwiseConv2d


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (9, 9), (10, 13), (16, 3)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_plain_convolution(dilation, size, order):
    torch.manual_seed(0)
    conv = DilatedDepthwiseConv2d(6, 7, dilation=dilation).double()
    x = torch.randn(2, 6, *size).double().contiguous(memory_format=order).requires_grad_()
    ours = conv(x)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=3 * dilation, dilation=dilation, groups=6)
    assert torch.allclose(ours, plain)
    weight = torch.randn_like(plain)
    inputs = (x, conv.weight, conv.bias)
    gradients = [torch.autograd.grad((each * weight).sum(), inputs) for each in (ours, plain)]
    assert all(torch.allclose(a, b) for a, b in zip(*gradients))


def test_scripts_and_traces_at_other_sizes():
    conv = DilatedDepthwiseConv2d(4, 7, dilation=3)
    scripted = torch.jit.script(conv)
    traced = torch.jit.trace(conv, torch.randn(1, 4, 9, 9))
    for size in ((9, 9), (5, 17)):
        x = torch.randn(2, 4, *size)
        with torch.no_grad():
            assert torch.allclose(scripted(x), conv(x), atol=1e-6)
            assert torch.allclose(traced(x), conv(x), atol=1e-6)
    assert "reshape" not in str(traced.graph)
