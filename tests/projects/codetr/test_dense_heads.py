"""What RetinaNet, FCOS, PAA, GFL and Mask R-CNN have in common: both kinds of configs, the whole
detector's losses with one of them, and no waiting for the device.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.structures import BitMasks

from codetr import nodes
from codetr.heads import HEADS
from d2dense.config import get_cfg
from d2dense.errors import UserError
from tests.modeling.waiting import OpCounter
from tests.projects.codetr import dense_heads, plain

DENSE = ["retinanet", "fcos", "paa", "gfl"]
NAMES = [*DENSE, "mask_rcnn"]
STRIDES = (8, 16, 32, 64, 128)
SIZE = (96, 128)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_defaults_are_the_constructors(name):
    settings = {"channels": 32, "strides": STRIDES, "num_classes": 3}
    theirs = inspect.signature(HEADS[name]).parameters
    given = HEADS[name].from_config(get_cfg(), **settings)
    assert {key: given[key] for key in settings} == settings
    rest = {key: value for key, value in given.items() if key not in {*settings, "rpn"}}
    if name == "mask_rcnn":
        theirs = {**inspect.signature(HEADS["faster_rcnn"]).parameters, **theirs}
    assert len(rest) > 4
    for key, value in rest.items():
        default = theirs[key].default
        assert value == (list(default) if isinstance(value, list) else default), key


@pytest.mark.parametrize("name", DENSE)
def test_yaml_keys_reach_the_head(name):
    cfg = get_cfg()
    node = cfg.MODEL.CODETR[name.upper()]
    node.CONVS, node.SCORE_THRESHOLD, node.NMS_THRESHOLD = 2, 0.2, 0.3
    node.CANDIDATES_PER_LEVEL, node.MAX_DETECTIONS = 40, 5
    head = HEADS[name](cfg, channels=32, strides=STRIDES, num_classes=3)
    expected = {
        "score_threshold": 0.2,
        "nms_threshold": 0.3,
        "candidates_per_level": 40,
        "max_detections": 5,
    }
    assert expected.items() <= head.detection.items()
    one = HEADS[name](channels=32, strides=STRIDES, num_classes=3)
    more = sum(p.numel() for p in head.parameters()) - sum(p.numel() for p in one.parameters())
    bias, norm = (name in ("retinanet", "fcos")), (name != "retinanet")
    assert more == 2 * (32 * 32 * 9 + 32 * bias + 2 * 32 * norm)


class Cells(Backbone):
    """Maps of strides 8, 16 and 32."""

    size_divisibility = 32

    def __init__(self):
        super().__init__()
        self.mixes = torch.nn.ModuleList(torch.nn.Conv2d(3, 8, s, stride=s) for s in (8, 16, 32))

    def forward(self, x):
        return {f"res{k + 3}": mix(x) for k, mix in enumerate(self.mixes)}

    def output_shape(self):
        return {f"res{k + 3}": ShapeSpec(channels=8, stride=8 * 2**k) for k in range(3)}


def detector(*names):
    """A small Deformable-DETR++ with auxiliary heads."""
    torch.manual_seed(0)
    body = nodes.Body(torch.nn.Identity, {"res3": 8, "res4": 8, "res5": 8})
    node = nodes.deformable_detr_plus_plus(body, num_classes=3, num_queries=20)
    node = nodes.collaborative(node, *names)
    for part in (node.encoder, node.decoder):
        part.update(layers=2, feedforward=32)
    for head in node.auxiliary_heads:
        if "rpn" in head:
            head.update(hidden=16, samples=64)
            head.rpn.update(train_proposals=100, test_proposals=100)
        if issubclass(head._target_, HEADS["mask_rcnn"]):
            head.update(mask_convs=1, mask_channels=8)
    model = instantiate(node)
    model.backbone = Cells()
    return model.train()


def batch(counts):
    result = []
    objects = plain.random_instances(3, [SIZE, (80, 100)], counts, num_classes=3, least=0.2)
    for seed, each in enumerate(objects):
        each.gt_masks = BitMasks(torch.ones(len(each), *each.image_size, dtype=torch.bool))
        draw = torch.Generator().manual_seed(seed)
        image = torch.randint(256, (3, *each.image_size), generator=draw, dtype=torch.uint8)
        result.append({"image": image, "instances": each})
    return result


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_detector_learns(name, counts):
    model = detector(name)
    losses = model(batch(counts))
    assert {key for key in losses if key.endswith("0")} >= {"loss_cls0", "loss_bbox0"}
    assert "loss_cls_aux0" in losses
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_six_heads_at_once():
    names = ["faster_rcnn", "atss", "paa", "retinanet", "fcos", "gfl"]
    model = detector(*names)
    losses = model(batch((3, 2)))
    for number in range(6):
        assert f"loss_cls{number}" in losses
        assert f"d0.loss_bbox_aux{number}" in losses
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_branch_can_be_evaluated(name):
    model = detector(name).eval()
    model.evaluate_branch = 0
    with torch.no_grad():
        results = model(batch((0, 0)))
    assert len(results) == 2
    for result, size in zip(results, (SIZE, (80, 100))):
        assert result["instances"].image_size == size
        if name == "mask_rcnn":
            assert result["instances"].pred_masks.shape[1:] == size


@pytest.mark.parametrize("name", DENSE)
def test_losses_never_wait_for_the_device(name):
    torch.manual_seed(0)
    head = HEADS[name](channels=32, strides=STRIDES, num_classes=3)
    maps = plain.random_maps(1, SIZE, STRIDES, images=2, channels=32)
    objects = plain.random_instances(3, [SIZE, (80, 100)], (3, 2), num_classes=3)
    with OpCounter() as ops:
        losses, _ = head.losses(maps, objects)
        sum(losses.values()).backward()
    assert ops.total > 100
    assert ops.waiting == 0


POSITIVE = {"fcos": ("huge", "twice", "a thousand"), "gfl": ("huge", "twice", "a thousand")}


@pytest.mark.parametrize("objects", dense_heads.ODD)
@pytest.mark.parametrize("name", DENSE)
def test_odd_objects(name, objects):
    maps, _ = dense_heads.random_case()
    head, given = dense_heads.dense_head(name), dense_heads.odd_objects(objects)
    losses, candidates, gradients = plain.gradients(head, maps, given)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert candidates.boxes.isfinite().all()
    # RetinaNet and PAA give every object its best anchors, however small it is
    positive = POSITIVE.get(name, ("tiny", "huge", "twice", "a thousand"))
    assert (candidates.labels < dense_heads.CLASSES).any() == (objects in positive)


@pytest.mark.parametrize("name", DENSE)
def test_losses_are_float32_under_autocast(name):
    maps, objects = dense_heads.random_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = dense_heads.dense_head(name).losses(maps, objects)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_without_a_tower_they_say_so(name):
    with pytest.raises(UserError, match="convs=0"):
        dense_heads.dense_head(name, convs=0)
