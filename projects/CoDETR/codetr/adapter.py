"""From the encoder's memory to the maps of auxiliary heads.

Letters: N images, C channels, L levels, Hl and Wl size of level l.
"""

from __future__ import annotations

from torch import Tensor, nn

from d2dense.modeling.detr import Memory

__all__ = ["MultiScaleAdapter"]


class MultiScaleAdapter(nn.Module):
    """The encoded levels as maps, with the graph that made them, and one coarser map.

    Args:
        channels: C
        groups: of the coarser map's norm
    """

    def __init__(self, *, channels: int = 256, groups: int = 32):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
        self.downsample = nn.Sequential(conv, nn.GroupNorm(groups, channels))

    def forward(self, memory: Memory) -> list[Tensor]:
        """Return L + 1 maps ``(N, C, Hl, Wl)``, finest first."""
        sizes = [height * width for height, width in memory.shapes]
        maps = [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(memory.tokens.split(sizes, dim=1), memory.shapes)
        ]
        return [*maps, self.downsample(maps[-1])]
