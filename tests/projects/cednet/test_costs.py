"""Parameters and multiply-accumulates of the reference's tables, on the meta device.

Its counter sees layers with weights and up-sampling, not products inside attention; batch norms and
up-sampling, which ours leaves out, are below 1 %.
"""

import pytest
import torch
from torch import nn

from cednet import CEDNet, CEDNetTrunk, NextFamily, official
from cednet.classifier import CEDNetClassifier
from d2dense import config, model_zoo
from d2dense.costs import analyze, count_macs
from tests.projects.cednet import tiny

DETECTION, IMAGENET, ADE20K = (800, 1280), (224, 224), (512, 2048)
CLOSE = 0.01  # allowed relative difference of multiply-accumulates
PROPOSALS, DETECTIONS = 1000, 100  # per image, in every stage of a cascade


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def giga_macs(module, size) -> float:
    x = torch.empty(1, 3, *size, device="meta")
    return count_macs(module, x, attention=False)[""] / 1e9


def built(variant):
    with torch.device("meta"):
        return official.build(variant)


def configured(name):
    with torch.device("meta"):
        return config.build_model(model_zoo.get_config(f"CEDNet/{name}"), device="meta").eval()


class Run(nn.Module):
    """A module of several inputs as one of a tuple, with its outputs kept."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        self.outputs = self.module(*inputs)


_KNOWN: dict[tuple[str, str], tuple] = {}


def cost(module, *inputs):
    """Giga multiply-accumulates and outputs of a module; equal ones are run once."""
    key = (str(module), str(inputs))  # tensors on the meta device print their shapes
    if key not in _KNOWN:
        run = Run(module)
        _KNOWN[key] = count_macs(run, inputs, attention=False)[""] / 1e9, run.outputs
    return _KNOWN[key]


def backbone_cost(backbone, size):
    """Giga multiply-accumulates and maps of a backbone."""
    x = torch.empty(1, 3, *size, device="meta")
    if not isinstance(backbone, CEDNet):
        return cost(backbone, x)
    macs, (c2, stages) = cost(backbone.trunk, x)
    maps = dict(zip(("c2", "c3", "c4", "c5"), (c2, *stages[-1])))
    if backbone.pyramid is None:
        return macs, maps
    levels_macs, levels = cost(backbone.pyramid, *maps.values())
    return macs + levels_macs, levels


class Heads(nn.Module):
    """What a model computes from its backbone's maps before it decides on boxes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, maps):
        model = self.model
        if hasattr(model, "sem_seg_head"):
            model.sem_seg_head.scores(maps)
        elif hasattr(model, "roi_heads"):
            self.two_stages(maps)
        else:
            model.head([maps[name] for name in model.head_in_features])

    def two_stages(self, maps):
        self.model.proposal_generator.rpn_head([maps[f"p{k}"] for k in range(2, 7)])
        heads, channels = self.model.roi_heads, maps["p2"].shape[1]
        stages = heads.box_head, heads.box_predictor, heads.mask_head
        if not isinstance(heads.box_predictor, nn.ModuleList):
            stages = [[each] for each in stages]
        for box_head, predictor, mask_head in zip(*stages, strict=True):
            predictor(box_head(torch.empty(PROPOSALS, channels, 7, 7, device="meta")))
            mask_head.layers(torch.empty(DETECTIONS, channels, 14, 14, device="meta"))


def whole_cost(model, size) -> float:
    macs, maps = backbone_cost(model.backbone, size)
    return macs + count_macs(Heads(model), maps, attention=False)[""] / 1e9


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
    assert giga_macs(last_only, IMAGENET) == pytest.approx(macs, rel=CLOSE)


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
    backbone = built(variant).backbone
    assert parameters(backbone) == count
    assert backbone_cost(backbone, DETECTION)[0] == pytest.approx(macs, rel=CLOSE)


# ------------------------------------------------ whole models


