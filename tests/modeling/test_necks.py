"""BiFPN, NAS-FPN and HRNet's pyramid: hand-computed fusion, sizes, gradients, and the sizes of
published models.
"""

from __future__ import annotations

import cv2
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch.utils.flop_counter import FlopCounterMode

from d2dense.config import detectors
from d2dense.errors import UserError
from d2dense.modeling import TimmBackbone
from d2dense.modeling.necks import HRFPN, NASFPN, BiFPN, PaddedFPN
from d2dense.modeling.necks.bifpn import FusionNode
from d2dense.modeling.necks.nas_fpn import _attend
from d2dense.modeling.necks.pyramid import resize

FUSING = {"bifpn": BiFPN, "nas_fpn": NASFPN}
NECKS = {**FUSING, "hrfpn": HRFPN}
every_neck = pytest.mark.parametrize("neck", NECKS.values(), ids=NECKS)


def build(neck, **settings):
    torch.manual_seed(0)
    features = ["res3", "res4", "res5"]
    bottom_up = TimmBackbone(name="test_convnext", out_norm="LN", out_features=features)
    return neck(bottom_up=bottom_up, in_features=features, out_channels=16, **settings)


@every_neck
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (32, 32), (224, 64)])
@torch.no_grad()
def test_levels_halve_at_every_size(neck, size):
    pyramid = build(neck).eval()
    levels = pyramid(torch.randn(2, 3, *size))
    assert list(levels) == list(pyramid.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert pyramid.size_divisibility == 32
    for name, shape in pyramid.output_shape().items():
        expected = [-(-side // shape.stride) for side in size]
        assert list(levels[name].shape) == [2, 16, *expected]
        assert levels[name].isfinite().all()


@every_neck
def test_every_parameter_that_trains_gets_a_gradient(neck):
    pyramid = build(neck).train()
    sum(level.square().mean() for level in pyramid(torch.randn(2, 3, 64, 64)).values()).backward()
    for name, parameter in pyramid.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


@pytest.mark.parametrize("neck", FUSING.values(), ids=FUSING)
@torch.no_grad()
def test_every_input_reaches_every_level(neck):
    pyramid = build(neck).eval()
    levels = [torch.randn(1, 16, 32 >> k, 32 >> k) for k in range(5)]
    before = pyramid.fuse(levels)
    for k in range(5):
        changed = [x + 1.0 * (j == k) * torch.randn_like(x) for j, x in enumerate(levels)]
        for a, b in zip(before, pyramid.fuse(changed)):
            assert not torch.equal(a, b)


@torch.no_grad()
def test_a_node_is_a_mean_with_weights_that_are_never_negative():
    node = FusionNode(3, 4, "")
    torch.nn.init.dirac_(node.depthwise.weight, groups=4)
    torch.nn.init.dirac_(node.pointwise.weight)
    node.pointwise.bias.zero_()
    node.weights.copy_(torch.tensor([1.0, 3.0, -5.0]))
    x = torch.randn(3, 1, 4, 5, 5)
    mean = (x[0] + 3 * x[1]) / (4 + 1e-4)
    expected = mean * torch.sigmoid(mean)
    torch.testing.assert_close(node(list(x)), expected)


@pytest.mark.parametrize("seen", [(64, 96), (32, 32)])  # in the small one coarse levels are equal
@every_neck
@torch.no_grad()
def test_traced_pyramids_equal_eager_at_other_sizes(neck, seen):
    pyramid = build(neck).eval()
    traced = torch.jit.trace(pyramid, torch.randn(1, 3, *seen), strict=False, check_trace=False)
    for size in ((96, 64), (160, 128), (32, 64)):
        x = torch.randn(2, 3, *size)
        for name, level in pyramid(x).items():
            torch.testing.assert_close(traced(x)[name], level, rtol=1e-4, atol=1e-5)


def test_resizing_takes_neighbours_up_and_maxima_down():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    up = resize(x, torch.zeros(1, 1, 4, 4))
    assert up[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert resize(up, torch.zeros(1, 1, 1, 2))[0, 0].tolist() == [[3, 4]]
    assert resize(x, torch.zeros(1, 1, 2, 2)) is x


def test_attention_weighs_channels_by_the_mean_of_the_other_map():
    semantic, detail = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 4, 4)
    got = _attend(semantic, detail, detail)
    for c in range(3):
        share = 1 / (1 + torch.exp(-detail[0, c].mean()))
        for y in range(4):
            for x in range(4):
                expected = detail[0, c, y, x] + share * semantic[0, c, y // 2, x // 2]
                torch.testing.assert_close(got[0, c, y, x], expected)


CONVNEXT = L(TimmBackbone)(
    name="convnext_tiny", out_features=["res3", "res4", "res5"], out_norm="LN"
)
HRNET = L(TimmBackbone)(
    name="hrnet_w32", out_indices=[1, 2, 3, 4], options={"feature_location": ""}
)


@pytest.mark.parametrize(
    ("neck", "bottom_up", "settings", "millions", "giga"),
    [
        (NASFPN, CONVNEXT, {"num_stages": 3}, 47, 289),
        (BiFPN, CONVNEXT, {"num_layers": 7}, 39, 248),
        (HRFPN, HRNET, {}, 39, 320),
    ],
)
def test_detectors_have_about_the_published_size(neck, bottom_up, settings, millions, giga):
    """Their code is not released: parameters as printed, multiply-adds within 3 %."""
    with torch.device("meta"):
        backbone = L(neck)(bottom_up=bottom_up, **settings)
        model = instantiate(detectors.retinanet(backbone=backbone)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            levels = model.backbone(torch.empty(1, 3, 800, 1280))
            model.head(list(levels.values()))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.03)


class Maps(Backbone):
    """Gives the maps it is asked for, whatever the image."""

    def __init__(self, **maps):
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return self.maps

    def output_shape(self):
        side = max(x.shape[-1] for x in self.maps.values())
        return {
            name: ShapeSpec(channels=x.shape[1], stride=4 * side // x.shape[-1])
            for name, x in self.maps.items()
        }


@torch.no_grad()
def test_hrnets_pyramid_pools_the_mixed_finest_map():
    fine, coarse = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)
    pyramid = HRFPN(
        bottom_up=Maps(res2=fine, res3=coarse),
        in_features=["res2", "res3"],
        out_channels=5,
        out_strides=[4, 16],
    )
    torch.nn.init.zeros_(pyramid.mix.bias)
    for conv in pyramid.output:
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    large = cv2.resize(coarse[0].permute(1, 2, 0).numpy(), (8, 8))  # half-pixel bilinear
    joined = torch.cat([fine[0], torch.from_numpy(large).permute(2, 0, 1)])
    mixed = torch.einsum("oi,ihw->ohw", pyramid.mix.weight[:, :, 0, 0], joined)
    got = pyramid(torch.zeros(1, 3, 32, 32))
    assert list(got) == ["p2", "p4"]
    torch.testing.assert_close(got["p2"][0], mixed, atol=1e-5, rtol=1e-5)
    for y in range(2):
        for x in range(2):
            block = mixed[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean(dim=(1, 2))
            torch.testing.assert_close(got["p4"][0, :, y, x], block, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"stride 4 to strides \[2, 4\]; expected multiples"):
        HRFPN(bottom_up=pyramid.bottom_up, in_features=["res2"], out_strides=[2, 4])


@pytest.mark.parametrize("neck", [*NECKS.values(), PaddedFPN])
def test_batches_can_be_filled_up_to_larger_multiples(neck):
    assert build(neck).size_divisibility == 32
    assert build(neck, size_divisibility=128).size_divisibility == 128
    with pytest.raises(UserError, match=r"is 48, but the coarsest map .* stride 32"):
        build(neck, size_divisibility=48)


def test_inputs_that_do_not_halve_are_named():
    bottom_up = TimmBackbone(name="test_convnext")
    with pytest.raises(UserError, match=r"cannot stand on res2, res4 with strides \[4, 16\]"):
        BiFPN(bottom_up=bottom_up, in_features=["res2", "res4"])
