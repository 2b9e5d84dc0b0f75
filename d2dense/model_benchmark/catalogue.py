"""Which models are compared with which peers."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from torch import nn

from d2dense import config
from d2dense.errors import UserError, nearest

from .peers import detectron2_peer, timm_peer, torchvision_detector, torchvision_segmenter
from .subjects import BackboneSubject, Detectron2Subject, Group, Size, Subject

__all__ = ["KINDS", "select"]


def _ours(name: str, peer: Subject, *, min_training_batch: int = 1) -> Detectron2Subject:
    return Detectron2Subject(name=name, peer=peer.name, min_training_batch=min_training_batch)


def _backbone(model: str, peer: Subject) -> BackboneSubject:
    def build(size: Size) -> nn.Module:
        return config.build_model(config.load(model), device="cpu").backbone

    return BackboneSubject(name=f"backbone of {model}", builder=build, peer=peer.name)


_CONVNEXT = timm_peer("convnext_tiny")
_TINY_CONVNEXT = timm_peer("test_convnext")
_RETINANET = detectron2_peer("RetinaNet")
_CASCADE = detectron2_peer("CascadeROIHeads")
_MASK_CASCADE = detectron2_peer("CascadeROIHeads with masks")
_SEMANTIC_FPN = detectron2_peer("SemSegFPNHead")
_FCN = torchvision_segmenter("fcn_resnet50")
_FASTER = torchvision_detector("Faster R-CNN")
_SMALL_FASTER = torchvision_detector("Faster R-CNN", "resnet18")

# Shares are about the seconds that two cores need.
_FULL = (
    Group(
        name="Backbones",
        share=200,
        subjects=(
            _backbone("CEDNet/cascade_mask_rcnn_cednet_next_t", _CONVNEXT),
            _CONVNEXT,
            timm_peer("resnet50"),
            timm_peer("swin_tiny_patch4_window7_224"),
        ),
    ),
    Group(
        name="One stage",
        share=60,
        subjects=(
            _ours("CEDNet/retinanet_cednet_next_t", _RETINANET),
            _RETINANET,
            torchvision_detector("RetinaNet"),
        ),
    ),
    Group(
        name="Cascades",
        share=250,
        subjects=(
            _ours("FSCascade/fscascade_r50_fpn_1x", _CASCADE),
            _ours("FSCascade/cascade_rcnn_r50_fpn_1x", _CASCADE),
            _CASCADE,
            detectron2_peer("Faster R-CNN"),
            _FASTER,
        ),
    ),
    Group(
        name="Transformers",
        share=170,
        subjects=(
            _ours("CoDETR/deformable_detr_r50_1x", _FASTER),
            _ours("CoDETR/co_deformable_detr_r50_1x", _FASTER),
            _ours("CoDETR/co_dino_5scale_r50_1x", _FASTER),
            _FASTER,
        ),
    ),
    Group(
        name="Segmenters",
        share=300,
        subjects=(
            _ours("HFGD/semantic_fpn_r50_pascal_context", _SEMANTIC_FPN),
            _ours("HFGD/hfgd_r50_os4_pascal_context", _FCN),
            _ours("HFGD/hfgd_r50_os2_cityscapes", _FCN),
            # pools an image to one value, over which it normalises
            _ours("CEDNet/upernet_cednet_next_t", _FCN, min_training_batch=2),
            _SEMANTIC_FPN,
            _FCN,
            torchvision_segmenter("deeplabv3_resnet50"),
        ),
    ),
    Group(
        name="Masks",
        share=260,
        subjects=(
            _ours("CEDNet/cascade_mask_rcnn_cednet_next_t", _MASK_CASCADE),
            _MASK_CASCADE,
            torchvision_detector("Mask R-CNN"),
        ),
    ),
)
_QUICK = (
    Group(
        name="Tiny backbones",
        subjects=(_backbone("CEDNet/retinanet_cednet_tiny_shapes", _TINY_CONVNEXT), _TINY_CONVNEXT),
    ),
    Group(
        name="Tiny detectors",
        subjects=(_ours("FSCascade/fscascade_tiny_shapes", _SMALL_FASTER), _SMALL_FASTER),
    ),
)


KINDS = {"full": _FULL, "quick": _QUICK}


def select(groups: Sequence[Group], patterns: Sequence[str]) -> list[Group]:
    """Return the groups with those of our models whose names fit a pattern, and with all their
    peers; all groups where there is no pattern.

    Raises:
        UserError: a pattern that fits none.
    """
    ours = [each.name for group in groups for each in group.subjects if each.peer]
    for pattern in patterns:
        if not fnmatch.filter(ours, pattern):
            raise UserError(
                f"--models {pattern} fits none of {', '.join(ours)}{nearest(pattern, ours)}"
            )
    if not patterns:
        return list(groups)
    chosen = []
    for group in groups:
        subjects = tuple(
            each
            for each in group.subjects
            if not each.peer or any(fnmatch.fnmatch(each.name, p) for p in patterns)
        )
        if any(each.peer for each in subjects):
            chosen.append(dataclasses.replace(group, subjects=subjects))
    return chosen
