"""Multi-scale deformable attention against a slow loop, recorded outputs and finite differences."""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from d2dense.errors import UserError
from d2dense.layers import MultiScaleDeformableAttention, deformable_sampling
from d2dense.layers.deformable_sampling import sample_by_grid
from tests.layers.deformable_cases import ODD, case
from tests.projects.cednet.golden import REFERENCE

UNITS = REFERENCE / "golden" / "codetr" / "units.npz"
PATHS = {"cpu": deformable_sampling, "grid": sample_by_grid}


def by_loop(value, shapes, locations, weights):
    """The definition, number by number."""
    n, _, heads, width = value.shape
    q, points = locations.shape[1], locations.shape[4]
    result = torch.zeros(n, q, heads, width, dtype=value.dtype)
    for i, j, m in np.ndindex(n, q, heads):
        start = 0
        for level, (h, w) in enumerate(shapes):
            image = value[i, start : start + h * w, m].reshape(h, w, width)
            start += h * w
            for p in range(points):
                x = float(locations[i, j, m, level, p, 0]) * w - 0.5
                y = float(locations[i, j, m, level, p, 1]) * h - 0.5
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(x), math.floor(x) + 1):
                        if 0 <= row < h and 0 <= column < w:
                            share = (1 - abs(y - row)) * (1 - abs(x - column))
                            share *= weights[i, j, m, level, p]
                            result[i, j, m] += share * image[row, column]
    return result.flatten(2)


