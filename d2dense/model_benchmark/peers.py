"""Peers that pip installs: timm's backbones, torchvision's detectors and segmenters, and
Detectron2's own heads.

Detectors have ResNet-50 with FPN, 80 classes, frozen norms, and a stem and first block that are not
trained, as their published configs do. Weights are untrained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .subjects import BackboneSubject, Detectron2Subject, Size, TorchvisionSubject

__all__ = [
    "detectron2_config",
    "detectron2_peer",
    "timm_peer",
    "torchvision_detector",
    "torchvision_segmenter",
]

_CLASSES = 80
_LEVELS = ["p2", "p3", "p4", "p5"]
_FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.MASK_ON": False,
}
_TWO_STAGES = {
    **_FPN,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES": [*_LEVELS, "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": _LEVELS,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
}
_CASCADE = {
    **_TWO_STAGES,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
_MASKS = {"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask"}
_DETECTRON2 = {
    "Faster R-CNN": _TWO_STAGES,
    "CascadeROIHeads": _CASCADE,
    "CascadeROIHeads with masks": {**_CASCADE, **_MASKS},
    "RetinaNet": {
        **_FPN,
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [
            [size * 2 ** (octave / 3) for octave in range(3)] for size in (32, 64, 128, 256, 512)
        ],
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
    },
    "SemSegFPNHead": {
        **_TWO_STAGES,
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 59,
    },
}


def detectron2_config(kind: str) -> CfgNode:
    """Return the config of one of :func:`detectron2_peer`'s models."""
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in _DETECTRON2[kind].items() for item in pair])
    return cfg


def _detectron2(kind: str, device: str) -> nn.Module:
    cfg = detectron2_config(kind)
    cfg.MODEL.DEVICE = device
    return build_model(cfg)


def detectron2_peer(kind: str) -> Detectron2Subject:
    """Return a model of Detectron2's classes alone, as its published configs set them."""
    return Detectron2Subject(
        name=f"detectron2 {kind} R50",
        library="detectron2",
        builder=partial(_detectron2, kind),
    )


def _timm(name: str, size: Size) -> nn.Module:
    more = {"img_size": size} if "swin" in name else {}
    return timm.create_model(name, features_only=True, **more)


def timm_peer(name: str) -> BackboneSubject:
    """Return a backbone of timm with the maps that its ``features_only`` gives."""
    return BackboneSubject(name=f"timm {name}", library="timm", builder=partial(_timm, name))


_DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "Faster R-CNN": partial(detection.FasterRCNN, box_detections_per_img=100),
    "Mask R-CNN": partial(detection.MaskRCNN, box_detections_per_img=100),
    "RetinaNet": partial(detection.RetinaNet, detections_per_img=100),
}


def _torchvision_detector(kind: str, backbone: str, size: Size) -> nn.Module:
    levels: dict[str, Any] = {}
    if kind == "RetinaNet":
        levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=3, **levels)
    # images are not resized
    sides = {"min_size": min(size), "max_size": max(size)}
    return _DETECTORS[kind](body, num_classes=_CLASSES + 1, **sides)


def torchvision_detector(kind: str, backbone: str = "resnet50") -> TorchvisionSubject:
    """Return a detector as torchvision's functions of that name build it with weights."""
    return TorchvisionSubject(
        name=f"torchvision {kind} {backbone.replace('resnet', 'R')}",
        builder=partial(_torchvision_detector, kind, backbone),
    )


def _torchvision_segmenter(function: str, size: Size) -> nn.Module:
    make = getattr(segmentation, function)
    return make(weights=None, weights_backbone=None, num_classes=59, aux_loss=False)


def torchvision_segmenter(function: str) -> TorchvisionSubject:
    """Return a segmenter; that of DeepLab has a norm over one value per image."""
    return TorchvisionSubject(
        name=f"torchvision {function}",
        builder=partial(_torchvision_segmenter, function),
        semantic=True,
        min_training_batch=2 if function.startswith("deeplab") else 1,
    )
