"""Lazy models of the DETR family on one map of stride 32::

    model = single_scale_detr.conditional_detr(backbone=model_zoo_resnet50, widths={"res5": 2048})
    model.num_classes = 3

Every call returns a new node.
"""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig

from d2dense.modeling.detr import (
    AnchorQueries,
    ChannelMapper,
    ConditionalDecoder,
    DeformableDETR,
    DETRCriterion,
    HungarianMatcher,
    PointQueries,
    PredictionHeads,
    SingleScaleEncoder,
)

__all__ = ["conditional_detr", "dab_detr"]

_MEAN = [123.675, 116.28, 103.53]
_STD = [58.395, 57.12, 57.375]


def conditional_detr(
    *,
    backbone: DictConfig,
    widths: Mapping[str, int],
    num_classes: int = 80,
    channels: int = 256,
) -> DictConfig:
    """Return Conditional DETR; images are RGB.

    Args:
        widths: channels of the backbone's map by name, one entry
        channels: of the transformer
    """
    return L(DeformableDETR)(
        backbone=backbone,
        in_features=list(widths),
        neck=L(ChannelMapper)(
            input_shape={name: L(ShapeSpec)(channels=width) for name, width in widths.items()},
            in_features=list(widths),
            out_channels=channels,
            levels=1,
            norm_groups=0,
        ),
        encoder=L(SingleScaleEncoder)(channels=channels),
        queries=L(PointQueries)(channels=channels),
        decoder=L(ConditionalDecoder)(channels=channels, layers=6),
        heads=L(PredictionHeads)(
            channels=channels,
            num_classes="${..num_classes}",
            layers="${..decoder.layers}",
            size_bias=0.0,
        ),
        criterion=L(DETRCriterion)(matcher=L(HungarianMatcher)(), num_classes="${..num_classes}"),
        num_classes=num_classes,
        pixel_mean=_MEAN,
        pixel_std=_STD,
        input_format="RGB",
    )


def dab_detr(
    *,
    backbone: DictConfig,
    widths: Mapping[str, int],
    num_classes: int = 80,
    channels: int = 256,
) -> DictConfig:
    """Return DAB-DETR: anchors for queries, no dropout; images are RGB.

    Args:
        widths: channels of the backbone's map by name, one entry
        channels: of the transformer
    """
    model = conditional_detr(
        backbone=backbone, widths=widths, num_classes=num_classes, channels=channels
    )
    for part in (model.encoder, model.decoder):
        part.update(dropout=0.0, activation="prelu")
    model.encoder.update(temperature=20.0, scale_positions=True)
    model.queries = L(AnchorQueries)()
    model.decoder.anchors = True
    model.criterion.class_weight = 1.0
    return model
