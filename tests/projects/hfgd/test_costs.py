"""Parameters and multiply-accumulates of every component, and the paper's Table 5 (513 x 513, 59
classes), of the zoo's own configs on the meta device.
"""

import functools

import pytest
import torch

from d2dense import config, model_zoo
from d2dense.costs import count_macs, count_parameters
from d2dense.layers import fold_for_inference

CLOSE = 0.005
CROP = 513
TORCHVISION = [
    "MODEL.BACKBONE.NAME=TimmBackbone",
    "MODEL.TIMM.NAME=resnet50",
    "MODEL.TIMM.OUT_INDICES=[1,2,3,4]",
]
DEEP_STEM = [TORCHVISION[0], "MODEL.TIMM.NAME=resnet50s", TORCHVISION[2]]
LAYOUTS = {"author": [], "torchvision": TORCHVISION, "deep_stem": DEEP_STEM}


class Network(torch.nn.Module):
    """A segmenter without its reading of images, which the meta device cannot do."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model.backbone, model.sem_seg_head

    def forward(self, images):
        return self.head(self.backbone(images))[0]


@functools.cache
def costs(name, layout="author", stride=4):
    """Parameters and giga multiply-accumulates by module, in the form of inference."""
    items = list(LAYOUTS[layout])
    if stride != 4:
        items.append(f"MODEL.HFGD.UPSAMPLER.OUT_STRIDE={stride}")
    cfg = config.load(model_zoo.get_config_file(f"HFGD/{name}_pascal_context", "yaml"), items)
    with torch.device("meta"):
        model = Network(config.build_model(cfg, device="meta")).eval()
        fold_for_inference(model)
        macs = count_macs(model, torch.empty(1, 3, CROP, CROP))
    return count_parameters(model), {name: count / 1e9 for name, count in macs.items()}


@pytest.mark.parametrize(
    ("layout", "parameters", "macs"),
    [
        ("author", 23_631_808, 26.442),
        ("torchvision", 23_508_032, 22.552),
        ("deep_stem", 23_631_808, 29.690),
    ],
)
def test_backbones(layout, parameters, macs):
    counts, giga = costs("hfgd_r50_os4", layout)
    assert counts["backbone"] == parameters
    assert giga["backbone"] == pytest.approx(macs, rel=1e-4)


@pytest.mark.parametrize(
    ("component", "parameters", "macs"),
    [
        ("encoder", [1_772_672] * 3, [0.559] * 3),
        ("upsampler.laterals", [4_130_304] * 3, [17.369] * 3),
        ("upsampler.branches", [4_132_352, 6_493_696, 8_855_040], [18.746, 58.007, 213.836]),
        ("upsampler.end", [66_048] * 3, [1.091, 4.329, 17.247]),
        ("hfgm.attention", [526_336] * 3, [10.923, 52.011, 276.222]),
        ("hfgm.output", [66_048] * 3, [1.091, 4.329, 17.247]),
        ("classifier", [15_163] * 3, [0.251, 0.998, 3.975]),
    ],
)
@pytest.mark.parametrize("index", range(3))
def test_components_of_hfgd(component, parameters, macs, index):
    counts, giga = costs("hfgd_r50_os4", stride=(4, 2, 1)[index])
    assert counts[f"head.{component}"] == parameters[index]
    assert giga[f"head.{component}"] == pytest.approx(macs[index], rel=CLOSE)


@pytest.mark.parametrize(
    ("layout", "parameters", "macs"),
    [
        ("author", (34_340_731, 36_702_075, 39_063_419), (76.476, 164.047, 572.902)),
        ("torchvision", (34_216_955, 36_578_299, 38_939_643), (72.586, 160.157, 569.012)),
        ("deep_stem", (34_340_731, 36_702_075, 39_063_419), (79.724, 167.295, 576.150)),
    ],
)
def test_whole_hfgd(layout, parameters, macs):
    for stride, count, expected in zip((4, 2, 1), parameters, macs):
        counts, giga = costs("hfgd_r50_os4", layout, stride)
        assert counts[""] == count
        assert giga[""] == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize(
    ("layout", "parameters", "macs"),
    [
        ("author", 28_830_459, 48.611),
        ("torchvision", 28_706_683, 44.721),
        ("deep_stem", 28_830_459, 51.859),
    ],
)
def test_semantic_fpn(layout, parameters, macs):
    counts, giga = costs("semantic_fpn_r50", layout)
    assert counts[""] == parameters
    assert giga[""] == pytest.approx(macs, rel=CLOSE)
    parts = {
        "head.encoder": 0.152,
        "head.upsampler.laterals": 1.930,
        "head.upsampler.branches": 18.746,
        "head.upsampler.end": 1.091,
        "head.classifier": 0.251,
    }
    for name, expected in parts.items():
        assert giga[name] == pytest.approx(expected, rel=CLOSE, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "stride", "paper", "deviation"),
    [
        ("semantic_fpn_r50", 4, 45.65, -0.008),
        ("hfgd_r50_os4", 4, 71.63, -0.006),
        ("hfgd_r50_os4", 2, 153.62, -0.005),
        ("sa_car_r50_d8", 4, 158.96, -0.053),  # the profiler counts padding of dilated convolutions
    ],
)
def test_table_5_in_the_papers_unit(name, stride, paper, deviation):
    """Binary giga; what the profiler counts beyond convolutions and products is missing."""
    found = costs(name, stride=stride)[1][""] * 1e9 / 2**30
    assert found / paper - 1 == pytest.approx(deviation, abs=0.001)


def test_the_dilated_model():
    assert costs("sa_car_r50_d8")[1][""] == pytest.approx(161.574, rel=CLOSE)


def test_training_has_the_linear_features_besides():
    with torch.device("meta"):
        model = Network(model_zoo.get_model("HFGD/hfgd_r50_os4_pascal_context", device="meta"))
    counts = count_parameters(model)
    assert counts["head.encoder"] - 1_772_672 == 262_656 == counts["head.encoder.feature"]
    with torch.device("meta"):
        macs = count_macs(model, torch.empty(1, 3, CROP, CROP))
    assert macs["head.encoder.feature"] / 1e9 == pytest.approx(0.076, abs=5e-4)


def test_the_fine_path_is_all_that_inference_pays_for():
    """No coarse classifier: that would be 0.004 more."""
    _, giga = costs("hfgd_r50_os4")
    assert giga["head.classifier"] == pytest.approx(129 * 129 * 256 * 59 / 1e9, rel=1e-9)
