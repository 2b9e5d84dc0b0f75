"""The detectors of the DETR family, small, made by the nodes that configs are made of."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.structures import BitMasks
from torch import nn

from codetr import nodes
from codetr.heads import HEADS
from tests.projects.codetr import plain

CLASSES = 3
QUERIES = 20
WIDTHS = {f"res{k}": 8 for k in (2, 3, 4, 5)}
BASES = {
    "deformable_detr": nodes.deformable_detr,
    "deformable_detr_pp": nodes.deformable_detr_plus_plus,
    "dino_4scale": lambda body, **settings: nodes.dino(body, levels=4, **settings),
    "dino_5scale": nodes.dino,
    "conditional_detr": nodes.conditional_detr,
    "dab_detr": nodes.dab_detr,
}
# what else positive queries of a base need
QUERY_SETTINGS = {
    "dino_4scale": {"positions": False, "features": False},
    "dino_5scale": {"positions": False, "features": False},
    "conditional_detr": {"points": True},
}

PAIR = ("faster_rcnn", "atss")
# each base without and with the paper's heads, and each other head once
SETS = [
    *((base, heads) for base in BASES for heads in ((), PAIR)),
    *(("deformable_detr_pp", (name,)) for name in HEADS if name not in PAIR),
]
every = pytest.mark.parametrize(
    ("base", "heads"), SETS, ids=["-".join((base, *heads)) for base, heads in SETS]
)


class Block(nn.Module):
    """Makes a map half as large."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, stride, stride=stride)

    def forward(self, x):
        return self.conv(x).tanh()


class Stages(Backbone):
    """Maps of strides 4 to 32 of which any may be asked for."""

    size_divisibility = 32

    def __init__(self, out_features):
        super().__init__()
        self.out_features = list(out_features)
        self.stages = nn.ModuleList(
            Block(8 if k else 3, 8, 2 if k else 4) for k in range(len(WIDTHS))
        )

    def forward(self, x):
        found = {}
        for name, stage in zip(WIDTHS, self.stages):
            x = found[name] = stage(x)
        return {name: found[name] for name in self.out_features}

    def output_shape(self):
        strides = dict(zip(WIDTHS, (4, 8, 16, 32)))
        return {n: ShapeSpec(channels=8, stride=strides[n]) for n in self.out_features}


def detector(base: str, *heads: str, seed: int = 0, classes: int = CLASSES, **changes):
    """A detector without dropout in training mode, with auxiliary heads by name; its predictions
    differ from query to query.

    Args:
        changes: of the detector's arguments
    """
    torch.manual_seed(seed)
    node = BASES[base](nodes.Body(nn.Identity, WIDTHS), num_classes=classes, channels=64)
    for part in (node.encoder, node.decoder):
        part.update(layers=2, heads=4, feedforward=32, dropout=0.0)
    node.queries.num_queries = QUERIES
    if "denoising" in node:
        node.denoising.num_queries = 8
    node = nodes.collaborative(node, *heads, **(QUERY_SETTINGS.get(base, {}) if heads else {}))
    for head in node.get("auxiliary_heads", ()):
        if issubclass(head._target_, HEADS["faster_rcnn"]):
            head.update(hidden=16, samples=64)
            head.rpn.update(train_proposals=100, test_proposals=100)
        if issubclass(head._target_, HEADS["mask_rcnn"]):
            head.update(mask_convs=1, mask_channels=8)
    node.update(changes)
    used = list(node.in_features)
    model = instantiate(node)
    model.backbone = Stages(used)
    for each in {*model.heads.boxes, getattr(model.queries, "boxes", model.heads.boxes[0])}:
        nn.init.normal_(each.layers[-1].weight, std=0.5)  # untrained ones move nothing
    for each in {*model.heads.classes, getattr(model.queries, "classes", model.heads.classes[0])}:
        nn.init.normal_(each.weight, std=0.5)
    return model.train()


def image(height: int, width: int, boxes=(), labels=None, *, seed: int = 0) -> dict:
    """An image with these objects, which have masks too."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)
    labels = [k % CLASSES for k in range(len(boxes))] if labels is None else labels
    given = plain.instances((height, width), boxes, labels)
    given.gt_masks = BitMasks(torch.ones(len(given), height, width, dtype=torch.bool))
    return {"image": pixels, "instances": given, "height": height, "width": width}


def batch(counts=(3, 2), sizes=((96, 128), (70, 100)), *, classes: int = CLASSES) -> list[dict]:
    """Images of several sizes, with as many objects."""
    objects = plain.random_instances(3, sizes, counts, num_classes=classes, least=0.1)
    return [
        image(*size, each.gt_boxes.tensor, each.gt_classes, seed=seed)
        for seed, (size, each) in enumerate(zip(sizes, objects))
    ]
