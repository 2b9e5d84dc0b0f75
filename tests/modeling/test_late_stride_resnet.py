"""ResNets with late strides: sizes, where maps are taken, weights, dilations; and what timm
backbones got with them.
"""

import pytest
import timm
import torch
from torch import nn

from d2dense import config
from d2dense.errors import UserError
from d2dense.modeling import LateStrideResNet, TimmBackbone
from d2dense.solver.optim import param_groups

TINY = {"layers": [2, 3, 2, 3], "channels": [2, 3, 4, 6], "stem_width": 4, "zero_init_last": False}
RESNET = {"name": "resnet50s", "out_indices": (1, 2, 3, 4)}
LEVELS = ["res2", "res3", "res4", "res5"]


def tiny(**options):
    torch.manual_seed(0)
    return LateStrideResNet(options=TINY, **options)


def side(length, stride):
    while stride > 1:
        length, stride = (length + 1) // 2, stride // 2
    return length


@pytest.mark.parametrize("size", [(513, 257), (512, 96), (97, 130), (1, 1), (33, 5)])
@pytest.mark.parametrize("kind", ["late", "deep_stem", "plain_stem"])
@torch.no_grad()
def test_every_halving_rounds_up(kind, size):
    if kind == "late":
        backbone = tiny(out_features=["res0", *LEVELS]).eval()
    else:
        name = {"deep_stem": "resnet50s", "plain_stem": "resnet50"}[kind]
        options = {key: TINY[key] for key in ("layers", "channels")}
        backbone = TimmBackbone(
            name=name, out_indices=(1, 2, 3, 4), options=options, out_features=["res0", *LEVELS]
        ).eval()
    x = torch.randn(1, 3, *size)
    maps = backbone(x)
    assert maps["res0"] is x
    assert list(maps) == list(backbone.output_shape()) == ["res0", *LEVELS]
    for name, stride in zip(LEVELS, (4, 8, 16, 32)):
        shape = backbone.output_shape()[name]
        assert shape.stride == stride
        assert maps[name].shape == (1, shape.channels, *(side(n, stride) for n in size))


