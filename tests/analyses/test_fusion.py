"""Time of the first fusion, by kind of backbone."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone import Backbone
from torch import nn

from d2dense.analyses import fusion
from d2dense.analyses.fusion import FusionTime, fusion_time
from d2dense.config import detectors
from d2dense.errors import UserError
from d2dense.modeling import TimmBackbone


def built(node):
    with torch.device("meta"):
        return instantiate(node)


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_all_of_a_plain_network_works_before_its_pyramid():
    pyramid = built(detectors.timm_fpn("convnext_atto"))
    time = fusion_time(pyramid)
    assert time == FusionTime(parameters(pyramid.bottom_up), parameters(pyramid))
    assert 0.5 < time.share < 1
    model = nn.Module()
    model.backbone, model.head = pyramid, nn.Linear(10_000, 1_000, device="meta")
    assert fusion_time(model) == time


def test_hrnet_fuses_in_its_second_stage():
    node = L(TimmBackbone)(name="hrnet_w18_small", out_indices=[1, 2, 3, 4])
    alone = built(node)
    before = sum(
        p.numel()
        for name, p in alone.model.named_parameters()
        if name.split(".")[0] in ("conv1", "bn1", "conv2", "bn2", "layer1", "transition1")
        or name.startswith("stage2.0.branches.")
    )
    assert fusion_time(alone) == FusionTime(before, parameters(alone))
    pyramid = built(detectors.timm_fpn("hrnet_w18_small", out_norm=""))
    assert fusion_time(pyramid).before == before  # it does not wait for the pyramid


class Fusing(Backbone):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)
        self.shared = self.first.weight

    def forward(self, x):
        return {}


def test_rules_of_others_and_shared_parameters(monkeypatch):
    monkeypatch.setattr(fusion, "_rules", {})
    with pytest.raises(UserError, match="not known where Fusing fuses features first"):
        fusion_time(Fusing())
    fusion.register_fusion_rule(Fusing, lambda backbone: [backbone.first, backbone.first])
    assert fusion_time(Fusing()) == FusionTime(16, 16 + 25)


def test_a_network_without_pyramid_never_fuses():
    plain = built(L(TimmBackbone)(name="convnext_atto"))
    with pytest.raises(UserError, match="not known where timm's"):
        fusion_time(plain)
