"""Lazy nodes of the segmenters that papers compare backbones with.

They take any backbone whose maps are named with their shapes::

    model = segmenters.upernet(
        backbone=L(TimmBackbone)(name="convnext_tiny", out_norm="LN"),
        shapes={"res2": (96, 4), "res3": (192, 8), "res4": (384, 16), "res5": (768, 32)},
        auxiliary_feature="res4",
    )

Images are RGB. Every call returns a new node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig

from d2dense.modeling import Segmenter, SemanticInference, UperNetHead

__all__ = ["segmenter", "upernet"]


def segmenter(
    *, backbone: DictConfig, head: DictConfig, crop: Sequence[int], slide: bool = True
) -> DictConfig:
    """Return a segmenter for training on crops.

    Args:
        crop: (height, width) of training images, which are filled up to it.
        slide: test in windows of that size, two thirds of it apart, instead of on whole images.
    """
    return L(Segmenter)(
        backbone=backbone,
        sem_seg_head=head,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        inference=L(SemanticInference)(
            window=list(crop) if slide else None, stride=None, multi_scale=False
        ),
        pad_to=list(crop),
    )


def upernet(
    *,
    backbone: DictConfig,
    shapes: Mapping[str, tuple[int, int]],
    auxiliary_feature: str,
    num_classes: int = 150,
    channels: int = 512,
    auxiliary_channels: int = 256,
    norm: str = "SyncBN",
    crop: Sequence[int] = (512, 512),
) -> DictConfig:
    """Return UperNet with an auxiliary classifier.

    Args:
        shapes: (channels, stride) of the backbone's maps by name; the first four, fine to coarse,
            are fused.
        auxiliary_feature: which map the auxiliary classifier takes.
        channels, auxiliary_channels: widths of the heads.
        norm: of the heads.
        crop: see :func:`segmenter`.
    """
    head = L(UperNetHead)(
        input_shape={
            name: L(ShapeSpec)(channels=width, stride=stride)
            for name, (width, stride) in shapes.items()
        },
        in_features=list(shapes)[:4],
        num_classes=num_classes,
        channels=channels,
        norm=norm,
        auxiliary_feature=auxiliary_feature,
        auxiliary_channels=auxiliary_channels,
    )
    return segmenter(backbone=backbone, head=head, crop=crop)
