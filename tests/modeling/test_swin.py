"""Swin: Detectron2's features from the same weights, at any size, traced and with less memory."""

import inspect
import warnings

import pytest
import torch
from detectron2.modeling import SwinTransformer, build_backbone
from torch import nn

from d2dense import config
from d2dense.engine.recompute import enable_activation_checkpointing
from d2dense.errors import UserError
from d2dense.modeling import Swin

TINY = {"embed_dim": 8, "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4), "window": 3}


def tiny(**options):
    torch.manual_seed(0)
    model = Swin(**{**TINY, "drop_path_rate": 0.0, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


class Maps(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return tuple(self.backbone(x).values())


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 130), (7, 5)])
def test_it_gives_detectron2s_features(size):
    model = tiny()
    other = SwinTransformer(
        embed_dim=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 4),
        window_size=3,
        drop_path_rate=0.0,
    )
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("relative_position_index") for name in missing)
    x = torch.randn(2, 3, *size)
    expected = other.eval().requires_grad_(False)(x)
    found = model(x)
    assert list(found) == list(model.output_shape()) == ["res2", "res3", "res4", "res5"]
    for (name, ours), theirs in zip(found.items(), expected.values()):
        assert ours.shape[1] == model.output_shape()[name].channels
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_trace_is_right_at_other_sizes():
    model = Maps(tiny())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 96))
    for size in [(64, 64), (65, 97), (33, 130)]:
        x = torch.randn(2, 3, *size)
        for found, expected in zip(traced(x), model(x)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_drop_path_rises_linearly():
    model = Swin(**TINY, drop_path_rate=0.7)
    blocks = [block for layer in model.layers for block in layer.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_maps_that_are_not_returned_have_no_norm():
    model = tiny(out_features=["res3", "res5"])
    assert list(model(torch.randn(1, 3, 32, 32))) == ["res3", "res5"]
    assert [name for name, _ in model.named_children() if name.startswith("norm")] == [
        "norm1",
        "norm3",
    ]


def test_recomputed_activations_give_the_same_gradients():
    model = tiny().train().requires_grad_()
    x = torch.randn(1, 3, 33, 50)

    def gradients():
        model.zero_grad()
        sum(each.square().sum() for each in model(x).values()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    assert enable_activation_checkpointing(model) == 8
    for found, each in zip(gradients(), expected):
        torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)


def test_both_kinds_of_config_build_the_same():
    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "Swin"
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(Swin.__init__).parameters.items()
        if name != "self"
    }
    assert Swin.from_config(cfg, None) == defaults
    for key, value in TINY.items():
        cfg.MODEL.SWIN[key.upper()] = value
    torch.manual_seed(3)
    first = build_backbone(cfg).state_dict()
    torch.manual_seed(3)
    second = Swin(**TINY).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{"depths": (2, 2, 2)}, {"out_features": ["p3"]}])
def test_mistakes_are_explained(options):
    with pytest.raises(UserError, match="four stages"):
        Swin(**options)
