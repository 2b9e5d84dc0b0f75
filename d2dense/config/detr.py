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
    BoxPositions,
    ChannelMapper,
    ContrastiveDenoising,
    DeformableDecoder,
    DeformableDETR,
    DeformableEncoder,
    DETRCriterion,
    HungarianMatcher,
    LearnedQueries,
    OneToManyQueries,
    PredictionHeads,
    TwoStageQueries,
)

__all__ = [
    "channel_mapper",
    "deformable_detr",
    "deformable_detr_plus_plus",
    "dino",
    "hybrid_matching",
    "mask2former",
]

_MEAN = [123.675, 116.28, 103.53]
_STD = [58.395, 57.12, 57.375]


def channel_mapper(
    *, widths: Mapping[str, int] | None = None, channels: int = 256, levels: int = 4
) -> DictConfig:
    """Return the neck for feature maps of these channels by name, finest first.

    Args:
        widths: None: of a model's ``in_features``, whatever its backbone says that they have
    """
    shapes = widths and {name: L(ShapeSpec)(channels=width) for name, width in widths.items()}
    return L(ChannelMapper)(
        input_shape=shapes,
        in_features=list(widths or ()),
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
        neck: such as :func:`channel_mapper`, which then takes the same features; None: the features
            are the levels
        channels: of the levels
        levels: how many there are
    """
    size = {"channels": channels, "levels": levels}
    if neck is not None and "in_features" in neck:
        neck.in_features = "${..in_features}"  # another backbone has them changed in one place
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


def deformable_detr_plus_plus(
    *,
    backbone: DictConfig,
    in_features: Sequence[str],
    neck: DictConfig | None = None,
    num_classes: int = 80,
    channels: int = 256,
    levels: int = 4,
) -> DictConfig:
    """Return Deformable DETR in two stages with box refinement, learned contents, look forward
    twice, wide perceptrons and no dropout: the strong baseline of H-DETR and Co-DETR.

    Args: see :func:`deformable_detr`
    """
    node = deformable_detr(
        backbone=backbone,
        in_features=in_features,
        neck=neck,
        num_classes=num_classes,
        channels=channels,
        levels=levels,
    )
    for part in (node.encoder, node.decoder):
        part.update(feedforward=2048, dropout=0.0)
    node.queries = L(TwoStageQueries)(channels=channels, num_classes="${..num_classes}")
    node.decoder.update(box_refinement=True, look_forward_twice=True)
    node.heads.update(shared=False, size_bias=0.0)
    return node


def dino(
    *,
    backbone: DictConfig,
    in_features: Sequence[str],
    neck: DictConfig | None = None,
    num_classes: int = 80,
    channels: int = 256,
    levels: int = 4,
) -> DictConfig:
    """Return DINO with 900 queries; 4 levels start at stride 8, 5 at stride 4.

    Args: see :func:`deformable_detr`
    """
    node = deformable_detr_plus_plus(
        backbone=backbone,
        in_features=in_features,
        neck=neck,
        num_classes=num_classes,
        channels=channels,
        levels=levels,
    )
    node.encoder.update(temperature=20.0, offset=0.0)
    node.queries.update(num_queries=900, binary=False, positions=False)
    node.decoder.update(final_norm=True, positions=L(BoxPositions)(channels=channels))
    node.heads.eps = 1e-3
    node.criterion.class_weight = 1.0
    node.denoising = L(ContrastiveDenoising)(channels=channels, num_classes="${..num_classes}")
    node.max_detections = 300
    return node


def hybrid_matching(node: DictConfig) -> DictConfig:
    """Return a detector in two stages that has, in training, 1500 more queries for six copies of
    each object (H-DETR).

    Args:
        node: of a function above; it is changed
    """
    node.one_to_many = L(OneToManyQueries)(channels=node.encoder.channels)
    return node


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
