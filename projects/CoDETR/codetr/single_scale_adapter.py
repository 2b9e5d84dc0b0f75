"""Maps of several strides from the encoded map of a detector with one.

Letters: N images, C channels, Hl and Wl size of level l.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.modeling.detr import Memory

__all__ = ["SingleScaleAdapter"]


class SingleScaleAdapter(nn.Module):
    """A pyramid from one map: finer levels one from the other by doubling bilinearly and a 3x3
    convolution, coarser ones by 3x3 convolutions of stride 2 (Co-DETR, section 3.1). All
    convolutions have group norm, which the paper leaves open.

    Args:
        channels: C
        finer, coarser: how many levels there are below and above the map; with 2 and 2 a map of
            stride 32 becomes strides 8 to 128
        groups: of the norms
    """

    def __init__(self, *, channels: int = 256, finer: int = 2, coarser: int = 2, groups: int = 32):
        super().__init__()

        def conv(stride: int) -> nn.Sequential:
            layer = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            return nn.Sequential(layer, nn.GroupNorm(groups, channels))

        self.upward = nn.ModuleList(conv(1) for _ in range(finer))
        self.downward = nn.ModuleList(conv(2) for _ in range(coarser))

    def forward(self, memory: Memory) -> list[Tensor]:
        """Return ``(N, C, Hl, Wl)`` per level, finest first; nothing is detached.

        Args:
            memory: of one level
        """
        (shape,) = memory.shapes
        levels = [memory.tokens.transpose(1, 2).unflatten(2, shape)]
        for conv in self.upward:
            doubled = F.interpolate(levels[0], scale_factor=2, mode="bilinear", align_corners=False)
            levels.insert(0, conv(doubled))
        for conv in self.downward:
            levels.append(conv(levels[-1]))
        return levels
