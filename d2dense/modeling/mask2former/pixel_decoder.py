"""The pixel decoder of Mask2Former: a deformable encoder over three levels, and a finer map.

Letters: N images, C channels, Hi and Wi size of level i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from d2dense.modeling.detr import DeformableEncoder

__all__ = ["PixelDecoder"]


class PixelDecoder(nn.Module):
    """Encodes the three coarsest maps together and adds the finest one as a pyramid does.

    Args:
        input_shape: channels of the backbone's maps by name
        in_features: four of them, finest first
        channels: C
        layers, heads, points, feedforward: of the encoder
        norm_groups: of the group norms
    """

    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str],
        channels: int = 256,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        feedforward: int = 1024,
        norm_groups: int = 32,
    ):
        super().__init__()
        finest, *coarser = (input_shape[name].channels for name in in_features)

        def conv(width: int, kernel: int, **options) -> Conv2d:
            norm = nn.GroupNorm(norm_groups, channels)
            return Conv2d(width, channels, kernel, padding=kernel // 2, norm=norm, **options)

        self.inputs = nn.ModuleList(conv(width, 1) for width in reversed(coarser))
        self.encoder = DeformableEncoder(
            channels=channels,
            levels=len(coarser),
            layers=layers,
            heads=heads,
            points=points,
            feedforward=feedforward,
            dropout=0.0,
            offset=0.0,
        )
        self.lateral = conv(finest, 1, bias=False)
        self.output = conv(channels, 3, bias=False, activation=F.relu)
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for each in self.inputs:
            nn.init.xavier_uniform_(each.weight)
            nn.init.zeros_(each.bias)
        for each in (self.lateral, self.output, self.mask_features):
            nn.init.kaiming_uniform_(each.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the encoded maps ``(N, C, Hi, Wi)``, coarsest first, and the features that masks
        are made of, at the size of the finest map.

        Args:
            maps: of the backbone, finest first
        """
        finest, *coarser = maps
        levels = [conv(each) for conv, each in zip(self.inputs, reversed(coarser))]
        size = finest.shape[2], finest.shape[3]
        # padding is not masked
        whole = [finest.new_full((finest.shape[0],), side, dtype=torch.float32) for side in size]
        memory = self.encoder(levels, torch.stack(whole, dim=1), size)
        counts = [height * width for height, width in memory.shapes]
        encoded = [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(memory.tokens.split(counts, dim=1), memory.shapes)
        ]
        up = F.interpolate(encoded[-1], size=size, mode="bilinear", align_corners=False)
        return encoded, self.mask_features(self.output(self.lateral(finest) + up))
