"""timm models under feature pyramids, as yaml configs name them; lazy ones call the pyramids
themselves.

``MODEL.TIMM`` says which model (:mod:`~d2dense.modeling.timm_backbone`), ``MODEL.FPN`` which
pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from .necks import HRFPN, NASFPN, BiFPN, PaddedFPN
from .timm_backbone import TimmBackbone

__all__ = [
    "build_retinanet_timm_bifpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_retinanet_timm_hrfpn_backbone",
    "build_retinanet_timm_nas_fpn_backbone",
    "build_timm_fpn_backbone",
]

_FROM_STRIDE_4 = ("res2", "res3", "res4", "res5")
_FROM_STRIDE_8 = _FROM_STRIDE_4[1:]


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Return a timm model under a pyramid whose last level is a max-pooled one, for R-CNN."""
    return PaddedFPN(
        **_settings(cfg, input_shape),
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Return a timm model under a pyramid with p6 and p7 made of its last map, for RetinaNet."""
    return PaddedFPN(
        **_settings(cfg, input_shape, _FROM_STRIDE_8),
        top_block=LastLevelP6P7,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_bifpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Return a timm model under a :class:`BiFPN` of levels p3 to p7."""
    return BiFPN(
        **_settings(cfg, input_shape, _FROM_STRIDE_8), num_layers=cfg.MODEL.FPN.NUM_REPEATS
    )


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_nas_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Return a timm model under a :class:`NASFPN`."""
    return NASFPN(
        **_settings(cfg, input_shape, _FROM_STRIDE_8), num_stages=cfg.MODEL.FPN.NUM_REPEATS
    )


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_hrfpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Return a timm model under an :class:`HRFPN` of levels p3 to p7."""
    return HRFPN(**_settings(cfg, input_shape))


def _settings(
    cfg: CfgNode, input_shape: ShapeSpec, maps: Sequence[str] = _FROM_STRIDE_4
) -> dict[str, Any]:
    """Return what all pyramids take.

    Args:
        maps: what the pyramid stands on where neither ``MODEL.FPN`` nor ``MODEL.TIMM`` names maps
    """
    node, named = cfg.MODEL.FPN, list(cfg.MODEL.TIMM.OUT_FEATURES)
    in_features = list(node.IN_FEATURES) or named or list(maps)
    return {
        "bottom_up": TimmBackbone(cfg, input_shape, out_features=named or in_features),
        "in_features": in_features,
        "out_channels": node.OUT_CHANNELS,
        "norm": node.NORM,
        "size_divisibility": node.SIZE_DIVISIBILITY or None,
    }
