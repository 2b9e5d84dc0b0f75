"""The official code's models by name, built from our classes and filled with its weights.

What comes out equals the official model in evaluation. Its oddities, which are options elsewhere,
are set here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from d2dense.checkpoint import convert_back
from d2dense.checkpoint.building import build_with_weights
from d2dense.config import detectors, detr
from d2dense.errors import UserError, nearest

from . import official_models as models

__all__ = ["VARIANTS", "build", "load", "state_dict"]

_RETINA = ("p3", "p4", "p5", "p6", "p7")
_DETR = ("p3", "p4", "p5", "p6")
_TWO_STAGE = ("p2", "p3", "p4", "p5", "p6")
_NEXT = ("next_tiny", "next_small", "next_base")


class _Kind(NamedTuple):
    """What the official code builds on a trunk, and on which ones.

    ``build`` takes a trunk's name.
    """

    build: Callable[[str], nn.Module]
    trunks: tuple[str, ...]


def _features(*names: str) -> Callable[[str], nn.Module]:
    return partial(models.features, out_features=names)


def _detector(node, names: tuple[str, ...]) -> Callable[[str], nn.Module]:
    return partial(models.detector, node=node, out_features=names)


_KINDS = {
    "cls": _Kind(
        models.classifier,
        (
            *_NEXT,
            "swin_tiny",
            "res50",
            "next_tiny_fpnvariant",
            "next_tiny_unet",
            "next_tiny_hourglass",
        ),
    ),
    "det_retina": _Kind(_features(*_RETINA), tuple(models.TRUNKS)),
    "det_twostage": _Kind(_features(*_TWO_STAGE), (*_NEXT, "swin_tiny", "cswin_tiny")),
    "det_defdetr": _Kind(_features(*_DETR), (*_NEXT, "res50")),
    "det_mask2former": _Kind(_features("c2", "c3", "c4", "c5"), ("next_tiny", "res50")),
    "seg_upernet": _Kind(models.segmentation_features, _NEXT),
    "full_upernet": _Kind(models.segmenter, _NEXT),
    "full_retinanet": _Kind(
        _detector(detectors.retinanet, _RETINA), (*_NEXT, "swin_tiny", "cswin_tiny", "res50")
    ),
    "full_mask_rcnn": _Kind(
        _detector(detectors.mask_rcnn, _TWO_STAGE), (*_NEXT, "swin_tiny", "cswin_tiny")
    ),
    "full_cascade_mask_rcnn": _Kind(
        _detector(detectors.cascade_mask_rcnn, _TWO_STAGE), (*_NEXT, "swin_tiny")
    ),
    "full_deformable_detr": _Kind(
        _detector(partial(detr.deformable_detr, in_features=_DETR), _DETR), (*_NEXT, "res50")
    ),
    "full_mask2former": _Kind(models.mask2former, ("next_tiny",)),
}
_BUILDERS = {
    f"{name}_{trunk}": (kind.build, trunk) for name, kind in _KINDS.items() for trunk in kind.trunks
}

VARIANTS: tuple[str, ...] = tuple(_BUILDERS)


def load(variant: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return an official model in eval mode with its weights.

    The whole detectors, ``full_retinanet_*``, ``full_mask_rcnn_*``, ``full_cascade_mask_rcnn_*``,
    ``full_deformable_detr_*`` and ``full_mask2former_*``, are Detectron2 models for 80 classes:
    they take its batches, with RGB images, and return its results. All others take a normalised
    float image batch ``(N, 3, H, W)`` and return, for ``cls_*``, the scores ``(N, 1000)`` of all
    stages as a list; for ``det_*`` and ``seg_*``, the tuple of feature maps in the official order;
    for ``full_upernet_*``, a dict of ``decode_logits`` and ``aux_logits`` before they are enlarged.

    Args:
        variant: one of :data:`VARIANTS`.
        state_dict: the official weights under the official names; those of ``det_*`` and ``seg_*``
            with or without ``backbone.`` in front. The model gets a copy of them.

    Raises:
        UserError: an unknown variant, or weights that are missing, unused or of another shape.
    """
    return build_with_weights(partial(build, variant), state_dict, "cednet")


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model from :func:`load` or :func:`build` under the official names;
    those of ``det_*`` and ``seg_*`` without ``backbone.``.
    """
    if isinstance(model, models.FeatureTuple):
        model = model.backbone
    return convert_back(model, "cednet")


def build(variant: str) -> nn.Module:
    """Return an official model with fresh weights.

    Raises:
        UserError: an unknown variant.
    """
    if variant not in _BUILDERS:
        raise UserError(f"unknown official model {variant!r}{nearest(variant, VARIANTS)}")
    builder, trunk = _BUILDERS[variant]
    return builder(trunk)
