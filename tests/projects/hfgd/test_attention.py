"""Attention: golden numbers, symmetries, a plain loop, no maps in memory."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hfgd import AxialAttention, LineAttention, SelfAttention

EXACT = {"rtol": 0, "atol": 1e-9}


def golden_input():
    """x[c, y, w] = cos(0.5 c + 0.9 y - 0.4 w), (1, 4, 3, 2); the golden figures are of these
    values rounded to float32.
    """
    c, y, w = torch.meshgrid(*(torch.arange(n).float() for n in (4, 3, 2)), indexing="ij")
    return torch.cos(0.5 * c + 0.9 * y - 0.4 * w)[None].double()


@torch.no_grad()
def fill(module, offset):
    """Entry m of parameter j, in the order q, k, v, o, is 0.3 sin(0.7 m + j + offset)."""
    names = [f"{layer}.{kind}" for layer in "qkvo" for kind in ("weight", "bias")]
    parameters = dict(module.named_parameters())
    for j, name in enumerate(name for name in names if name in parameters):
        parameter = parameters[name]
        m = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.copy_((0.3 * torch.sin(0.7 * m + j + offset)).view_as(parameter))


def golden_axial(*, residual):
    module = AxialAttention(channels=4, heads=2, residual=residual).double()
    fill(module.column, 1)
    fill(module.row, 9)
    return module


@torch.no_grad()
def test_column_layer_golden():
    module = golden_axial(residual=False)
    columns = golden_input()[0].permute(2, 1, 0)  # two lines of three pixels
    found = module.column(columns).permute(2, 1, 0)
    assert float(found.sum()) == pytest.approx(1.389065874, abs=1e-9)
    expected = [0.374384069, 0.376781908, 0.386687959, 0.382998577, 0.401195172, 0.395578578]
    torch.testing.assert_close(
        found[0].flatten(), torch.tensor(expected, dtype=torch.float64), **EXACT
    )


@torch.no_grad()
def test_column_then_row_golden():
    found = golden_axial(residual=True)(golden_input())[0]
    assert float(found.sum()) == pytest.approx(-2.354480160, abs=1e-9)
    expected = [1.435376298, 1.358885854, 0.937842340, 1.190600847, 0.005520240, 0.397246491]
    torch.testing.assert_close(
        found[0].flatten(), torch.tensor(expected, dtype=torch.float64), **EXACT
    )
    assert float(found[3, 2, 1]) == pytest.approx(-1.657455709, abs=1e-9)


@torch.no_grad()
def test_self_attention_golden():
    module = SelfAttention(channels=4, key_channels=2).double()
    fill(module, 2)
    found = module(golden_input())[0]
    assert float(found.sum()) == pytest.approx(4.937915867, abs=1e-9)
    expected = [-0.132241198, -0.106173031, -0.120559930, -0.137882683, -0.019511504, -0.073102697]
    torch.testing.assert_close(
        found[0].flatten(), torch.tensor(expected, dtype=torch.float64), **EXACT
    )


def random_axial(**options):
    module = AxialAttention(channels=8, heads=2, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_it_is_the_equation_for_every_pixel(residual):
    """A[w; y, y'] = softmax over y' of q k / sqrt(d), Z(y, w) = sum of A v, output S + o(Z); then
    the same along w; several images, no square.
    """
    module, x = random_axial(residual=residual), torch.randn(2, 8, 3, 5, dtype=torch.float64)

    def layer(attention, line):
        q, k, v = (each(line).view(-1, 2, 4) for each in (attention.q, attention.k, attention.v))
        z = torch.zeros_like(v)
        for head in range(2):
            for i in range(len(line)):
                scores = torch.stack([q[i, head] @ k[j, head] for j in range(len(line))]) / 2.0
                z[i, head] = sum(a * v[j, head] for j, a in enumerate(scores.softmax(0)))
        return attention.o(z.flatten(1)) + (line if residual else 0)

    expected = x.clone()
    for n in range(2):
        for w in range(5):
            expected[n, :, :, w] = layer(module.column, expected[n, :, :, w].t()).t()
        for y in range(3):
            expected[n, :, y] = layer(module.row, expected[n, :, y].t()).t()
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_symmetries():
    module, x = random_axial(), torch.randn(1, 8, 5, 6, dtype=torch.float64)
    y = module(x)
    rows, columns = torch.randperm(5), torch.randperm(6)
    torch.testing.assert_close(module(x[:, :, rows]), y[:, :, rows])
    torch.testing.assert_close(module(x[..., columns]), y[..., columns])
    torch.testing.assert_close(module(x.flip(3)), y.flip(3))
    transposed = module(x.transpose(2, 3)).transpose(2, 3)
    assert not torch.allclose(transposed, y, atol=1e-3)

    both = SelfAttention(channels=8, key_channels=3).double()
    order = torch.randperm(30)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(both(shuffled).flatten(2), both(x).flatten(2)[..., order])


def test_every_pixel_sees_every_pixel():
    module = random_axial(residual=False)
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    module(x)[0, :, 1, 3].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


@torch.no_grad()
def test_a_constant_map_gives_the_projected_value():
    layer = random_axial().column
    x = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(layer(x.expand(3, 7, 8)), layer.o(layer.v(x)).expand(3, 7, 8))


def test_keys_start_as_queries_and_biases_at_zero():
    layer = LineAttention(channels=8, heads=2)
    assert torch.equal(layer.q.weight, layer.k.weight)
    assert layer.q.weight.data_ptr() != layer.k.weight.data_ptr()
    assert not torch.equal(layer.q.weight, layer.v.weight)
    limit = math.sqrt(6 / 16)  # Glorot: inputs and outputs
    assert 0.8 * limit < float(layer.v.weight.detach().abs().max()) <= limit
    assert not any(part.bias.any() for part in (layer.q, layer.k, layer.v, layer.o))


@pytest.mark.parametrize("train", [False, True])
def test_maps_are_never_in_memory(train):
    """A map of 2 heads x 96 lines of 640 pixels would be 2 x 96 x 640^2 x 4 B = 315 MB; the largest
    allocation is of the size of the input.
    """
    module = AxialAttention(channels=16, heads=2)
    x = torch.randn(1, 16, 640, 96, requires_grad=train)
    with (
        torch.set_grad_enabled(train),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        y = module(x)
        if train:
            y.sum().backward()
    largest = max(each.self_cpu_memory_usage for each in seen.events())
    assert x.numel() * 4 <= largest < 40 * x.numel() * 4 < 2 * 96 * 640**2 * 4


@torch.no_grad()
def test_only_the_fused_kernel_is_needed_on_the_cpu():
    module, x = AxialAttention(channels=16, heads=2), torch.randn(2, 16, 9, 7)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it does not fit
        fused = module(x)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(fused, module(x), rtol=1e-5, atol=1e-5)
