"""Parameters and multiply-accumulates of the reference's tables, on the meta device.

Its counter sees layers with weights and up-sampling, not products inside attention; batch norms and
up-sampling, which ours leaves out, are below 1 %.
"""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from cednet import CEDNet, CEDNetTrunk, NextFamily, official
from cednet.classifier import CEDNetClassifier
from d2dense.analysis import count_macs
from tests.projects.cednet import tiny

DETECTION, IMAGENET, ADE20K = (800, 1280), (224, 224), (512, 2048)


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def giga_macs(module, size) -> float:
    x = torch.empty(1, 3, *size, device="meta")
    return count_macs(module, x, attention=False)[""] / 1e9


def built(variant):
    with torch.device("meta"):
        return official.build(variant)


# ------------------------------------------------ classification


@pytest.mark.parametrize(
    ("variant", "published", "everything", "macs"),
    [
        ("cls_next_tiny", 33_826_152, 40_041_784, 5.695),
        ("cls_next_small", 56_174_824, 65_498_272, 9.658),
        ("cls_next_base", 94_615_528, 105_118_624, 16.204),
        ("cls_next_tiny_unet", 31_496_808, 37_712_440, 5.061),
        ("cls_next_tiny_hourglass", 30_929_960, 37_145_592, 4.956),
        ("cls_next_tiny_fpnvariant", 31_942_552, 37_896_040, 5.286),
        ("cls_swin_tiny", 32_178_833, 38_001_249, 5.843),
        ("cls_res50", 34_387_048, 40_078_392, 5.000),
    ],
)
def test_classifiers(variant, published, everything, macs):
    model = built(variant)
    assert parameters(model) == everything
    assert parameters(model) - parameters(model.heads[:-1]) == published
    last_only = CEDNetClassifier(trunk=model.trunk, heads=list(model.heads))
    assert giga_macs(last_only, IMAGENET) == pytest.approx(macs, rel=0.01)


# ------------------------------------------------ backbones


@pytest.mark.parametrize(
    ("variant", "count", "macs"),
    [
        ("det_retina_next_tiny", 32_172_160, 116.62),
        ("det_retina_next_small", 54_520_832, 197.48),
        ("det_retina_next_base", 92_658_432, 331.09),
        ("det_retina_swin_tiny", 30_672_297, 123.85),
        ("det_retina_cswin_tiny", 27_102_912, 114.02),
        ("det_retina_res50", 32_921_472, 102.29),
        ("det_retina_next_tiny_unet", 32_421_600, 117.07),
        ("det_retina_next_tiny_hourglass", 32_417_504, 118.58),
        ("det_retina_next_tiny_fpnvariant", 33_440_208, 117.35),
        ("det_retina_next_tiny_lastdec", 32_421_600, 117.07),
        ("det_twostage_next_tiny", 32_197_504, 155.94),
        ("det_twostage_next_small", 54_546_176, 236.81),
        ("det_twostage_next_base", 92_691_968, 370.94),
        ("det_twostage_swin_tiny", 30_697_641, 163.18),
        ("det_twostage_cswin_tiny", 27_120_064, 152.82),
        ("det_defdetr_next_tiny", 31_581_568, 116.57),
        ("det_defdetr_next_small", 53_930_240, 197.44),
        ("det_defdetr_next_base", 92_067_840, 331.05),
        ("det_defdetr_res50", 32_330_880, 102.25),
        ("det_mask2former_next_tiny", 30_718_336, 115.14),
        ("det_mask2former_res50", 31_541_376, 101.20),
    ],
)
def test_detection_backbones(variant, count, macs):
    model = built(variant)
    assert parameters(model) == count
    assert giga_macs(model, DETECTION) == pytest.approx(macs, rel=0.01)


# ------------------------------------------------ whole models


