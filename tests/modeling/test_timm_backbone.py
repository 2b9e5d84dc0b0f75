"""TimmBackbone: feature maps, layers, norms, weights, and both kinds of config."""

from __future__ import annotations

import pytest
import timm
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import build_backbone
from torch import nn

from d2dense import config
from d2dense.errors import UserError
from d2dense.modeling import TimmBackbone
from d2dense.modeling.necks import HRFPN, NASFPN, BiFPN
from d2dense.solver.optim import param_groups

TINY = "test_convnext"  # 4 stages of 24 to 64 channels
SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("name", [TINY, "test_resnet", SWIN])
@pytest.mark.parametrize("size", [(64, 96), (224, 224), (70, 101)])
@torch.no_grad()
def test_maps_are_timms_at_any_size(name, size):
    torch.manual_seed(0)
    indices = (1, 2, 3, 4) if name == "test_resnet" else (0, 1, 2, 3)
    backbone = TimmBackbone(name=name, out_indices=indices).eval()
    torch.manual_seed(0)
    settings = {"strict_img_size": False} if name == SWIN else {}
    theirs = timm.create_model(name, features_only=True, out_indices=indices, **settings).eval()
    x = torch.randn(1, 3, *size)
    maps = backbone(x)
    assert list(maps) == list(backbone.output_shape()) == ["res2", "res3", "res4", "res5"]
    if name == SWIN:  # its patches take whole multiples of 4
        x = nn.functional.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    for (key, shape), other in zip(backbone.output_shape().items(), theirs(x)):
        expected = other.permute(0, 3, 1, 2) if name == SWIN else other
        assert torch.equal(maps[key], expected)
        assert maps[key].shape[1] == shape.channels
        if not (size[0] % 32 or size[1] % 32):
            assert maps[key].shape[2:] == (size[0] // shape.stride, size[1] // shape.stride)
    assert backbone.size_divisibility == 32


@torch.no_grad()
def test_norms_of_maps_are_layer_norms_over_channels():
    backbone = TimmBackbone(name=TINY, out_norm="LN", out_features=["res3", "res5"]).eval()
    x = torch.randn(1, 3, 64, 64)
    maps, plain = backbone(x), backbone.model(x)
    assert list(maps) == ["res3", "res5"]
    expected = nn.functional.layer_norm(plain[3].permute(0, 2, 3, 1), (64,), eps=1e-6)
    torch.testing.assert_close(maps["res5"], expected.permute(0, 3, 1, 2))
    trains = {name for name, p in backbone.norms.named_parameters() if p.requires_grad}
    assert trains == {"res3.weight", "res3.bias", "res5.weight", "res5.bias"}
    assert backbone.norms["res2"].weight.numel() == 24  # there, but frozen


def official_convnext_layer(name: str, depth: int, layers: int) -> int | None:
    """The rule of ConvNeXt's detectors, in the official names of parameters."""
    part, stage, block = name.split(".")[:3]
    if part == "downsample_layers":
        return {0: 0, 1: 2, 2: 3, 3: layers}[int(stage)]
    if part == "stages":
        return {0: 1, 1: 2, 2: 3 + int(block) // 3, 3: layers}[int(stage)]
    return None


@pytest.mark.parametrize(("name", "depth", "layers"), [("tiny", 9, 6), ("small", 27, 12)])
def test_layers_follow_convnexts_rule(name, depth, layers):
    with torch.device("meta"):
        backbone = TimmBackbone(name=f"convnext_{name}", out_norm="LN")
    assert backbone.num_layers == layers
    seen = set()
    for ours, _ in backbone.named_parameters():
        official = ours.removeprefix("model.").replace("stem_", "downsample_layers.0.")
        if ".downsample." in official:
            stage = official[len("stages_")]
            official = f"downsample_layers.{stage}." + official.split(".downsample.")[1]
        official = official.replace("stages_", "stages.").replace(".blocks.", ".")
        expected = official_convnext_layer(official, depth, layers)
        assert backbone.layer_id(ours) == expected, ours
        seen.add(expected)
    assert seen == {None, *range(layers + 1)}


def test_layers_of_swin_resnet_and_others():
    with torch.device("meta"):
        swin = TimmBackbone(name=SWIN)
        resnet = TimmBackbone(name="resnet50", out_indices=(1, 2, 3, 4))
        other = TimmBackbone(name="hrnet_w18", out_indices=(1, 2))
    assert swin.num_layers == 5
    assert swin.layer_id("model.layers_2.blocks.5.mlp.fc1.weight") == 4
    assert swin.layer_id("model.patch_embed.proj.weight") == 0
    assert resnet.num_layers == 5
    assert resnet.layer_id("model.layer1.0.conv1.weight") == 1
    assert resnet.layer_id("model.layer4.2.conv1.weight") == 5
    with pytest.raises(UserError, match=r"layer-wise decay is defined for .* four stages"):
        other.layer_id("model.stage2.0.weight")


def test_the_optimizer_reads_the_layers():
    model = nn.Sequential(TimmBackbone(name=TINY, out_norm="LN"))
    groups = param_groups(model, base_lr=1.0, weight_decay=0.05, layer_decay=0.5)
    rates = {p: g["lr"] for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert rates[names["0.norms.res5.weight"]] == 1.0
    assert rates[names["0.model.stages_3.blocks.0.gamma"]] == 0.5
    layers = model[0].num_layers
    assert rates[names["0.model.stem_0.weight"]] == 0.5 ** (layers + 1)


@pytest.mark.parametrize("name", [TINY, SWIN])
def test_recomputed_activations_give_the_same_gradients(name):
    torch.manual_seed(0)
    backbone = TimmBackbone(name=name, drop_path_rate=0.2).train()
    grads = []
    for enable in (False, True):
        backbone.set_grad_checkpointing(enable)
        backbone.zero_grad()
        torch.manual_seed(1)
        sum(each.mean() for each in backbone(torch.ones(1, 3, 64, 64)).values()).backward()
        grads.append([p.grad.clone() for p in backbone.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_batch_norms_change():
    arguments = {"name": "test_resnet", "out_indices": (1, 2)}
    frozen = TimmBackbone(**arguments, norm="FrozenBN")
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
    assert not any("bn" in name for name, _ in frozen.named_parameters())
    x = torch.rand(2, 3, 64, 64)
    plain = TimmBackbone(**arguments).eval()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(frozen.train()(x)["res2"], plain(x)["res2"], rtol=1e-4, atol=1e-4)
    shared = TimmBackbone(**arguments, norm="SyncBN")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in shared.modules())


# ------------------------------------------------ weights


def test_weights_of_a_file_are_used(tmp_path):
    full = timm.create_model(TINY, num_classes=7)
    path = tmp_path / "classifier.pth"
    torch.save({"model": full.state_dict()}, path)
    backbone = TimmBackbone(name=TINY, weights=str(path))
    assert torch.equal(backbone.model.stem_0.weight, full.stem[0].weight)
    last = backbone.model.stages_3.blocks[-1].mlp.fc2.weight
    assert torch.equal(last, full.stages[3].blocks[-1].mlp.fc2.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    state = timm.create_model(TINY, num_classes=7).state_dict()
    path = tmp_path / "part.pth"
    torch.save({k: v for k, v in state.items() if "stages.3" not in k}, path)
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ parameters .*stages_3"):
        TimmBackbone(name=TINY, weights=str(path))


def test_weights_never_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"model": {"stem.0.weight": Evil()}}, path)
    with pytest.raises(UserError):
        TimmBackbone(name=TINY, weights=str(path))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------ configs, mistakes


def yaml_config(name: str):
    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OUT_NORM = TINY, "LN"
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    return cfg


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("build_timm_fpn_backbone", ["p2", "p3", "p4", "p5", "p6"]),
        ("build_retinanet_timm_fpn_backbone", ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
def test_yaml_and_lazy_build_the_same(name, levels):
    from detectron2.config import instantiate

    from d2dense.config import detectors

    cfg = yaml_config(name)
    top = "maxpool"
    if "retinanet" in name:
        cfg.MODEL.TIMM.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        top = "p6p7"
    torch.manual_seed(0)
    yaml = build_backbone(cfg)
    assert list(yaml.output_shape()) == levels
    torch.manual_seed(0)
    lazy = instantiate(detectors.timm_fpn(TINY, top=top, channels=16))
    theirs, ours = yaml.state_dict(), lazy.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "neck", "setting"),
    [
        ("bifpn", BiFPN, {"num_layers": 2}),
        ("nas_fpn", NASFPN, {"num_stages": 2}),
        ("hrfpn", HRFPN, {}),
    ],
)
def test_yaml_builds_the_other_pyramids_too(name, neck, setting):
    cfg = yaml_config(f"build_retinanet_timm_{name}_backbone")
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.NUM_REPEATS, cfg.MODEL.FPN.NORM = 2, "BN"
    cfg.MODEL.FPN.SIZE_DIVISIBILITY = 64
    torch.manual_seed(0)
    yaml = build_backbone(cfg)
    assert list(yaml.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    torch.manual_seed(0)
    levels = ["res3", "res4", "res5"]
    bottom_up = TimmBackbone(name=TINY, out_norm="LN", out_features=levels)
    ours = neck(
        bottom_up=bottom_up,
        in_features=levels,
        out_channels=16,
        norm="BN",
        size_divisibility=64,
        **setting,
    )
    assert yaml.size_divisibility == ours.size_divisibility == 64
    assert yaml.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(yaml.parameters(), ours.parameters()))


def test_constructor_defaults_are_the_yacs_defaults():
    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "TimmBackbone", TINY
    torch.manual_seed(0)
    yaml = build_backbone(cfg)
    torch.manual_seed(0)
    plain = TimmBackbone(name=TINY)
    assert yaml.output_shape() == plain.output_shape()
    assert all(torch.equal(p, q) for p, q in zip(yaml.parameters(), plain.parameters()))
    assert yaml.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "convnext_tinny"}, "no model 'convnext_tinny'.*did you mean 'convnext_tiny'"),
        ({"name": TINY, "out_features": ["res9"]}, "no feature map 'res9'; expected some of res2"),
        ({"name": TINY, "out_indices": (0, 9)}, r"cannot build the feature maps \[0, 9\]"),
        ({"name": TINY, "norm": "GN"}, "is 'GN'; expected one of FrozenBN"),
        ({"name": TINY, "out_norm": "XN"}, "unknown norm 'XN'"),
        ({"name": TINY, "weights": "no_such_file.pth"}, "no_such_file.pth"),
        ({"name": "resnet18", "options": {"dpths": [1, 1, 1, 1]}}, "dpths"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        TimmBackbone(**arguments)


def test_options_change_the_model():
    node = L(TimmBackbone)(name="convnext_tiny", options={"depths": [1, 1, 2, 1], "dims": [8] * 4})
    shapes = instantiate(node).output_shape()
    assert [shape.channels for shape in shapes.values()] == [8, 8, 8, 8]
    assert len(instantiate(node).model.stages_2.blocks) == 2
