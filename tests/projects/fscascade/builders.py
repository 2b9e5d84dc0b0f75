"""Tiny cascade heads, features and batches for the tests of this folder."""

from __future__ import annotations

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from fscascade import add_fscascade_config
from tests.modeling.batches import (  # noqa: F401  for the tests
    CHANNELS,
    LEVELS,
    SIZE,
    features,
    proposals,
    random_boxes,
    targets,
)


def config(
    *,
    name: str = "FSCascadeROIHeads",
    num_stages: int = 3,
    num_classes: int = 5,
    masks: bool = False,
    channels: int = CHANNELS,
    side: int = 5,
    fc_dim: int = 16,
    agnostic: bool = True,
    **fscascade,
):
    """Return a yacs config of small heads; keyword arguments in lower case set MODEL.FSCASCADE."""
    cfg = get_cfg()
    add_fscascade_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(LEVELS)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 48
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    box_head = cfg.MODEL.ROI_BOX_HEAD
    box_head.NAME, box_head.NUM_FC, box_head.FC_DIM = "FastRCNNConvFCHead", 2, fc_dim
    box_head.POOLER_RESOLUTION, box_head.CLS_AGNOSTIC_BBOX_REG = side, agnostic
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    cascade.IOUS = [0.5, 0.6, 0.7, 0.75][:num_stages]
    cascade.BBOX_REG_WEIGHTS = [
        [10.0 * k, 10.0 * k, 5.0 * k, 5.0 * k] for k in range(1, num_stages + 1)
    ]
    cfg.MODEL.FSCASCADE.STAGE_LOSS_WEIGHTS = [0.5**k for k in range(num_stages)]
    cfg.MODEL.MASK_ON = masks
    mask_head = cfg.MODEL.ROI_MASK_HEAD
    mask_head.NAME, mask_head.NUM_CONV, mask_head.CONV_DIM = "MaskRCNNConvUpsampleHead", 1, channels
    mask_head.POOLER_RESOLUTION = 4
    for key, value in fscascade.items():
        cfg.MODEL.FSCASCADE[key.upper()] = value
    return cfg


def heads(seed: int = 0, **settings):
    """Return seeded tiny heads; weights are enlarged so that the cascade moves its boxes."""
    torch.manual_seed(seed)
    cfg = config(**settings)
    channels = settings.get("channels", CHANNELS)
    shapes = {name: ShapeSpec(channels=channels, stride=s) for name, s in LEVELS.items()}
    built = build_roi_heads(cfg, shapes)
    for predictor in built.box_predictor.modules():
        if not hasattr(predictor, "cls_score"):
            continue
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.3)
    return built


def losses(roi_heads, *, feats=None, props=None, gt=None, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return the training losses of a batch, sampling seeded."""
    torch.manual_seed(seed)
    with EventStorage():
        feats = features() if feats is None else feats
        props = proposals() if props is None else props
        gt = targets() if gt is None else gt
        return roi_heads.train()(None, feats, props, gt)[1]


@torch.no_grad()
def detections(roi_heads, *, feats=None, props=None) -> list[Instances]:
    feats = features() if feats is None else feats
    return roi_heads.eval()(None, feats, proposals() if props is None else props)[0]
