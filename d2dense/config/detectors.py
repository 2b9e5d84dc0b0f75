"""Lazy nodes of the detectors that papers compare backbones with: RetinaNet, Mask R-CNN and Cascade
Mask R-CNN as MMDetection trains them for Swin, ConvNeXt and CEDNet.

They take any backbone with pyramid levels of one width, ``p3`` to ``p7`` for RetinaNet and ``p2``
to ``p6`` for the others::

    model = detectors.retinanet(backbone=detectors.timm_fpn("convnext_tiny", top="p6p7"))
    model = detectors.mask_rcnn(backbone=detectors.resnet_fpn(50))
    model = detectors.mask_rcnn(backbone=L(ViTPyramid)(bottom_up=L(EVA02ViT)()))
    model.num_classes = 3
    model.backbone.bottom_up.drop_path_rate = 0.2

Images are RGB. Every call returns a new node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from omegaconf import DictConfig

from d2dense.errors import UserError
from d2dense.modeling import (
    AnchorMatcher,
    BatchRetinaNet,
    FlexibleCascadeROIHeads,
    RegionPredictor,
    StageMaskHeads,
    TimmBackbone,
    box_transform,
)
from d2dense.modeling.necks import PaddedFPN

__all__ = ["cascade_mask_rcnn", "faster_rcnn", "mask_rcnn", "resnet_fpn", "retinanet", "timm_fpn"]

_RGB = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "input_format": "RGB",
}
_LEVELS = ["p2", "p3", "p4", "p5"]
_CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def timm_fpn(
    name: str,
    *,
    top: str = "maxpool",
    out_indices: Sequence[int] = (-4, -3, -2, -1),
    out_norm: str = "LN",
    channels: int = 256,
    size_divisibility: int | None = None,
) -> DictConfig:
    """Return a timm model under Detectron2's feature pyramid.

    Args:
        top: ``maxpool`` for p2 to p6; ``p6p7`` for p3 to p7, of which two come from the last level
        out_indices, out_norm: of :class:`TimmBackbone`; ResNets are used without norm
        size_divisibility: to what multiple batches are filled up; None: 32
    """
    names = _maps_below(top)
    body = L(TimmBackbone)(
        name=name, out_indices=list(out_indices), out_features=names, out_norm=out_norm
    )
    return _fpn(body, top, channels, size_divisibility)


def resnet_fpn(
    depth: int = 50,
    *,
    top: str = "maxpool",
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    stride_in_1x1: bool = False,
    channels: int = 256,
    size_divisibility: int | None = None,
) -> DictConfig:
    """Return Detectron2's ResNet under its feature pyramid.

    Args:
        top, channels, size_divisibility: see :func:`timm_fpn`
        norm: of the ResNet
        freeze_at: how many of its parts stay as they are, the stem being the first
        stride_in_1x1: False for torchvision's layout of weights, True for Microsoft's (which are
            BGR with a standard deviation of 1); from depth 50 on
    """
    layout = {"stride_in_1x1": stride_in_1x1} if depth >= 50 else {}
    body = L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm=norm),
        stages=L(ResNet.make_default_stages)(depth=depth, norm=norm, **layout),
        out_features=_maps_below(top),
        freeze_at=freeze_at,
    )
    return _fpn(body, top, channels, size_divisibility)


def _maps_below(top: str) -> list[str]:
    if top not in ("maxpool", "p6p7"):
        raise UserError(f"top of a feature pyramid is {top!r}; expected maxpool or p6p7")
    names = ["res2", "res3", "res4", "res5"]
    return names if top == "maxpool" else names[1:]


def _fpn(
    bottom_up: DictConfig, top: str, channels: int, size_divisibility: int | None
) -> DictConfig:
    return L(PaddedFPN)(
        bottom_up=bottom_up,
        in_features=_maps_below(top),
        out_channels=channels,
        top_block=L(LastLevelMaxPool)() if top == "maxpool" else LastLevelP6P7,
        size_divisibility=size_divisibility,
    )


def retinanet(*, backbone: DictConfig, num_classes: int = 80, channels: int = 256) -> DictConfig:
    """Return RetinaNet on levels ``p3`` to ``p7`` of ``backbone``; L1 loss on deltas, divided by
    the positives of the batch.

    Args:
        backbone: a node such as :func:`resnet_fpn` returns
        channels: of all levels and of the head
    """
    strides = [8, 16, 32, 64, 128]
    return L(BatchRetinaNet)(
        backbone=backbone,
        head=L(RetinaNetHead)(
            input_shape=[L(ShapeSpec)(channels=channels)] * 5,
            num_classes="${..num_classes}",
            num_anchors=9,
            conv_dims=[channels] * 4,
        ),
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[4 * stride * 2 ** (octave / 3) for octave in range(3)] for stride in strides],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=strides,
            offset=0.0,
        ),
        box2box_transform=L(box_transform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(AnchorMatcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], low_quality_matches="own"
        ),
        num_classes=num_classes,
        **_RGB,
    )


def faster_rcnn(*, backbone: DictConfig, num_classes: int = 80, channels: int = 256) -> DictConfig:
    """Return Faster R-CNN on levels ``p2`` to ``p6``; L1 losses, class-specific regression.

    Args:
        backbone: a node such as :func:`resnet_fpn` returns
        channels: of all levels and of the heads' convolutions
    """
    return L(GeneralizedRCNN)(
        backbone=backbone,
        proposal_generator=_rpn(channels=channels, train_proposals=1000, smooth_l1_beta=0.0),
        roi_heads=L(StandardROIHeads)(
            **_regions(num_classes),
            proposal_matcher=L(Matcher)(
                thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
            ),
            box_head=_box_head(channels, convs=0, fcs=2),
            box_predictor=_predictor(
                FastRCNNOutputLayers, weights=[10.0, 10.0, 5.0, 5.0], num_classes="${..num_classes}"
            ),
        ),
        **_RGB,
    )


def mask_rcnn(*, backbone: DictConfig, num_classes: int = 80, channels: int = 256) -> DictConfig:
    """Return :func:`faster_rcnn` with a mask branch; the same arguments."""
    model = faster_rcnn(backbone=backbone, num_classes=num_classes, channels=channels)
    model.roi_heads.update(_mask_branch())
    model.roi_heads.mask_head = _mask_head(channels, "${..num_classes}")
    return model


def cascade_mask_rcnn(
    *, backbone: DictConfig, num_classes: int = 80, channels: int = 256, norm: str = "SyncBN"
) -> DictConfig:
    """Return Cascade Mask R-CNN: three stages with 4 convolutions and one fc layer, class-specific
    regression with GIoU loss of weight 10, a mask head each, and averaged logits.

    Args:
        norm: of the box heads' convolutions
    """
    stages = range(len(_CASCADE_STDS))
    heads = L(FlexibleCascadeROIHeads)(
        **_regions(num_classes),
        box_heads=[_box_head(channels, convs=4, fcs=1, norm=norm) for _ in stages],
        box_predictors=[
            _predictor(
                RegionPredictor,
                weights=[1 / std for std in stds],
                num_classes="${...num_classes}",
                box_reg_loss_type="giou",
                loss_weight={"loss_box_reg": 10.0},
            )
            for stds in _CASCADE_STDS
        ],
        iou_thresholds=[0.5, 0.6, 0.7],
        stage_loss_weights=[1.0, 0.5, 0.25],
        scale_gradients=False,
        score_average="logits",
        **_mask_branch(),
        mask_head=L(StageMaskHeads)(
            modules=[_mask_head(channels, "${....num_classes}") for _ in stages]
        ),
    )
    return L(GeneralizedRCNN)(
        backbone=backbone,
        proposal_generator=_rpn(channels=channels, train_proposals=2000, smooth_l1_beta=1 / 9),
        roi_heads=heads,
        **_RGB,
    )


def _rpn(*, channels: int, train_proposals: int, smooth_l1_beta: float) -> DictConfig:
    return L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=channels, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(box_transform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=[2000, 1000],
        post_nms_topk=[train_proposals, 1000],
        nms_thresh=0.7,
        smooth_l1_beta=smooth_l1_beta,
    )


def _pooler(side: int) -> DictConfig:
    return L(ROIPooler)(
        output_size=side,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )


def _regions(num_classes: int) -> dict[str, Any]:
    return {
        "num_classes": num_classes,
        "batch_size_per_image": 512,
        "positive_fraction": 0.25,
        "box_in_features": _LEVELS,
        "box_pooler": _pooler(7),
    }


def _box_head(channels: int, *, convs: int, fcs: int, norm: str = "") -> DictConfig:
    return L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=channels, width=7, height=7),
        conv_dims=[channels] * convs,
        fc_dims=[1024] * fcs,
        conv_norm=norm,
    )


def _predictor(
    kind: type[FastRCNNOutputLayers], *, weights: Sequence[float], num_classes: str, **changes
) -> DictConfig:
    return L(kind)(
        input_shape=L(ShapeSpec)(channels=1024),
        box2box_transform=L(box_transform)(weights=list(weights)),
        num_classes=num_classes,
        test_score_thresh=0.05,
        test_nms_thresh=0.5,
        test_topk_per_image=100,
        cls_agnostic_bbox_reg=False,
        **changes,
    )


def _mask_branch() -> dict[str, Any]:
    return {"mask_in_features": _LEVELS, "mask_pooler": _pooler(14)}


def _mask_head(channels: int, num_classes: str) -> DictConfig:
    return L(MaskRCNNConvUpsampleHead)(
        input_shape=L(ShapeSpec)(channels=channels, width=14, height=14),
        num_classes=num_classes,
        conv_dims=[channels] * 5,
    )
