"""What the official models are made of: trunks with the official options, classifiers, bare
backbones, segmenters and whole detectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from d2dense.config import detr
from d2dense.modeling.upernet import UperNetHead

from .backbone import CEDNet
from .blocks import BottleneckFamily, CSwinFamily, NextFamily, SwinFamily
from .classifier import CEDNetClassifier
from .trunk import CEDNetTrunk

__all__ = [
    "TRUNKS",
    "FeatureTuple",
    "Segmenter",
    "classifier",
    "detector",
    "features",
    "mask2former",
    "segmentation_features",
    "segmenter",
    "trunk",
]

_T = {"widths": (96, 192, 352, 512), "blocks": (2, 4, 2), "num_stages": 3}
_S = {"widths": (96, 192, 352, 512), "blocks": (2, 7, 2), "num_stages": 4}
_B = {"widths": (128, 256, 448, 704), "blocks": (2, 7, 2), "num_stages": 4}

# name -> (family of blocks, arguments of the trunk)
TRUNKS: dict[str, tuple[type, dict[str, Any]]] = {
    "next_tiny": (NextFamily, _T),
    "next_small": (NextFamily, _S),
    "next_base": (NextFamily, _B),
    "swin_tiny": (SwinFamily, {**_T, "widths": (96, 160, 288, 416)}),
    "cswin_tiny": (CSwinFamily, {**_T, "widths": (64, 128, 256, 320), "blocks": (2, 8, 1)}),
    "res50": (BottleneckFamily, {**_T, "widths": (64, 128, 256, 384), "blocks": (1, 4, 2)}),
    "next_tiny_unet": (NextFamily, {**_T, "style": "unet"}),
    "next_tiny_hourglass": (
        NextFamily,
        {**_T, "style": "hourglass", "widths": (96, 160, 320, 512)},
    ),
    "next_tiny_fpnvariant": (
        NextFamily,
        {**_T, "style": "fpn_convs", "widths": (96, 160, 304, 448)},
    ),
    "next_tiny_lastdec": (NextFamily, _T),
}
# whose detectors have a decoder in the last stage
_LAST_DECODER = (
    "next_tiny_unet",
    "next_tiny_hourglass",
    "next_tiny_fpnvariant",
    "next_tiny_lastdec",
)
# to what multiple the official detectors fill up images in evaluation
_DETECTOR_DIVISIBILITY = 128


class FeatureTuple(nn.Module):
    """A backbone that returns its maps in order instead of by name."""

    def __init__(self, backbone: CEDNet):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(x).values())


class Segmenter(nn.Module):
    """A backbone and an UperNet head, without pre- and post-processing."""

    def __init__(self, backbone: CEDNet, head: UperNetHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {
            "decode_logits": self.head.scores(features),
            "aux_logits": self.head.auxiliary_scores(features),
        }


def trunk(name: str, *, last_decoder: bool | None = None, **family_options) -> CEDNetTrunk:
    """Return the trunk ``name`` of :data:`TRUNKS`.

    Args:
        last_decoder: None: as in the official detectors.
        family_options: of the family of blocks.
    """
    family, options = TRUNKS[name]
    return CEDNetTrunk(
        family=family(**family_options),
        last_decoder=name in _LAST_DECODER if last_decoder is None else last_decoder,
        official_drop_path=True,
        **options,
    )


def classifier(name: str) -> CEDNetClassifier:
    """Return the ImageNet classifier on trunk ``name``; it returns the scores of all stages."""
    options = {"roll_back_unshifted": True} if name == "swin_tiny" else {}
    body = trunk(name, last_decoder=False, **options)
    return CEDNetClassifier(trunk=body, all_stages=True)


def features(name: str, *, out_features: Sequence[str]) -> FeatureTuple:
    """Return a detector's backbone."""
    return FeatureTuple(CEDNet(trunk=trunk(name), out_features=out_features))


def segmentation_features(name: str) -> FeatureTuple:
    """Return the backbone of UperNet: C2 .. C5, then C3 of the stages before, latest first."""
    body = trunk(name, layer_scale=1.0)
    earlier = [f"stage{k}_c3" for k in range(len(body.stages) - 1, 0, -1)]
    return FeatureTuple(CEDNet(trunk=body, out_features=["c2", "c3", "c4", "c5", *earlier]))


def segmenter(name: str) -> Segmenter:
    """Return UperNet for ADE20K."""
    backbone = segmentation_features(name).backbone
    shapes = backbone.output_shape()
    head = UperNetHead(
        input_shape=shapes,
        in_features=["c2", "c3", "c4", "c5"],
        num_classes=150,
        auxiliary_feature=list(shapes)[4],
    )
    return Segmenter(backbone, head)


def detector(
    name: str, *, node: Callable[..., DictConfig], out_features: Sequence[str]
) -> nn.Module:
    """Return a whole Detectron2 detector for COCO.

    Args:
        node: gives its lazy node for a ``backbone``, see :mod:`d2dense.config.detectors`.
        out_features: of the backbone.
    """
    backbone = L(CEDNet)(
        trunk=L(trunk)(name=name),
        out_features=list(out_features),
        size_divisibility=_DETECTOR_DIVISIBILITY,
    )
    return instantiate(node(backbone=backbone))


def mask2former(name: str) -> nn.Module:
    """Return Mask2Former for the instances of COCO."""
    levels = ("c2", "c3", "c4", "c5")
    widths = dict(zip(levels, TRUNKS[name][1]["widths"]))
    return detector(name, node=partial(detr.mask2former, widths=widths), out_features=levels)
