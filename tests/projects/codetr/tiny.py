"""Small collaborative detectors."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone

from codetr import ATSSHead, CoDETR, FasterRCNNHead, MultiScaleAdapter, PositiveQueries
from codetr.heads.rpn import ProposalNetwork
from d2dense.modeling.detr import (
    BoxPositions,
    ContrastiveDenoising,
    DeformableDecoder,
    DeformableEncoder,
    DETRCriterion,
    HungarianMatcher,
    PredictionHeads,
    TwoStageQueries,
)
from tests.projects.codetr import plain

CHANNELS, CLASSES, LEVELS = 32, 5, 2
STRIDES = (8, 16)
KINDS = ("deformable", "dino")


class Pyramid(Backbone):
    """Strides 8 and 16."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, CHANNELS, 8, stride=8)
        self.down = torch.nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2)

    def forward(self, x):
        fine = self.stem(x)
        return {"p3": fine, "p4": self.down(fine.relu())}

    def output_shape(self):
        return {
            f"p{i}": ShapeSpec(channels=CHANNELS, stride=stride)
            for i, stride in zip((3, 4), STRIDES)
        }


def rcnn(**changes) -> FasterRCNNHead:
    rpn = {"samples": 64, "train_proposals": 40, "test_proposals": 40, **changes.pop("rpn", {})}
    sizes = {"channels": CHANNELS, "strides": (*STRIDES, 32)}
    settings = {"num_classes": CLASSES, "roi_levels": 2, "hidden": 32, "samples": 32}
    return FasterRCNNHead(rpn=ProposalNetwork(**sizes, **rpn), **sizes, **{**settings, **changes})


def atss(**changes) -> ATSSHead:
    settings = {"channels": CHANNELS, "strides": (*STRIDES, 32), "num_classes": CLASSES}
    return ATSSHead(**{**settings, **changes})


def base(kind: str = "deformable") -> dict:
    """The arguments of the detector without its collaborative parts."""
    dino = kind == "dino"
    attention = {"channels": CHANNELS, "levels": LEVELS, "heads": 4, "points": 2}
    layers = {**attention, "feedforward": 32, "dropout": 0.0, "layers": 2}
    sizes = {"channels": CHANNELS, "num_classes": CLASSES}
    return {
        "backbone": Pyramid(),
        "in_features": ["p3", "p4"],
        "neck": None,
        "encoder": DeformableEncoder(**layers),
        "queries": TwoStageQueries(num_queries=20, binary=not dino, positions=not dino, **sizes),
        "decoder": DeformableDecoder(
            **layers,
            box_refinement=True,
            look_forward_twice=True,
            final_norm=dino,
            positions=BoxPositions(channels=CHANNELS) if dino else None,
        ),
        "heads": PredictionHeads(layers=2, shared=False, **sizes),
        "criterion": DETRCriterion(
            matcher=HungarianMatcher(),
            num_classes=CLASSES,
            class_loss="quality_focal" if dino else "focal",
        ),
        "denoising": ContrastiveDenoising(num_queries=10, **sizes) if dino else None,
        "num_classes": CLASSES,
        "pixel_mean": [0.0] * 3,
        "pixel_std": [60.0] * 3,
        "max_detections": 10,
    }


def detector(kind: str = "deformable", *, heads=(rcnn, atss), queries=None, **changes) -> CoDETR:
    """A detector in training mode, the same one for the same arguments.

    Args:
        heads: what makes them
        queries: changed arguments of the positive queries; False: there are none
    """
    torch.manual_seed(0)
    made = [each() for each in heads]
    arguments = {"features": kind != "dino", "positions": kind != "dino", "random": False}
    arguments = {**arguments, **(queries or {})}
    model = CoDETR(
        **base(kind),
        adapter=MultiScaleAdapter(channels=CHANNELS, groups=8),
        auxiliary_heads=made,
        positive_queries=(
            None
            if queries is False
            else PositiveQueries(heads=len(made), channels=CHANNELS, **arguments)
        ),
        **changes,
    )
    for name, parameter in model.named_parameters():  # far from the start, where much is zero
        if parameter.ndim > 1 and name.startswith(("auxiliary", "heads", "queries.boxes")):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def inputs(sizes=((64, 96), (80, 72)), counts=(4, 2), seed: int = 0) -> list[dict]:
    """Images with objects of sizes that the anchors have."""
    draw = torch.Generator().manual_seed(seed)
    given = plain.random_instances(seed + 1, sizes, counts, num_classes=CLASSES)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=draw).float(), "instances": each}
        for size, each in zip(sizes, given)
    ]
