"""A plain vision transformer with the levels that detectors and segmenters take.

Letters: N images, C channels, H and W of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from d2dense.errors import UserError, nearest

from .simple_pyramid import SIMPLE_LEVELS, SimplePyramid

__all__ = ["ViTPyramid"]

_STRIDE = 16


@BACKBONE_REGISTRY.register()
class ViTPyramid(Backbone):
    """A backbone's map at stride 16 under a :class:`SimplePyramid`, as a backbone of its own. Its
    levels are ``(N, C, Hl, Wl)`` of images that are filled up to :attr:`size_divisibility`.

    Args:
        bottom_up: its last map counts: ``EVA02ViT``, Detectron2's ``ViT``, or a plain vision
            transformer of timm with ``out_indices=[-1]``
        levels: some of ``p2`` to ``p7``, finest first. R-CNNs take p2 .. p6, RetinaNet p3 .. p7,
            segmenters p2 .. p5.
        out_channels: C

    Raises:
        UserError: a map of another stride, or unknown levels.
    """

    @configurable
    def __init__(
        self,
        *,
        bottom_up: Backbone,
        levels: Sequence[str] = SIMPLE_LEVELS,
        out_channels: int = 256,
    ):
        super().__init__()
        name, shape = list(bottom_up.output_shape().items())[-1]
        if shape.stride != _STRIDE:
            raise UserError(
                f"ViTPyramid stands on a map of stride {_STRIDE}, but {name} of "
                f"{type(bottom_up).__name__} has {shape.stride}; use a feature pyramid "
                "(build_timm_fpn_backbone / PaddedFPN), or a plain vision transformer of patches "
                f"of {_STRIDE} pixels (MODEL.VIT_PYRAMID.BODY / bottom_up)"
            )
        self.bottom_up = bottom_up
        self.in_feature = name
        self.pyramid = SimplePyramid(
            in_channels=shape.channels, out_channels=out_channels, levels=levels
        )
        self._out_features = list(levels)
        self._out_feature_strides = {level: 2 ** int(level[1:]) for level in levels}
        self._out_feature_channels = dict.fromkeys(levels, out_channels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.VIT_PYRAMID
        known = [name for name, _ in BACKBONE_REGISTRY]
        if node.BODY not in known:
            raise UserError(
                f"MODEL.VIT_PYRAMID.BODY is {node.BODY!r}, which is no registered backbone"
                f"{nearest(node.BODY, known)}"
            )
        return {
            "bottom_up": BACKBONE_REGISTRY.get(node.BODY)(cfg, input_shape),
            "levels": node.LEVELS,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of normalised images ``(N, 3, H, W)`` by name."""
        return dict(zip(self._out_features, self.pyramid([self.bottom_up(x)[self.in_feature]])))

    @property
    def size_divisibility(self) -> int:
        return max(self.bottom_up.size_divisibility, _STRIDE)

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.bottom_up.padding_constraints
