"""The Detectron2 backbone: names, strides, any image size, options, recomputation."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.modeling import build_backbone

from cednet import CEDNet
from cednet.trunk import STYLES
from d2dense.config import get_cfg
from d2dense.engine.recompute import enable_activation_checkpointing
from d2dense.errors import UserError
from tests.projects.cednet import tiny

MIXERS = list(tiny.FAMILIES)
ALL_FEATURES = ("p2", "p3", "p4", "p5", "p6", "p7", *tiny.RAW)


def sizes(net, out):
    return {k: tuple(v.shape[1:]) for k, v in out.items()}


def expected_sizes(net, height, width):
    return {
        k: (spec.channels, -(-height // spec.stride), -(-width // spec.stride))
        for k, spec in net.output_shape().items()
    }


# ------------------------------------------------ sizes


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_maps_have_the_promised_sizes_for_any_image(mixer):
    features = ("p8", *ALL_FEATURES)
    net = tiny.backbone(mixer, features)
    for height, width in ((64, 96), (33, 70), (1, 100), (3, 2), (1, 1)):
        out = net(tiny.images(2, 3, height, width))
        assert list(out) == list(features)
        assert sizes(net, out) == expected_sizes(net, height, width)
        assert all(torch.isfinite(each).all() for each in out.values())


@torch.no_grad()
def test_odd_sizes_equal_the_padded_image_cropped():
    net = tiny.backbone()
    x = tiny.images(1, 3, 45, 90)
    whole = net(F.pad(x, (0, 6, 0, 19)))
    for name, value in net(x).items():
        assert torch.equal(value, whole[name][..., : value.shape[-2], : value.shape[-1]])


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    for mixer in MIXERS:
        net = tiny.backbone(mixer)
        x = tiny.images(3, 3, 64, 64)
        alone = net(x[1:2])
        assert all(tiny.close(v[1:2], alone[k]) for k, v in net(x).items())


@torch.no_grad()
def test_an_empty_batch_gives_empty_maps():
    net = tiny.backbone()
    assert {k: v.shape[0] for k, v in net(torch.zeros(0, 3, 64, 64)).items()} == dict.fromkeys(
        tiny.RETINA, 0
    )


@pytest.mark.parametrize("shape", [(1, 3, 0, 10), (3, 10, 10)])
def test_images_without_pixels_are_named(shape):
    with pytest.raises(UserError, match="at least one pixel"):
        tiny.backbone()(torch.zeros(shape))


@torch.no_grad()
def test_memory_order_of_the_image_does_not_matter():
    net = tiny.backbone("next")
    x = tiny.images(2, 3, 64, 96)
    ordered = net(x.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(v, ordered[k]) for k, v in net(x).items())
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in ordered.values())


# ------------------------------------------------ options


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mixer", ["next", "bottleneck"])
def test_styles_train(mixer, style):
    net = tiny.backbone(mixer, style=style).train()
    loss = sum(out.square().mean() for out in net(tiny.images(2, 3, 64, 64)).values())
    loss.backward()
    without = [name for name, p in net.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_features": ["p3", "p9"]}, "p9"),
        ({"out_features": ["stage2_c3"]}, "stage1_c3"),
    ],
)
def test_unknown_features_are_named(options, words):
    with pytest.raises(UserError, match=words):
        CEDNet(trunk=tiny.trunk(), **options)


# ------------------------------------------------ from a yacs config


def test_default_keys_build_the_default_network():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "CEDNet"
    with torch.device("meta"):
        by_key = build_backbone(cfg)
        plain = CEDNet(trunk=type(by_key.trunk)())
    assert str(by_key) == str(plain)
    assert by_key.output_shape() == plain.output_shape()
    assert by_key.size_divisibility == plain.size_divisibility == 32
    assert sum(p.numel() for p in by_key.parameters()) == 32_172_160  # the paper's T


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_key_arrives(mixer):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "CEDNet"
    cfg.MODEL.CEDNET.merge_from_list([
        "TOKEN_MIXER", mixer, "STYLE", "unet", "WIDTHS", (64, 128, 192, 256), "FIRST_BLOCKS", 1,
        "BLOCKS", ((2, 2, 2), (2, 3, 1)), "NUM_STAGES", 2, "LAST_DECODER", "no", "LR_BLOCKS", True,
        "LR_DILATION", 2, "DROP_PATH_RATE", 0.3, "LAYER_SCALE", 0.5, "LAYER_RULE", "half_stage",
        "LAYER_COUNT", 4, "OUT_FEATURES", ["p2", "p3"], "OUT_CHANNELS", 32,
        "SIZE_DIVISIBILITY", 128,
    ])  # fmt: skip
    net = build_backbone(cfg)
    text = str(net)
    assert list(net.output_shape()) == ["p2", "p3"]
    assert (net.output_shape()["p2"].channels, net.size_divisibility) == (32, 128)
    assert ("dilation=(2, 2)" in text) == (mixer != "cswin")
    assert [len(s.encoder.levels[1]) for s in net.trunk.stages] == [1, 1]
    assert net.trunk.stages[1].decoder is None
    assert (net.trunk.layer_rule, net.trunk.num_layers) == ("half_stage", 4)
    assert ("BatchNorm" in text) == (mixer == "bottleneck")
    assert "drop_path=0.3" in text
    if mixer == "next":
        assert float(net.trunk.first[0].residual.gamma.detach().mean()) == 0.5
    with torch.no_grad():
        assert net.eval()(tiny.images(1, 3, 64, 64))["p2"].shape == (1, 32, 16, 16)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("TOKEN_MIXER", "swinn", "did you mean 'swin'"),
        ("STYLE", "unnet", "did you mean 'unet'"),
        ("LAYER_RULE", "block", "half_stage"),
        ("LAST_DECODER", "maybe", "auto, yes or no"),
        ("NORM", "GN", "leave it empty"),
        ("WIDTHS", (1, 2, 3), "four numbers"),
        ("BLOCKS", (1, 2), "three numbers"),
        ("BLOCKS", ((1, 2, 1), (1, 2, 1)), "3 stages but blocks for 2"),
    ],
)
def test_mistakes_in_keys_are_named(key, value, words):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "CEDNet"
    cfg.MODEL.CEDNET[key] = value
    with pytest.raises(UserError, match=words):
        build_backbone(cfg)


def test_widths_that_heads_do_not_divide_are_named():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "CEDNet"
    cfg.MODEL.CEDNET.merge_from_list(["TOKEN_MIXER", "swin", "WIDTHS", (96, 100, 288, 416)])
    with pytest.raises(UserError, match="multiple of 32"):
        build_backbone(cfg)


def test_lazy_nodes_build_it():
    from detectron2.config import LazyCall as L

    from cednet import CEDNetTrunk, SwinFamily

    node = L(CEDNet)(
        trunk=L(CEDNetTrunk)(
            family=L(SwinFamily)(head_channels=8),
            widths=[16, 32, 48, 64],
            blocks=[[1, 1, 1], [1, 2, 1]],
        ),
        out_features=["p3", "p4"],
        out_channels=16,
    )
    assert list(instantiate(node).output_shape()) == ["p3", "p4"]


# ------------------------------------------------ recomputation


@pytest.mark.parametrize("mixer", MIXERS)
def test_recomputed_activations_change_nothing(mixer):
    """Also with stochastic depth: the second forward draws what the first one drew."""
    x = tiny.images(2, 3, 64, 64)
    gradients = []
    for recompute in (False, True):
        net = tiny.backbone(mixer, drop_path=0.5).train()
        if recompute:
            assert enable_activation_checkpointing(net) > 0
        torch.manual_seed(3)
        sum(out.square().mean() for out in net(x).values()).backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()})
        gradients[-1] |= {k: v for k, v in net.named_buffers() if "running" in k}
    assert all(torch.allclose(gradients[1][k], v, atol=1e-6) for k, v in gradients[0].items())


def test_recomputing_batch_norms_through_the_switch_is_refused():
    with pytest.raises(UserError, match="activation_checkpointing"):
        tiny.trunk("bottleneck").set_grad_checkpointing()
