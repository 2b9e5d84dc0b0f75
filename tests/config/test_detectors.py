"""The shared detectors: sizes and costs published for them, training, and class counts."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode

from d2dense.config import detectors
from d2dense.errors import UserError
from d2dense.layers import replace_sync_norms

RESNET = {"out_norm": ""}
# parameters, and multiply-adds in 10^9 at 800 x 1280 (1000 boxes and 100 masks per image)
PUBLISHED = {
    "retinanet convnext_tiny": (38_759_572, 243.1),
    "retinanet convnext_small": (60_394_132, 329.5),
    "retinanet resnet50": (37_968_692, 239.3),
    "mask_rcnn convnext_tiny": (48_095_376, 262.1),
    "mask_rcnn convnext_small": (69_729_936, 348.4),
    "cascade_mask_rcnn convnext_tiny": (85_930_578, 741.0),
}


def node(detector: str, backbone: str, channels: int = 256, **settings):
    top = "p6p7" if detector == "retinanet" else "maxpool"
    pyramid = detectors.timm_fpn(backbone, top=top, channels=channels, **settings)
    return getattr(detectors, detector)(backbone=pyramid, channels=channels)


def macs(model) -> int:
    """Multiply-adds of every part on shapes alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        levels = model.backbone(torch.empty(1, 3, 800, 1280, device="meta"))
        if hasattr(model, "head"):
            model.head([levels[name] for name in model.head_in_features])
        else:
            model.proposal_generator.rpn_head([levels[f"p{k}"] for k in range(2, 7)])
            heads = model.roi_heads
            stages = [heads.box_head, heads.box_predictor, getattr(heads, "mask_head", None)]
            if not isinstance(heads.box_predictor, torch.nn.ModuleList):
                stages = [[each] for each in stages]
            for box_head, predictor, mask_head in zip(*stages):
                predictor(box_head(torch.empty(1000, 256, 7, 7, device="meta")))
                if mask_head is not None:
                    mask_head.layers(torch.empty(100, 256, 14, 14, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    with torch.device("meta"):
        model = instantiate(node(*name.split(), **(RESNET if "resnet" in name else {}))).eval()
    parameters, giga = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs(model) / 1e9 == pytest.approx(giga, rel=0.01)


# ------------------------------------------------ small ones train


def tiny(detector: str):
    return node(detector, "test_convnext", channels=16)


def batch(counts=(3, 0)) -> list[dict]:
    result = []
    for n, count in enumerate(counts):
        generator = torch.Generator().manual_seed(n)
        corner = torch.rand(count, 2, generator=generator) * 40
        target = Instances((96, 128))
        target.gt_boxes = Boxes(torch.cat([corner, corner + 45], dim=1))
        target.gt_classes = torch.arange(count) % 3
        target.gt_masks = BitMasks(torch.ones(count, 96, 128, dtype=torch.bool))
        image = torch.randint(0, 256, (3, 96, 128), generator=generator).to(torch.uint8)
        result.append({"image": image, "instances": target})
    return result


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"])
def test_every_parameter_that_trains_gets_a_gradient(detector):
    config = tiny(detector)
    if detector == "retinanet":
        config.num_classes = 3
    else:
        config.roi_heads.num_classes = 3
    torch.manual_seed(0)
    model = instantiate(config).train()
    replace_sync_norms(model)
    with EventStorage():
        losses = model(batch())
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    assert {m.num_classes for m in model.modules() if hasattr(m, "num_classes")} >= {3}
    assert 80 not in {getattr(m, "num_classes", 0) for m in model.modules()}
    with torch.no_grad():
        found = model.eval()(batch())
    assert all("instances" in each for each in found)


def test_the_nodes_can_be_saved_and_loaded(tmp_path):
    for detector in ("retinanet", "mask_rcnn", "cascade_mask_rcnn"):
        config = tiny(detector)
        LazyConfig.save(config, str(tmp_path / "saved.yaml"))
        again = LazyConfig.load(str(tmp_path / "saved.yaml"))
        with torch.device("meta"):
            first, second = (instantiate(each).state_dict() for each in (config, again))
        assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}


def test_an_unknown_top_is_named():
    with pytest.raises(UserError, match="'p6'; expected maxpool or p6p7"):
        detectors.timm_fpn("convnext_tiny", top="p6")
