"""Optimizer groups and clipping, against plain loops over named parameters."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from d2dense.errors import UserError
from d2dense.solver.optim import GradientClipper, is_norm, param_groups


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
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(30)]
    model = nn.Sequential(*blocks)
    groups = param_groups(model, base_lr=0.1, weight_decay=0.1, weight_decay_norm=0.0)
    assert len(groups) == 2
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    # each block on its own: through thirty norms of four channels a gradient can vanish
    torch.stack(
        [(block(torch.randn(2, 4)) * torch.randn(2, 4)).sum() for block in blocks]
    ).sum().backward()
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


def test_one_dimension_and_heads_have_weight_decays_of_their_own():
    model = Net()
    model.backbone.gamma = nn.Parameter(torch.ones(4))
    model.scale = nn.Parameter(torch.tensor(1.0))

    def decays(**rules):
        found = by_name(model, param_groups(model, weight_decay=0.05, **rules))
        return {name: settings["weight_decay"] for name, settings in found.items()}

    flat = decays(weight_decay_1d=0.0)
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert flat == {name: 0.05 if shapes[name] > 1 else 0.0 for name in flat}
    # the rules that say more about a parameter come first
    named = decays(weight_decay_1d=0.1, weight_decay_norm=0.2, weight_decay_bias=0.3)
    assert named["backbone.gamma"] == 0.1
    assert named["backbone.blocks.0.1.weight"] == 0.2
    assert named["backbone.blocks.0.1.bias"] == named["head.bias"] == 0.3
    heads = decays(weight_decay_1d=0.0, weight_decay_norm=0.0, weight_decay_heads=0.01)
    assert {name for name, decay in heads.items() if decay == 0.01} == {
        "head.weight",
        "head.bias",
        "norm.weight",
        "scale",
    }
    assert heads["backbone.gamma"] == 0.0
    kept = decays(weight_decay_heads=0.01, no_decay_names=("scale",))
    assert (kept["scale"], kept["head.bias"]) == (0.0, 0.01)


def test_a_pyramid_around_a_backbone_decays_like_heads():
    model = Net()
    model.backbone.bottom_up = nn.Linear(4, 4)
    groups = param_groups(model, weight_decay=0.05, weight_decay_1d=0.0, weight_decay_heads=0.01)
    found = {name: each["weight_decay"] for name, each in by_name(model, groups).items()}
    assert found.pop("backbone.bottom_up.weight") == 0.05
    assert found.pop("backbone.bottom_up.bias") == 0.0
    assert set(found.values()) == {0.01}


def test_decay_of_heads_needs_a_backbone():
    with pytest.raises(UserError, match=r"WEIGHT_DECAY_HEADS.*Linear has no 'backbone'"):
        param_groups(nn.Linear(2, 2), weight_decay_heads=0.1)


def test_layers_beyond_the_last_have_the_full_rate():
    model = Net()
    model.backbone.num_layers = 1  # two fewer than it has
    found = by_name(model, param_groups(model, base_lr=1.0, layer_decay=0.5))
    powers = [found[f"backbone.blocks.{i}.0.weight"]["lr"] for i in range(3)]
    assert powers == [0.5, 1.0, 1.0]


# What CEDNet's official optimizer was given, by parameter name. L counts layers as its recipes do.
OFFICIAL = {
    "retinanet_next_tiny": ("stage", 4, 0.95, "det_retina_next_tiny", "full_retinanet_next_tiny"),
    "retinanet_next_small": ("half", 9, 0.95, "det_retina_next_small", "full_retinanet_next_tiny"),
    "mask_rcnn_next_tiny": ("stage", 4, 0.95, "full_mask_rcnn_next_tiny"),
    "deformable_detr_next_tiny": ("stage", 4, 0.5, "full_deformable_detr_next_tiny"),
    "upernet_next_tiny": ("stage", 4, 0.9, "full_upernet_next_tiny"),
    "upernet_next_small": ("half", 7, 0.9, "full_upernet_next_small"),
    "retinanet_res50": ("stage", 4, 1.0, "det_retina_res50", "full_retinanet_next_tiny"),
    "retinanet_swin_tiny": ("stage", 4, 0.95, "det_retina_swin_tiny", "full_retinanet_next_tiny"),
}
FIRST_HALF = re.compile(r"stages\.\d+\.0\.(encoder\.0|encoder_downsample\.0|encoder\.1\.[0-3])\.")


class Named(nn.Module):
    """A module that holds parameters under given dotted names."""

    def add(self, name: str, parameter: nn.Parameter) -> None:
        head, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(head, parameter)
            return
        if head not in self._modules:
            self.add_module(head, Named())
        self._modules[head].add(rest, parameter)


class NumberedBackbone(Named):
    """The official names with the layer numbers of the two official rules."""

    def __init__(self, rule: str, num_layers: int):
        super().__init__()
        self.rule = rule
        self.num_layers = num_layers

    def layer_id(self, name: str) -> int | None:
        part, number = (name.split(".") + [""])[:2]
        if part == "stem":
            return 0
        if part != "stages":
            return None
        stage = int(number)
        if self.rule == "stage" or stage == 0:
            return stage + 1
        return 2 * stage + (FIRST_HALF.match(name) is None)


@pytest.mark.parametrize("name", OFFICIAL)
def test_groups_are_the_official_ones_of_cednet(name, shared_data):
    folder = shared_data.parent / "reference"
    if not folder.is_dir():
        pytest.skip(f"no reference of CEDNet in {folder}")
    official = json.loads((folder / "cednet_train_meta.json").read_text())["param_groups"][name]
    variants = json.loads((folder / "cednet_state_dicts.json").read_text())["variants"]
    rule, num_layers, rate, *sources = OFFICIAL[name]
    shapes = {}
    for source in sources:
        prefix = variants[source]["prefix_in_detector"]
        for key, shape, _ in variants[source]["tensors"]:
            shapes.setdefault(prefix + key, shape)
    model = Named()
    model.backbone = NumberedBackbone(rule, num_layers)
    for key in official["params"]:
        model.add(key, nn.Parameter(torch.empty(shapes[key], device="meta")))

    rules = {} if "upernet" in name else {"weight_decay_heads": 1e-4}
    if "detr" in name:
        rules["lr_multipliers"] = {"sampling_offsets": 0.1, "reference_points": 0.1}
    groups = param_groups(
        model,
        base_lr=official["base_lr"],
        weight_decay=0.05,
        weight_decay_norm=0.0,
        weight_decay_1d=0.0,
        layer_decay=rate,
        **rules,
    )
    found = by_name(model, groups)
    assert found.keys() == official["params"].keys()
    for key, (scale, decay) in official["params"].items():
        assert found[key]["lr"] == pytest.approx(official["base_lr"] * scale, rel=1e-9), key
        assert found[key]["weight_decay"] == decay, key
    assert len(groups) == len({tuple(settings) for settings in official["params"].values()})


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_both_kinds_of_config_have_these_rules(kind):
    from detectron2.config import instantiate

    from d2dense.config import common, get_cfg
    from d2dense.engine.experiment import YamlExperiment

    model = Net()
    model.backbone.gamma = nn.Parameter(torch.ones(4))
    if kind == "yaml":
        cfg = get_cfg()
        cfg.merge_from_list(["SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY", "0.05"])
        cfg.merge_from_list(["SOLVER.BASE_LR", "0.1", "SOLVER.LAYER_DECAY", "0.5"])
        cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_1D", "0.0", "SOLVER.WEIGHT_DECAY_HEADS", "1e-4"])
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        optimizer = YamlExperiment(cfg, device="cpu").build_optimizer(model)
    else:
        node = common.adamw(lr=0.1, weight_decay_1d=0.0, weight_decay_heads=1e-4, layer_decay=0.5)
        node.params.model = model
        optimizer = instantiate(node)
    groups = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in optimizer.param_groups]
    found = by_name(model, groups)
    assert found["backbone.gamma"] == {"lr": 0.1, "weight_decay": 0.0}
    assert found["backbone.stem.weight"]["lr"] == pytest.approx(0.1 * 0.5**4)
    assert found["backbone.stem.weight"]["weight_decay"] == 0.05
    assert found["head.bias"] == found["norm.weight"] == {"lr": 0.1, "weight_decay": 1e-4}


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
