"""Norms over several processes against nn.BatchNorm of one process that holds all the elements."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from d2dense.engine.launch import launch
from d2dense.errors import UserError
from d2dense.layers import SyncBatchNorm, has_sync_norms, replace_sync_norms
from d2dense.solver.optim import is_norm
from tests.engine.workers import arguments
from tests.layers import workers

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four processes found, by rank; two of them also worked as a pair."""
    folder = tmp_path_factory.mktemp("norms")
    launch(workers.run, arguments(num_gpus=4, output_dir=str(folder)))
    return [torch.load(folder / f"found{rank}.pth", weights_only=True) for rank in range(4)]


def rows(x):
    """All elements of ``(N, C, H, W)`` as rows ``(N * H * W, C)``."""
    return x.movedim(1, -1).flatten(0, -2)


def reference(case, ranks, **options):
    """The same steps by one process: the elements of all processes are the rows of one batch."""
    norm = workers.initialise(nn.BatchNorm1d(workers.CHANNELS, dtype=torch.float64, **options))
    result = {"outputs": [], "gradients": []}
    for step in range(workers.STEPS):
        parts = [workers.batch(case, rank, step) for rank in range(ranks)]
        x = torch.cat([rows(x) for x, _ in parts]).requires_grad_()
        y = norm(x)
        y.backward(torch.cat([rows(grad) for _, grad in parts]))
        result["outputs"].append(y.detach())
        result["gradients"].append(x.grad)
    result["parameters"] = {name: p.grad for name, p in norm.named_parameters()}
    result["buffers"] = dict(norm.named_buffers())
    result["evaluated"] = norm.eval()(x).detach()
    return result


def compare(found, expected, ranks, *, evaluated=True):
    for name in ("outputs", "gradients"):
        for step, value in enumerate(expected[name]):
            both = torch.cat([rows(found[rank][name][step]) for rank in range(ranks)])
            torch.testing.assert_close(both, value, **EXACT)
    for name, value in expected["parameters"].items():
        total = sum(found[rank]["parameters"][name] for rank in range(ranks))
        torch.testing.assert_close(total, value, **EXACT)
    for rank in range(ranks):
        assert set(found[rank]["buffers"]) == set(expected["buffers"])
        for name, value in expected["buffers"].items():
            torch.testing.assert_close(found[rank]["buffers"][name], value, **EXACT)
    if evaluated:
        both = torch.cat([rows(found[rank]["evaluated"]) for rank in range(ranks)])
        torch.testing.assert_close(both, expected["evaluated"], **EXACT)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ["equal", "unequal", "one_empty", "large_mean"])
def test_processes_normalise_like_one(found, case, ranks):
    compare([each.get((case, ranks, "plain")) for each in found], reference(case, ranks), ranks)


@pytest.mark.parametrize("name", ["cumulative", "not_affine", "no_statistics"])
def test_options_of_batch_norm(found, name):
    expected = reference("unequal", 4, **workers.OPTIONS[name])
    # without running statistics an evaluation normalises by its own batch, each process alone
    compare(
        [each["unequal", 4, name] for each in found], expected, 4, evaluated=name != "no_statistics"
    )


def test_evaluation_without_running_statistics_is_local(found):
    for rank in range(4):
        norm = workers.initialise(nn.BatchNorm2d(3, track_running_stats=False, dtype=torch.float64))
        x, _ = workers.batch("unequal", rank, workers.STEPS - 1)
        torch.testing.assert_close(
            found[rank]["unequal", 4, "no_statistics"]["evaluated"], norm.eval()(x).detach()
        )


def test_a_single_element_gives_the_bias_and_no_gradient(found):
    """One process would refuse it: ``Expected more than 1 value per channel``."""
    each = found[1]["one_element", 4, "plain"]
    bias = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(each["outputs"][0], bias)
    assert not each["gradients"][0].any()
    assert torch.isfinite(each["buffers"]["running_var"]).all()


def test_no_element_at_all_changes_nothing(found):
    for each in found:
        case = each["all_empty", 4, "plain"]
        assert case["outputs"][0].shape == case["gradients"][0].shape == (0, 3, 3, 4)
        assert not case["buffers"]["running_mean"].any()
        assert (case["buffers"]["running_var"] == 1).all()
        assert not any(gradient.any() for gradient in case["parameters"].values())


def test_half_precision_has_float32_inside(found):
    parts = [workers.batch("large_mean", rank, 0, torch.bfloat16)[0] for rank in range(4)]
    x = torch.cat([rows(part) for part in parts]).float().requires_grad_()
    norm = workers.initialise(nn.BatchNorm1d(3))
    y = norm(x)
    y.bfloat16().float().square().sum().backward()
    outputs = torch.cat([rows(each["bfloat16"]["outputs"]) for each in found])
    assert outputs.dtype == torch.bfloat16
    # one rounding to bfloat16 (8 bits), at the very end
    torch.testing.assert_close(outputs.float(), y.detach(), rtol=2**-8, atol=1e-3)
    gradients = torch.cat([rows(each["bfloat16"]["gradients"]) for each in found])
    torch.testing.assert_close(gradients.float(), x.grad, rtol=2**-6, atol=2e-3)
    weight = sum(each["bfloat16"]["weight"] for each in found)
    torch.testing.assert_close(weight, norm.weight.grad, rtol=1e-4, atol=1e-2)
    for name, value in norm.named_buffers():
        torch.testing.assert_close(found[3]["bfloat16"]["buffers"][name], value)


def test_replaced_norms_in_a_wrapped_model_train_like_one_process(found):
    torch.manual_seed(0)
    model = workers.network(nn.BatchNorm2d).double()
    x = torch.cat([workers.batch("equal", rank, 0)[0] for rank in range(4)])
    model(x).square().mean().backward()
    for each in found:
        assert each["wrapped"]["count"] == 2
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each["wrapped"]["gradients"][name], parameter.grad, **EXACT)
        for name, value in model.named_buffers():
            torch.testing.assert_close(each["wrapped"]["buffers"][name], value, **EXACT)


def test_replacing_keeps_modules_parameters_and_names():
    model = workers.network(nn.SyncBatchNorm)
    norm, parameters, names = model[1], list(model.parameters()), list(model.state_dict())
    assert has_sync_norms(model)
    assert replace_sync_norms(model) == 2
    assert has_sync_norms(model)
    assert not has_sync_norms(workers.network(nn.BatchNorm2d))
    assert model[1] is norm
    assert type(norm) is SyncBatchNorm
    assert all(one is two for one, two in zip(model.parameters(), parameters))
    assert list(model.state_dict()) == names == list(workers.network(nn.BatchNorm2d).state_dict())
    assert replace_sync_norms(model) == 0
    assert replace_sync_norms(nn.SyncBatchNorm(2)) == 1
    assert not isinstance(norm, nn.SyncBatchNorm)  # or the wrapper for processes refuses it
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert is_norm(norm)
    assert repr(norm) == repr(nn.SyncBatchNorm(4))


def test_one_process_is_plain_batch_norm():
    x = torch.randn(3, 4, 5, 6)
    norm, plain = SyncBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(norm(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)
    norm.load_state_dict(plain.state_dict())
    assert torch.equal(copy.deepcopy(norm).eval()(x), plain.eval()(x))


class Derived(nn.SyncBatchNorm):
    pass


def test_a_derived_norm_is_refused():
    with pytest.raises(UserError, match=r"Derived runs on GPUs only; on the CPU use .*NORM"):
        replace_sync_norms(nn.Sequential(nn.SyncBatchNorm(2), Derived(2)))