@pytest.mark.parametrize(
    ("name", "count", "macs"),
    [
        ("retinanet_cednet_next_t", 38_635_380, 254.5),
        ("retinanet_cednet_next_s", 60_984_052, 335.4),
        ("retinanet_cednet_next_b", 99_121_652, 469.0),
        ("retinanet_cednet_next_t_no_lr_blocks", 38_475_636, 254.4),
        ("retinanet_cednet_next_t_unet", 38_884_820, 255.0),
        ("retinanet_cednet_next_t_hourglass", 38_880_724, 256.5),
        ("retinanet_cednet_swin_t", 37_135_517, 261.7),
        ("retinanet_cednet_cswin_t", 33_566_132, 251.9),
        ("retinanet_cednet_r50_t", 39_384_692, 240.2),
        ("mask_rcnn_cednet_next_t", 49_741_424, 274.0),
        ("mask_rcnn_cednet_next_s", 72_090_096, 354.8),
        ("mask_rcnn_cednet_next_b", 110_235_888, 489.0),
        ("mask_rcnn_cednet_swin_t", 48_241_561, 281.2),
        ("mask_rcnn_cednet_cswin_t", 44_663_984, 270.8),
        ("cascade_mask_rcnn_cednet_next_t", 87_576_626, 752.8),
        ("cascade_mask_rcnn_cednet_next_s", 109_925_298, 833.7),
        ("cascade_mask_rcnn_cednet_next_b", 148_071_090, 967.8),
        ("retinanet_convnext_t_fpn", 38_759_572, 243.1),
        ("retinanet_convnext_s_fpn", 60_394_132, 329.5),
        ("mask_rcnn_convnext_t", 48_095_376, 262.1),
        ("mask_rcnn_convnext_s", 69_729_936, 348.4),
        ("cascade_mask_rcnn_convnext_t", 85_930_578, 741.0),
        ("retinanet_r50_fpn", 37_968_692, 239.3),
    ],
)
def test_detectors(name, count, macs):
    model = configured(name)
    assert parameters(model) == count
    assert whole_cost(model, DETECTION) == pytest.approx(macs, rel=CLOSE)


@pytest.mark.parametrize(
    ("name", "count", "macs"),
    [
        ("upernet_cednet_next_t", 60_976_812, 962.4),
        ("upernet_cednet_next_s", 83_325_484, 1045.2),
        ("upernet_cednet_next_b", 122_896_684, 1184.3),
        ("upernet_convnext_t", 60_242_636, 938.9),
    ],
)
def test_segmenters(name, count, macs):
    """The auxiliary head is among the parameters and not in the cost."""
    model = configured(name)
    assert parameters(model) == count
    assert whole_cost(model, ADE20K) == pytest.approx(macs, rel=CLOSE)


@pytest.mark.parametrize(
    ("name", "millions", "macs"),
    [
        ("retinanet_swin_t_fpn", 39, 245),
        ("retinanet_swin_s_fpn", 60, 335),
        ("retinanet_swin_b_fpn", 98, 477),
        ("mask_rcnn_swin_t", 48, 264),
        ("mask_rcnn_swin_s", 69, 354),
        ("mask_rcnn_swin_b", 107, 496),
        ("cascade_mask_rcnn_swin_t", 86, 745),
        ("cascade_mask_rcnn_swin_s", 107, 838),
        ("cascade_mask_rcnn_swin_b", 145, 982),
        ("cascade_mask_rcnn_convnext_s", 108, 827),
        ("cascade_mask_rcnn_convnext_b", 146, 964),
        ("upernet_convnext_s", 82, 1027),
        ("upernet_convnext_b", 122, 1170),
    ],
)
def test_baselines_that_are_only_published_rounded(name, millions, macs):
    model = configured(name)
    size = ADE20K if name.startswith("upernet") else DETECTION
    assert abs(parameters(model) / 1e6 - millions) < 1
    assert whole_cost(model, size) == pytest.approx(macs, rel=CLOSE)


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_a_real_pass_is_counted_like_the_shapes(kind):
    """So tools/analyze_model.py prints the figures above, in spite of NMS and thresholds."""
    size = (64, 96)
    with torch.device("meta"):
        shapes = tiny.detector(kind)
    model = tiny.detector(kind)
    report = analyze(model, tasks=["params", "flops"], input_size=size, attention=False)
    assert report["params"] == parameters(shapes)
    assert report["macs"] / 1e9 == pytest.approx(whole_cost(shapes, size), rel=CLOSE)
    assert report["modules"]["backbone"]["params"] == parameters(shapes.backbone)


# ------------------------------------------------ ablations


@pytest.mark.parametrize(
    ("blocks", "millions"),
    [
        ([(6, 9, 3)], (26.7, 26.9)),
        ([(6, 12, 6)], (36.1, 36.4)),
        ([(5, 10, 5), (1, 2, 1)], (37.39, 37.64)),
        ([(4, 8, 4), (2, 4, 2)], (37.39, 37.64)),
        ([(3, 6, 3), (3, 6, 3)], (37.39, 37.64)),
        ([(2, 4, 2), (4, 8, 4)], (37.39, 37.64)),
        ([(1, 2, 1), (5, 10, 5)], (37.39, 37.64)),
        ([(2, 4, 2)] * 3, (38.64, 38.88)),
        ([(1, 4, 1)] * 4, (39.01, 39.26)),
    ],
)
def test_ablations_of_stages_and_blocks(blocks, millions):
    """RetinaNets; the trunk is all that differs from the standard one."""
    digits = 1 if millions[0] * 10 % 1 < 1e-6 else 2
    with torch.device("meta"):
        standard = parameters(CEDNetTrunk())
        counts = [
            38_635_380 - standard + parameters(CEDNetTrunk(blocks=blocks, last_decoder=last))
            for last in (False, True)
        ]
    assert tuple(round(count / 1e6, digits) for count in counts) == millions


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