# ------------------------------------------------ sampling


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shapes", [ODD, ((1, 1),), ((5, 6), (3, 3))])
def test_equals_the_definition(path, shapes):
    arguments = case(shapes)
    found = PATHS[path](*arguments)
    assert torch.allclose(found, by_loop(*arguments), atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_the_function(path):
    value, shapes, locations, weights = case(ODD, n=1, q=3, width=2)
    tensors = [each.requires_grad_() for each in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: PATHS[path](v, shapes, x, w), tensors)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_both_ways_have_the_same_gradients(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value, shapes, locations, weights = case(((9, 8), (4, 4)), q=20)
        found = []
        for function in PATHS.values():
            tensors = [x.clone().requires_grad_() for x in (value, locations, weights)]
            out = function(tensors[0], shapes, *tensors[1:])
            (out * torch.arange(out.numel()).view_as(out)).sum().backward()
            found.append([x.grad for x in tensors])
        assert all(torch.allclose(a, b) for a, b in zip(*found))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
def test_points_outside_read_nothing(path):
    value, shapes, locations, weights = case(ODD)
    for far in (-3.0, 4.0, 1e9, -1e30):
        out = PATHS[path](value, shapes, torch.full_like(locations, far), weights)
        assert torch.equal(out, torch.zeros_like(out))


def test_far_points_do_not_harm_the_others():
    value, shapes, locations, weights = case(ODD, dtype=torch.float32)
    locations[0, 0] = 1e30
    weights.requires_grad_()
    out = deformable_sampling(value, shapes, locations.requires_grad_(), weights)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(locations.grad[:, 1:]).all()
    assert torch.allclose(out[:, 1:], sample_by_grid(value, shapes, locations, weights)[:, 1:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (0, 0)])
def test_no_images_or_no_queries(path, sizes):
    value, shapes, locations, weights = case(ODD, *sizes)
    out = PATHS[path](value.requires_grad_(), shapes, locations, weights)
    assert out.shape == (*sizes, 6)
    out.sum().backward()
    assert torch.equal(value.grad, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_summed_in_float32(dtype):
    value, shapes, locations, weights = case(((40, 40), (20, 20)), dtype=torch.float32)
    out = deformable_sampling(value.to(dtype), shapes, locations, weights)
    assert out.dtype == dtype
    exact = deformable_sampling(value.to(dtype).float(), shapes, locations, weights)
    assert torch.equal(out, exact.to(dtype))


def test_traced_sampling_follows_other_sizes():
    class Sampling(nn.Module):
        def forward(self, first, second, locations, weights):
            maps = (first, second)
            value = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
            shapes = [(x.shape[2], x.shape[3]) for x in maps]
            return deformable_sampling(value.unflatten(2, (2, 2)), shapes, locations, weights)

    def inputs(n, q, *shapes):
        maps = [torch.randn(n, 4, h, w) for h, w in shapes]
        return *maps, torch.rand(n, q, 2, 2, 3, 2), torch.rand(n, q, 2, 2, 3)

    traced = torch.jit.trace(Sampling(), inputs(1, 5, (8, 6), (4, 3)), check_trace=False)
    for n, q, *shapes in ((2, 9, (5, 7), (3, 2)), (1, 4, (16, 2), (1, 1))):
        given = inputs(n, q, *shapes)
        assert torch.allclose(traced(*given), Sampling()(*given), atol=1e-6)


# ------------------------------------------------ attention


def filled(module, prefix):
    """The reference's rule for weights."""
    state = {}
    for key, value in module.state_dict().items():
        g = torch.Generator().manual_seed(zlib.crc32(f"{prefix}.{key}".encode()))
        random = torch.randn(value.shape, generator=g)
        if key == "sampling_offsets.bias":
            state[key] = value
        elif value.ndim >= 2:
            factor = 0.3 if key == "output_proj.weight" else 1.0
            state[key] = random * factor / math.sqrt(math.prod(value.shape[1:]))
        else:
            state[key] = 0.02 * random
    module.load_state_dict(state)
    return module


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


GOLDEN = ((12, 16), (6, 8), (3, 4), (2, 2))
needs_recording = pytest.mark.skipif(not UNITS.is_file(), reason="no recorded outputs here")


@needs_recording
@pytest.mark.parametrize("path", PATHS)
def test_sampling_equals_the_recorded_one(path):
    weights = randn(3, 2, 50, 8, 16).softmax(-1).view(2, 50, 8, 4, 4)
    locations = rand(2, 2, 50, 8, 4, 4, 2) * 1.2 - 0.1
    out = PATHS[path](randn(1, 2, 256, 8, 32), GOLDEN, locations, weights)
    assert np.abs(out[..., ::4].numpy() - np.load(UNITS)["msda_out"]).max() < 1e-5


@needs_recording
@pytest.mark.parametrize("size", [2, 4])
def test_module_equals_the_recorded_one(size):
    module = filled(MultiScaleDeformableAttention(channels=256), "unit_msda")
    query, position = randn(4, 50, 2, 256), randn(5, 50, 2, 256)
    references = rand(8, 2, 50, 4, 2) if size == 2 else rand(9, 2, 50, 4, 4)
    out = module(
        (query + position).transpose(0, 1),
        references,
        randn(6, 256, 2, 256).transpose(0, 1),
        GOLDEN,
        rand(7, 2, 256) < 0.15,
    )
    found = (out.transpose(0, 1) + query)[..., ::4].detach().numpy()
    assert np.abs(found - np.load(UNITS)[f"msda_module_ref{size}"]).max() < 1e-5


def small(**options):
    return MultiScaleDeformableAttention(channels=8, heads=2, levels=3, points=2, **options)


def test_initial_values():
    module = MultiScaleDeformableAttention(channels=32, heads=4, levels=2, points=3)
    offsets = module.sampling_offsets.bias.view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(3):
        for level in range(2):
            expected = directions * (point + 1)
            assert torch.allclose(offsets[:, level, point], expected, atol=1e-6)
    for weight in (module.sampling_offsets.weight, *module.attention_weights.parameters()):
        assert not weight.any()
    limit = math.sqrt(6 / 64)
    assert 0.9 * limit < module.value_proj.weight.abs().max() <= limit
    assert not module.output_proj.bias.any()


def test_padded_positions_do_not_matter():
    module = small()
    size = sum(h * w for h, w in ODD)
    value, padding = torch.randn(2, size, 8), torch.rand(2, size) < 0.4
    query, references = torch.randn(2, 5, 8), torch.rand(2, 5, 3, 2)
    out = module(query, references, value, ODD, padding)
    other = torch.where(padding[..., None], torch.full_like(value, 1e4), value)
    assert torch.equal(out, module(query, references, other, ODD, padding))
    assert not torch.allclose(out, module(query, references, value, ODD))


@pytest.mark.parametrize(("n", "q"), [(2, 0), (0, 3)])
def test_attention_without_images_or_queries(n, q):
    module = small()
    value = torch.randn(n, sum(h * w for h, w in ODD), 8)
    out = module(torch.randn(n, q, 8), torch.rand(n, q, 3, 2), value, ODD)
    assert out.shape == (n, q, 8)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_every_parameter_gets_a_gradient():
    module = small()
    value = torch.randn(1, sum(h * w for h, w in ODD), 8)
    module(torch.randn(1, 4, 8), torch.rand(1, 4, 3, 4), value, ODD).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_autocast_keeps_positions_exact():
    module = small().eval()
    size = sum(h * w for h, w in ODD)
    given = torch.randn(2, 5, 8), torch.rand(2, 5, 3, 2), torch.randn(2, size, 8), ODD
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*given)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), module(*given), atol=0.05)


def test_heads_must_divide_the_channels():
    with pytest.raises(UserError, match="10 channels into 4 heads"):
        MultiScaleDeformableAttention(channels=10, heads=4)
