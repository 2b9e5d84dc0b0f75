"""Optimizer groups and clipping, against plain loops over named parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2dense.engine.optim import GradientClipper, is_norm, param_groups
from d2dense.errors import UserError


class ChannelNorm(nn.Module):
    """A norm that derives from nn.Module only, as many do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Backbone(nn.Module):
    num_layers = 3

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in "abc")
        self.extra = nn.Linear(4, 4)

    def layer_id(self, name):
        if name.startswith(("pos_embed", "stem")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.norm = ChannelNorm()
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def by_name(model, groups):
    """Map parameter names to the settings of their group; also check that each is there once."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = {k: v for k, v in group.items() if k != "params"}
    return found


def test_norm_bias_and_named_parameters_get_their_own_decay():
    model = Net()
    groups = param_groups(
        model,
        base_lr=0.1,
        weight_decay=0.05,
        weight_decay_norm=0.0,
        weight_decay_bias=0.01,
        no_decay_names=("pos_embed",),
    )
    found = by_name(model, groups)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trainable
    without = {name for name, settings in found.items() if settings["weight_decay"] == 0.0}
    assert without == {
        "backbone.pos_embed",
        "norm.weight",
        *(f"backbone.blocks.{i}.1.weight" for i in range(3)),
    }
    biases = {name for name, settings in found.items() if settings["weight_decay"] == 0.01}
    assert biases == {name for name in trainable if name.endswith("bias")}
    assert all(settings["lr"] == 0.1 for settings in found.values())
    assert len(groups) == 3


def test_without_rules_there_is_one_group_with_the_optimizers_own_settings():
    model = Net()
    (group,) = param_groups(model)
    assert set(group) == {"params"}
    assert len(group["params"]) == sum(p.requires_grad for p in model.parameters())


def test_layer_decay_counts_from_the_last_layer():
    model = Net()
    found = by_name(model, param_groups(model, base_lr=1.0, layer_decay=0.5))
    expected = {"pos_embed": 4, "stem": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "extra": 0}
    for name, settings in found.items():
        power = 0
        for part, value in expected.items():
            if name.startswith(f"backbone.{part}"):
                power = value
        assert settings["lr"] == pytest.approx(0.5**power), name


def test_first_matching_lr_multiplier_counts_and_biases_scale_too():
    model = Net()
    groups = param_groups(
        model,
        base_lr=1.0,
        bias_lr_factor=2.0,
        lr_multipliers={"stem": 0.01, "backbone": 0.1, "norm": 3.0},
    )
    found = {name: settings["lr"] for name, settings in by_name(model, groups).items()}
    assert found["backbone.stem.weight"] == pytest.approx(0.01)
    assert found["backbone.stem.bias"] == pytest.approx(0.02)
    assert found["backbone.extra.weight"] == pytest.approx(0.1)
    assert found["norm.weight"] == pytest.approx(3.0)
    assert found["head.weight"] == pytest.approx(1.0)
    assert found["head.bias"] == pytest.approx(2.0)


def test_many_parameters_become_few_groups_that_fused_adamw_takes():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(30)))
    groups = param_groups(model, base_lr=0.1, weight_decay=0.1, weight_decay_norm=0.0)
    assert len(groups) == 2
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    model(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_multipliers": {"backbnoe": 0.1}, "base_lr": 1.0}, "did you mean 'backbone'"),
        ({"layer_decay": 0.5}, "set base_lr"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        param_groups(Net(), **changes)


def test_layer_decay_needs_numbered_layers_and_something_trainable():
    with pytest.raises(UserError, match="layer_decay"):
        param_groups(nn.Linear(2, 2), base_lr=1.0, layer_decay=0.5)
    with pytest.raises(UserError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_is_norm_by_type_and_by_name():
    from detectron2.layers.batch_norm import LayerNorm

    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), LayerNorm(4)):
        assert is_norm(norm)
    assert is_norm(ChannelNorm())
    assert not is_norm(nn.Linear(4, 4))


def gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for scale in (0.01, 3.0, 40.0):
        parameter = nn.Parameter(torch.zeros(5, 3))
        parameter.grad = torch.randn(5, 3, generator=generator) * scale
        parameters.append(parameter)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last one has no gradient


def test_value_clipping_bounds_each_element():
    parameters, reference = gradients(), gradients()
    GradientClipper(clip_type="value", clip_value=0.5)(parameters)
    for parameter, raw in zip(parameters[:-1], reference):
        assert torch.equal(parameter.grad, raw.grad.clamp(-0.5, 0.5))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_norm_clipping_bounds_each_parameter(norm_type):
    parameters, reference = gradients(), gradients()
    GradientClipper(clip_type="norm", clip_value=1.5, norm_type=norm_type)(parameters)
    for parameter, raw in zip(parameters[:-1], reference):
        torch.nn.utils.clip_grad_norm_(raw, 1.5, norm_type)
        torch.testing.assert_close(parameter.grad, raw.grad)
        assert torch.linalg.vector_norm(parameter.grad, norm_type) <= 1.5 + 1e-5
    assert torch.equal(parameters[0].grad, gradients()[0].grad)  # short ones stay as they are


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_full_model_clipping_bounds_the_total_norm(norm_type):
    parameters, reference = gradients(), gradients()
    GradientClipper(clip_type="full_model", clip_value=0.1, norm_type=norm_type)(parameters)
    torch.nn.utils.clip_grad_norm_(reference, 0.1, norm_type)
    for parameter, raw in zip(parameters[:-1], reference):
        torch.testing.assert_close(parameter.grad, raw.grad)
    norms = torch.stack([torch.linalg.vector_norm(p.grad, norm_type) for p in parameters[:-1]])
    assert torch.linalg.vector_norm(norms, norm_type) == pytest.approx(0.1, rel=1e-3)


def test_clipping_mistakes():
    with pytest.raises(UserError, match="full_model"):
        GradientClipper(clip_type="total", clip_value=1.0)
    with pytest.raises(UserError, match="positive"):
        GradientClipper(clip_type="norm", clip_value=0.0)
    GradientClipper(clip_type="norm", clip_value=1.0)([nn.Parameter(torch.zeros(2))])