@torch.no_grad()
def test_it_is_the_plain_network_with_other_strides():
    """Block by block, from timm's own parts; the maps are those before the strided blocks."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet50s", num_classes=0, **TINY).eval()
    backbone = tiny().eval()
    names = {k: v for k, v in plain.state_dict().items() if not k.startswith("fc.")}
    assert backbone.model.state_dict().keys() == names.keys()
    backbone.model.load_state_dict(names)
    x = torch.randn(2, 3, 65, 97)
    expected, y = [], plain.maxpool(plain.act1(plain.bn1(plain.conv1(x))))
    for k, stage in enumerate((plain.layer1, plain.layer2, plain.layer3, plain.layer4)):
        for index, block in enumerate(stage):
            last = k < 3 and index == len(stage) - 1
            if last:
                expected.append(y)
            stride, dilation = 1 + last, (1, 2, 4)[index] if k == 3 else 1
            y = by_hand(block, y, stride, dilation)
    expected.append(y)
    for found, value in zip(backbone(x).values(), expected):
        torch.testing.assert_close(found, value)


def by_hand(block, x, stride, dilation):
    conv = nn.functional.conv2d
    y = block.act1(block.bn1(conv(x, block.conv1.weight)))
    y = conv(y, block.conv2.weight, stride=stride, padding=dilation, dilation=dilation)
    y = block.bn3(conv(block.act2(block.bn2(y)), block.conv3.weight))
    if block.downsample is not None:
        x = block.downsample[1](conv(x, block.downsample[0].weight))
    return (y + x[:, :, ::stride, ::stride]).relu()


def dilations(backbone):
    stages = [getattr(backbone.model, f"layer{k}") for k in range(1, 5)]
    return [[block.conv2.dilation[0] for block in stage] for stage in stages]


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (32, [[1, 1], [1, 1, 1], [1, 1], [1, 2, 4]]),
        (16, [[1, 1], [1, 1, 1], [1, 1], [2, 4, 8]]),
        (8, [[1, 1], [1, 1, 1], [2, 2], [4, 8, 16]]),
    ],
)
@torch.no_grad()
def test_dilation_in_place_of_stride(stride, expected):
    backbone = tiny(output_stride=stride).eval()
    assert dilations(backbone) == expected
    maps = backbone(torch.randn(1, 3, 129, 65))
    for name, own in zip(LEVELS, (4, 8, 16, 32)):
        assert backbone.output_shape()[name].stride == min(own, stride)
        assert maps[name].shape[2:] == (side(129, min(own, stride)), side(65, min(own, stride)))
    assert backbone.size_divisibility == stride


def test_dilated_timm_models_have_four_names():
    with torch.device("meta"):
        backbone = TimmBackbone(**RESNET, options={"output_stride": 8})
    assert list(backbone.output_shape()) == LEVELS
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 8, 8]


@pytest.mark.parametrize("method", ["trace", "script"])
@torch.no_grad()
def test_torchscript(method):
    backbone = tiny(out_features=["res0", *LEVELS]).eval()
    convert = {
        "trace": lambda: torch.jit.trace(backbone, torch.randn(1, 3, 64, 64), strict=False),
        "script": lambda: torch.jit.script(backbone),
    }[method]
    module, x = convert(), torch.randn(2, 3, 97, 129)
    for a, b in zip(backbone(x).values(), module(x).values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_stride": 4}, "expected 8, 16 or 32"),
        ({"multi_grid": [1, 2]}, "as many in the last"),
        ({"name": "resnet18"}, "no ResNet with bottleneck blocks"),
        ({"name": "convnext_tiny", "options": {}}, "no ResNet with bottleneck blocks|cannot build"),
    ],
)
def test_mistakes_are_one_line(options, words):
    with torch.device("meta"), pytest.raises(UserError, match=words):
        LateStrideResNet(**{"options": {}, **options})


def test_weights_of_a_file_are_used(tmp_path):
    full = timm.create_model("resnet50s", num_classes=3, **TINY)
    torch.save(full.state_dict(), tmp_path / "weights.pth")
    backbone = tiny(weights=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.model.layer3[1].conv2.weight, full.layer3[1].conv2.weight)


def test_norms_have_the_recipes_numbers():
    backbone = tiny(norm="SyncBN", norm_eps=1.001e-5, norm_momentum=3e-4)
    norms = [m for m in backbone.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 3 + 3 + 3 * 10  # stem, shortcuts that change the width, blocks
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1.001e-5, 3e-4)}
    assert len(param_groups(backbone, base_lr=0.1, weight_decay=0.1, weight_decay_norm=0.0)) == 2


def test_stochastic_depth_rises_over_all_blocks():
    drops = [
        block.drop_path.drop_prob if block.drop_path is not None else 0.0
        for k in range(1, 5)
        for block in getattr(tiny(drop_path_rate=0.3).model, f"layer{k}")
    ]
    assert drops == pytest.approx([0.3 * k / 9 for k in range(10)])


def test_yaml_builds_the_same():
    from detectron2.modeling import build_backbone

    cfg = config.get_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "LateStrideResNet", "resnet50s"
    cfg.MODEL.LATE_STRIDE.OUTPUT_STRIDE, cfg.MODEL.TIMM.SIZE_DIVISIBILITY = 8, 0
    cfg.MODEL.TIMM.NORM_EPS, cfg.MODEL.TIMM.NORM_MOMENTUM = 1e-3, 0.2
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        lazy = LateStrideResNet(
            output_stride=8, size_divisibility=0, norm_eps=1e-3, norm_momentum=0.2
        )
    assert str(backbone) == str(lazy)
    assert backbone.size_divisibility == lazy.size_divisibility == 0


# ------------------------------------------------ ConvNeXt and Swin


@pytest.mark.parametrize("name", ["test_convnext", "test_convnext2"])
@torch.no_grad()
def test_padding_keeps_the_last_pixels(name):
    plain, padded = (TimmBackbone(name=name, same_padding=same).eval() for same in (False, True))
    padded.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    for a, b in zip(plain(x).values(), padded(x).values()):
        assert torch.equal(a, b)  # nothing to fill up
    for size in ((65, 97), (129, 33), (3, 1)):
        for key, found in padded(torch.randn(1, 3, *size)).items():
            stride = padded.output_shape()[key].stride
            assert found.shape[2:] == tuple(side(n, stride) for n in size)
    moved = torch.zeros(1, 3, 65, 65)
    moved[..., -1, -1] = 5.0  # a corner that the plain one never sees
    zero = torch.zeros_like(moved)
    assert torch.equal(plain(moved)["res5"], plain(zero)["res5"])
    assert not torch.equal(padded(moved)["res5"], padded(zero)["res5"])


@pytest.mark.parametrize(
    ("name", "millions", "widths"),
    [
        ("swin_large_patch4_window12_384", 195.2, [192, 384, 768, 1536]),
        ("convnext_large.fb_in22k", 196.2, [192, 384, 768, 1536]),
        ("convnextv2_large.fcmae_ft_in22k_in1k_384", 196.4, [192, 384, 768, 1536]),
    ],
)
@torch.no_grad()
def test_the_large_backbones_of_the_paper(name, millions, widths):
    with torch.device("meta"):
        backbone = TimmBackbone(
            name=name, drop_path_rate=0.3, norm_eps=1e-6, same_padding=True, size_divisibility=0
        )
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert [s.channels for s in backbone.output_shape().values()] == widths
    assert {m.eps for m in backbone.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    drops = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.3)
    assert drops == sorted(drops)
    for size in ((513, 513), (512, 1024)):
        maps = backbone.eval()(torch.empty(1, 3, *size, device="meta"))
        for key, found in maps.items():
            stride = backbone.output_shape()[key].stride
            assert found.shape[2:] == tuple(side(n, stride) for n in size)
