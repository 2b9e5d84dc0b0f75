"""The CPU's way of deformable sampling against the plain formula; compiled, traced, exported."""

import json

import pytest
import torch
from torch import nn
from torch.library import opcheck

from d2dense import benchmark
from d2dense.layers import deformable_benchmark, deformable_op, deformable_sampling
from d2dense.layers.deformable_sampling import sample_by_grid
from tests.layers.deformable_cases import ODD, SIZES, case, plain, with_gradients


def assert_same(function, given, **tolerance):
    value, _, _, weights = given
    n, q, m, d = *weights.shape[:3], value.shape[3]
    grad = torch.randn(n, q, m * d, dtype=value.dtype)
    found = with_gradients(function, grad, *given)
    expected = with_gradients(plain, grad, *given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("function", [deformable_sampling, sample_by_grid])
@pytest.mark.parametrize("name", SIZES)
def test_result_and_gradients_are_those_of_the_plain_formula(function, name):
    assert_same(function, case(*SIZES[name]))


def test_float32_is_as_exact_as_the_plain_formula():
    given = case(((40, 30), (11, 7)), q=50, dtype=torch.float32)
    assert_same(deformable_sampling, given, atol=2e-3, rtol=1e-5)  # slopes are in pixels: large


@pytest.mark.parametrize("spread", [3.0, 1e4, 1e30])
def test_far_points(spread):
    assert_same(deformable_sampling, case(ODD, spread=spread))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_locations_that_are_no_places_read_nothing(bad):
    value, shapes, locations, weights = case(ODD, dtype=torch.float32)
    locations[:, 1] = bad
    grad = torch.ones(2, 6, 6)
    result, *grads = with_gradients(deformable_sampling, grad, value, shapes, locations, weights)
    assert not result[:, 1].any()
    assert all(torch.isfinite(x).all() for x in (result, *grads))
    locations[:, 1] = 5.0
    expected = with_gradients(deformable_sampling, grad, value, shapes, locations, weights)
    assert all(torch.equal(a, b) for a, b in zip((result, *grads), expected, strict=True))


def test_any_strides():
    value, shapes, locations, weights = case(ODD)
    strided = (
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        shapes,
        torch.stack([locations, locations], dim=-1)[..., 0],
        weights[:1].expand(2, *weights.shape[1:]),
    )
    assert not any(x.is_contiguous() for x in (strided[0], *strided[2:]))
    assert_same(deformable_sampling, strided)
    result = deformable_sampling(*(x.requires_grad_() if x is not shapes else x for x in strided))
    result.sum().backward()  # the gradient of a sum is one number expanded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_under_autocast(dtype):
    value, shapes, locations, weights = case(ODD, dtype=torch.float32)
    value, grad = value.to(dtype), torch.randn(2, 6, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(deformable_sampling, grad, value, shapes, locations, weights)
    double = [x.double() for x in (grad, value, locations, weights)]
    exact = with_gradients(plain, *double[:2], shapes, *double[2:])
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32, torch.float32]
    for a, b, limit in zip(found, exact, (dtype, dtype, torch.float32, torch.float32)):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < 4 * torch.finfo(limit).eps


def test_less_than_half_the_memory_of_the_plain_formula():
    given = case(((64, 64), (32, 32)), q=5440, heads=8, width=32, points=4, dtype=torch.float32)
    grad = torch.randn(2, 5440, 256)
    used = [
        benchmark.peak_memory(lambda f=function: with_gradients(f, grad, *given))
        for function in (deformable_sampling, plain)
    ]
    assert used[0] < 0.5 * used[1]


def test_operator_keeps_the_rules_of_torch():
    value, shapes, locations, weights = case(ODD, dtype=torch.float32)
    sizes = [side for shape in shapes for side in shape]
    arguments = [x.requires_grad_() for x in (value, locations, weights)]
    opcheck(torch.ops.d2dense.deformable_sampling, (arguments[0], sizes, *arguments[1:]))


# ------------------------------------------------ recorded


class Sampling(nn.Module):
    """Of two maps, whose sizes are those of the inputs."""

    def forward(self, first, second, locations, weights):
        maps = (first, second)
        value = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        return deformable_sampling(value.unflatten(2, (2, 2)), shapes, locations, weights)


def inputs(n, q, *shapes):
    maps = [torch.randn(n, 4, h, w) for h, w in shapes]
    return *maps, torch.rand(n, q, 2, 2, 3, 2), torch.rand(n, q, 2, 2, 3)


OTHERS = (inputs(1, 9, (5, 7), (3, 2)), inputs(3, 4, (16, 2), (1, 1)))


def assert_follows(recorded):
    for given in OTHERS:
        torch.testing.assert_close(recorded(*given), Sampling()(*given), atol=1e-5, rtol=1e-5)


def test_traced_sampling_has_torch_operators_only():
    traced = torch.jit.trace(Sampling(), inputs(2, 5, (8, 6), (4, 3)), check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert kinds
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds)
    assert "prim::PythonOp" not in kinds
    assert_follows(traced)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_sampling_has_dynamic_sizes_and_torch_operators_only(strict):
    size = torch.export.Dim
    n, q = size("n", max=64), size("q", max=4096)
    maps = [{0: n, 2: size(f"h{i}", max=512), 3: size(f"w{i}", max=512)} for i in range(2)]
    program = torch.export.export(
        Sampling(),
        inputs(2, 5, (8, 6), (4, 3)),
        dynamic_shapes=(*maps, {0: n, 1: q}, {0: n, 1: q}),
        strict=strict,
    )
    targets = [x.target for x in program.graph.nodes if x.op == "call_function"]
    assert {x.namespace for x in targets if isinstance(x, torch._ops.OpOverload)} == {"aten"}
    assert torch.ops.aten.grid_sampler.default in targets
    assert_follows(program.module())


def test_compiled_sampling_is_one_operator():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    assert_follows(torch.compile(Sampling(), backend=keep, dynamic=True, fullgraph=True))
    targets = [x.target for x in graphs[-1].graph.nodes if x.op == "call_function"]
    assert sum("d2dense.deformable_sampling" in str(x) for x in targets) == 1, targets


def test_benchmark_writes_a_table(tmp_path):
    small = ["--sizes", "6", "3", "--queries", "5", "--heads", "2", "--channels", "4"]
    options = ["--rounds", "1", "--threads", "1", "--device", "cpu", "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        deformable_benchmark.main(small + options)
    finally:
        torch.set_num_threads(threads)
    tables = json.loads((tmp_path / "deformable_attention.json").read_text())["rows"]
    found = [(row["direction"], row["way"]) for row in tables["CPU"]]
    ways = ("plain formula", "pure PyTorch", "CPU operator")
    assert found == [(x, way) for x in ("forward", "forward + backward") for way in ways]
    assert tables["GPU"][0]["state"] == "not measured"
    assert "CPU operator" in (tmp_path / "deformable_attention.md").read_text()


def test_without_mkl_the_pure_path_is_taken(monkeypatch):
    """PyTorch for ARM has no sparse products on the CPU."""
    value, shapes, locations, weights = case(ODD, dtype=torch.float32)
    assert deformable_op.is_supported(value, shapes) == torch.backends.mkl.is_available()
    monkeypatch.setattr(deformable_op, "_HAS_SPARSE_PRODUCTS", False)
    assert not deformable_op.is_supported(value, shapes)
    found = deformable_sampling(value, shapes, locations, weights)
    assert torch.equal(found, sample_by_grid(value, shapes, locations, weights))
