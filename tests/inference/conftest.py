"""A tiny detector, pictures and a fake output."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from d2dense import config


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """Mask R-CNN that runs in milliseconds and keeps every detection, for the shapes classes."""
    cfg = config.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [96]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 5
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7
    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.DATASETS.TEST = ("shapes_val",)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 96
    cfg.TEST.DETECTIONS_PER_IMAGE = 15
    return cfg


@pytest.fixture
def picture() -> np.ndarray:
    """A BGR picture (50, 70, 3) without symmetry."""
    return np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def photo_folder(tmp_path: Path, picture: np.ndarray) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, name in enumerate(["b.png", "a.jpg", "c.PNG"]):
        cv2.imwrite(str(folder / name), np.roll(picture, 9 * index, axis=1))
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(
        name="test",
        thing_classes=["cat", "dog", "bird"],
        stuff_classes=["sky", "sea"],
        thing_dataset_id_to_contiguous_id={17: 0, 18: 1, 90: 2},
    )


@pytest.fixture
def output() -> dict:
    """Four instances in a picture (20, 30), with masks, scores out of order."""
    instances = Instances((20, 30))
    boxes = [[1.0, 2, 11, 12], [5, 5, 25, 15], [0, 0, 4, 4], [20, 10, 30, 20]]
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.scores = torch.tensor([0.3, 0.9, 0.6, 0.05])
    instances.pred_classes = torch.tensor([0, 1, 1, 2])
    masks = torch.zeros(4, 20, 30, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    instances.pred_masks = masks
    return {"instances": instances}
