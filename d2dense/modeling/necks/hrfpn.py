"""HRNet's pyramid for detection (https://arxiv.org/abs/1908.07919, section 4): everything at the
finest size, joined, and pooled to the other sizes.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from d2dense.errors import UserError

from .pyramid import checked_divisibility, conv_norm

__all__ = ["HRFPN"]


class HRFPN(Backbone):
    """HRFPN around a backbone: its maps are enlarged to the finest one's size, concatenated and
    mixed by a 1 x 1 convolution; each level is the mean of that map over its stride and a 3 x 3
    convolution.

    Args:
        bottom_up: the backbone
        in_features: names of its maps, finest first
        out_channels: C
        out_strides: of the levels, ``p<k>`` for 2^k: multiples of the finest map's stride that are
            powers of two
        norm: of the convolutions; empty: none
        size_divisibility: to what multiple batches are filled up; None: the coarsest stride of the
            inputs
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        out_channels: int = 256,
        out_strides: Sequence[int] = (8, 16, 32, 64, 128),
        norm: str = "",
        size_divisibility: int | None = None,
    ):
        super().__init__()
        shapes = [bottom_up.output_shape()[name] for name in in_features]
        finest = shapes[0].stride
        if any(stride % finest or stride & (stride - 1) for stride in out_strides):
            raise UserError(
                f"HRFPN cannot pool a map of stride {finest} to strides {list(out_strides)}; "
                "expected multiples of it that are powers of two (out_strides)"
            )
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self.mix = conv_norm(sum(shape.channels for shape in shapes), out_channels, 1, norm)
        self.output = nn.ModuleList(
            conv_norm(out_channels, out_channels, 3, norm) for _ in out_strides
        )
        self._factors = [stride // finest for stride in out_strides]
        self._shapes = {
            f"p{round(math.log2(stride))}": ShapeSpec(channels=out_channels, stride=stride)
            for stride in out_strides
        }
        self._size_divisibility = checked_divisibility(
            size_divisibility, max(shape.stride for shape in shapes)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels ``(N, C, Hi, Wi)`` of normalised images ``(N, 3, H, W)``."""
        maps = self.bottom_up(x)
        maps = [maps[name] for name in self.in_features]
        size = maps[0].shape[-2:]
        enlarged = [
            F.interpolate(each, size=size, mode="bilinear", align_corners=False)
            for each in maps[1:]
        ]
        joined = self.mix(torch.cat([maps[0], *enlarged], dim=1))
        return {
            name: conv(_mean(joined, factor))
            for name, conv, factor in zip(self._shapes, self.output, self._factors)
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


def _mean(x: Tensor, factor: int) -> Tensor:
    """Average over squares of ``factor``; those at the border over what is there."""
    if factor == 1:
        return x
    return F.avg_pool2d(x, factor, ceil_mode=True)
