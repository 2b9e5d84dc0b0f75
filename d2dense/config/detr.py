"""Lazy models of the DETR family, for any backbone::

    model = detr.deformable_detr(backbone=L(CEDNet)(...), in_features=["p3", "p4", "p5", "p6"])
    model.num_classes = 3

Every call returns a new node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig

from d2dense.modeling import mask2former as m2f
from d2dense.modeling.detr import (
    ChannelMapper,
    DeformableDecoder,
    DeformableDETR,
    DeformableEncoder,
    DETRCriterion,
    HungarianMatcher,
    LearnedQueries,
    PredictionHeads,
)

__all__ = ["channel_mapper", "deformable_detr", "mask2former"]

_MEAN = [123.675, 116.28, 103.53]
_STD = [58.395, 57.12, 57.375]


def channel_mapper(
    *, widths: Mapping[str, int], channels: int = 256, levels: int = 4
) -> DictConfig:
    """Return the neck for feature maps of these channels by name, finest first."""
    return L(ChannelMapper)(
        input_shape={name: L(ShapeSpec)(channels=width) for name, width in widths.items()},
        in_features=list(widths),
        out_channels=channels,
        levels=levels,
    )


def deformable_detr(
    *,
    backbone: DictConfig,
    in_features: Sequence[str],
    neck: DictConfig | None = None,
    num_classes: int = 80,
    channels: int = 256,
    levels: int = 4,
) -> DictConfig:
    """Return Deformable DETR in one stage and without box refinement; images are RGB.

    Args:
        in_features: of the backbone, finest first
        neck: such as :func:`channel_mapper`; None: the features are the levels
        channels: of the levels
        levels: how many there are
    """
    size = {"channels": channels, "levels": levels}
    return L(DeformableDETR)(
        backbone=backbone,
        in_features=list(in_features),
        neck=neck,
        encoder=L(DeformableEncoder)(**size),
        queries=L(LearnedQueries)(channels=channels),
        decoder=L(DeformableDecoder)(**size, layers=6),
        heads=L(PredictionHeads)(
            channels=channels,
            num_classes="${..num_classes}",
            layers="${..decoder.layers}",
        ),
        criterion=L(DETRCriterion)(matcher=L(HungarianMatcher)(), num_classes="${..num_classes}"),
        num_classes=num_classes,
        pixel_mean=_MEAN,
        pixel_std=_STD,
        input_format="RGB",
    )


def mask2former(
    *,
    backbone: DictConfig,
    widths: Mapping[str, int],
    num_classes: int = 80,
    channels: int = 256,
) -> DictConfig:
    """Return Mask2Former for instances; images are RGB.

    Args:
        widths: channels of the backbone's four maps by name, finest first
        channels: inside the decoders
    """
    return L(m2f.Mask2Former)(
        backbone=backbone,
        in_features=list(widths),
        pixel_decoder=L(m2f.PixelDecoder)(
            input_shape={name: L(ShapeSpec)(channels=width) for name, width in widths.items()},
            in_features=list(widths),
            channels=channels,
        ),
        decoder=L(m2f.MaskDecoder)(channels=channels, num_classes="${..num_classes}"),
        criterion=L(m2f.Mask2FormerCriterion)(num_classes="${..num_classes}"),
        num_classes=num_classes,
        pixel_mean=_MEAN,
        pixel_std=_STD,
        input_format="RGB",
    )
