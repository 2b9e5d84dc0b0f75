"""The recorded Co-Deformable DETR with its auxiliary heads, filled by rule under official names."""

from __future__ import annotations

import functools

import numpy as np
import torch
from detectron2.structures import Boxes, ImageList, Instances

from codetr import ATSSHead, CoDETR, FasterRCNNHead, MultiScaleAdapter, PositiveQueries
from codetr.heads.rpn import ProposalNetwork
from d2dense.modeling.detr import DETRCriterion, HungarianMatcher
from tests.modeling.detr import recorded

SIZE = (192, 256)

# ours -> theirs, of what is collaborative
_POSITIVE = "query_head.transformer."
_NAMES = {
    "adapter.downsample": "query_head.downsample",
    "positive_queries.head_embedding": _POSITIVE + "head_pos_embed.weight",
    **{
        f"positive_queries.{ours}.{head}{part}": f"{_POSITIVE}{theirs}.{head}"
        for head in (0, 1)
        for ours, part, theirs in (
            ("embeddings", ".linear", "aux_pos_trans"),
            ("embeddings", ".norm", "aux_pos_trans_norm"),
            ("features", ".0", "pos_feats_trans"),
            ("features", ".1", "pos_feats_norm"),
        )
    },
    "auxiliary_heads.0.rpn.head.conv": "rpn_head.rpn_conv",
    "auxiliary_heads.0.rpn.head.objectness_logits": "rpn_head.rpn_cls",
    "auxiliary_heads.0.rpn.head.anchor_deltas": "rpn_head.rpn_reg",
    "auxiliary_heads.0.box_head.fc1": "roi_head.0.bbox_head.shared_fcs.0",
    "auxiliary_heads.0.box_head.fc2": "roi_head.0.bbox_head.shared_fcs.1",
    "auxiliary_heads.0.classes": "roi_head.0.bbox_head.fc_cls",
    "auxiliary_heads.0.boxes": "roi_head.0.bbox_head.fc_reg",
    "auxiliary_heads.1.class_tower.0": "bbox_head.0.cls_convs.0.conv",
    "auxiliary_heads.1.class_tower.1": "bbox_head.0.cls_convs.0.gn",
    "auxiliary_heads.1.box_tower.0": "bbox_head.0.reg_convs.0.conv",
    "auxiliary_heads.1.box_tower.1": "bbox_head.0.reg_convs.0.gn",
    "auxiliary_heads.1.classes": "bbox_head.0.atss_cls",
    "auxiliary_heads.1.boxes": "bbox_head.0.atss_reg",
    "auxiliary_heads.1.centerness": "bbox_head.0.atss_centerness",
    **{
        f"auxiliary_heads.1.scales.scales.{level}": f"bbox_head.0.scales.{level}.scale"
        for level in range(5)
    },
}


def official(name: str) -> str:
    """The official name of one of our collaborative parameters."""
    ours = max((part for part in _NAMES if name.startswith(part)), key=len)
    return _NAMES[ours] + name[len(ours) :]


@functools.cache
def detector(one_pass: bool = True) -> CoDETR:
    """The whole model in the setting of the recordings: exhaustive samplers, no random choice."""
    model = CoDETR(
        backbone=recorded.backbone(),
        in_features=["res3", "res4", "res5"],
        neck=recorded.neck(),
        encoder=recorded.encoder(),
        queries=recorded.queries(),
        decoder=recorded.decoder(),
        heads=recorded.heads(),
        criterion=DETRCriterion(matcher=HungarianMatcher()),
        num_classes=80,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        adapter=MultiScaleAdapter(),
        auxiliary_heads=[
            FasterRCNNHead(rpn=ProposalNetwork(samples=None), samples=None),
            ATSSHead(),
        ],
        positive_queries=PositiveQueries(heads=2, head_embedding="scalar", random=False),
        one_pass=one_pass,
    )
    own = {
        name: recorded.weight(official(name)).view(value.shape)
        for name, value in model.named_parameters()
        if name.startswith(("adapter", "positive_queries", "auxiliary_heads"))
    }
    model.load_state_dict(own, strict=False)
    return model.eval()


def images() -> ImageList:
    return ImageList(recorded.image(), [SIZE])


def instances(file) -> list[Instances]:
    objects = Instances(SIZE)
    objects.gt_boxes = Boxes(torch.from_numpy(file["gt_box0"]))
    objects.gt_classes = torch.from_numpy(file["gt_label0"]).long()
    return [objects]


@functools.cache
def recording(name: str):
    return np.load(recorded.FOLDER / f"{name}.npz")