class WithRetinaHead(nn.Module):
    """What RetinaNet computes before it decodes boxes."""

    def __init__(self, backbone: CEDNet):
        super().__init__()
        anchors = DefaultAnchorGenerator(
            sizes=[[32, 40, 50]], aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]
        )
        self.backbone = backbone
        self.head = RetinaNetHead(
            input_shape=[ShapeSpec(channels=256)] * 5,
            num_classes=80,
            num_anchors=anchors.num_anchors[0],
            conv_dims=[256] * 4,
        )

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


def retinanet(**options):
    with torch.device("meta"):
        return WithRetinaHead(CEDNet(trunk=CEDNetTrunk(**options), out_features=tiny.RETINA))


def of_variant(name):
    with torch.device("meta"):
        return WithRetinaHead(official.build(name).backbone)


@pytest.mark.parametrize(
    ("variant", "count", "macs"),
    [
        ("next_tiny", 38_635_380, 254.5),
        ("next_small", 60_984_052, 335.4),
        ("next_base", 99_121_652, 469.0),
        ("swin_tiny", 37_135_517, 261.7),
        ("cswin_tiny", 33_566_132, 251.9),
        ("res50", 39_384_692, 240.2),
        ("next_tiny_unet", 38_884_820, 255.0),
        ("next_tiny_hourglass", 38_880_724, 256.5),
    ],
)
def test_retinanets(variant, count, macs):
    model = of_variant(f"det_retina_{variant}")
    assert parameters(model) == count
    assert giga_macs(model, DETECTION) == pytest.approx(macs, rel=0.01)


def test_retinanet_without_long_range_blocks():
    model = retinanet(lr_blocks=False)
    assert parameters(model) == 38_475_636
    assert giga_macs(model, DETECTION) == pytest.approx(254.4, rel=0.01)


@pytest.mark.parametrize(
    ("blocks", "millions"),
    [
        ([(6, 9, 3)], (26.7, 26.9)),
        ([(6, 12, 6)], (36.1, 36.4)),
        ([(5, 10, 5), (1, 2, 1)], (37.39, 37.64)),
        ([(3, 6, 3), (3, 6, 3)], (37.39, 37.64)),
        ([(1, 2, 1), (5, 10, 5)], (37.39, 37.64)),
        ([(2, 4, 2)] * 3, (38.64, 38.88)),
        ([(1, 4, 1)] * 4, (39.01, 39.26)),
    ],
)
def test_ablations_of_stages_and_blocks(blocks, millions):
    digits = 1 if millions[0] * 10 % 1 < 1e-6 else 2
    for last_decoder, expected in zip((False, True), millions):
        model = retinanet(blocks=blocks, last_decoder=last_decoder)
        assert round(parameters(model) / 1e6, digits) == expected


@pytest.mark.parametrize(
    ("variant", "count", "macs"),
    [
        ("full_upernet_next_tiny", 60_976_812, 962.4),
        ("full_upernet_next_small", 83_325_484, 1045.2),
        ("full_upernet_next_base", 122_896_684, 1184.3),
    ],
)
def test_upernets(variant, count, macs):
    model = built(variant)
    assert parameters(model) == count
    model.head.auxiliary_scores = lambda features: None  # its cost is not part of the figure
    assert giga_macs(model, ADE20K) == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize(
    ("variant", "share"),
    [("next_tiny", 32.0), ("next_small", 24.5), ("next_base", 24.7)],
)
def test_share_of_parameters_before_the_first_fusion(variant, share):
    backbone = built(f"det_retina_{variant}").backbone
    trunk = backbone.trunk
    before = [trunk.stem, trunk.first, trunk.down, trunk.stages[0].encoder]
    assert 100 * sum(map(parameters, before)) / parameters(backbone) == pytest.approx(
        share, abs=0.05
    )


def test_layer_scale_is_the_only_difference_of_its_option():
    with torch.device("meta"):
        counts = [
            parameters(CEDNetTrunk(family=NextFamily(layer_scale=scale))) for scale in (1.0, None)
        ]
    blocks_widths = 3 * 96 + 3 * (2 * 192 + 4 * 352 + 2 * 512)
    assert counts[0] - counts[1] == blocks_widths
