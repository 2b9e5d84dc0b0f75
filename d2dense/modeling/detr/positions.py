"""Sine encoding of image positions.

Letters: N images, Hl and Wl size of a level, E channels per axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["SinePositions"]


class SinePositions(nn.Module):
    """Sines and cosines of the position within the image without its padding.

    Args:
        channels: of both axes together, 2 E
        temperature: ratio of the longest to the shortest wave length
        offset: added to positions that count from 1, in cells; -0.5 means their centres
    """

    def __init__(self, *, channels: int, temperature: float = 10000.0, offset: float = 0.0):
        super().__init__()
        if channels % 4:
            raise ValueError(f"{channels} channels of positions; expected a multiple of 4")
        self.channels = channels
        self.temperature = temperature
        self.offset = offset

    def forward(self, padding: Tensor) -> Tensor:
        """Return ``(N, 2 E, Hl, Wl)``, float32: y in the first half, x in the second, sine and
        cosine by turns.

        Args:
            padding: ``(N, Hl, Wl)``, True where there is no image
        """
        there = (~padding).to(torch.float32)
        axes = []
        for dim in (1, 2):
            count = there.cumsum(dim)
            last = count.narrow(dim, count.shape[dim] - 1, 1)
            angle = (count + self.offset) / (last + 1e-6) * (2 * math.pi)
            axes.append(self._waves(angle))
        return torch.cat(axes, dim=3).permute(0, 3, 1, 2)

    def _waves(self, angle: Tensor) -> Tensor:
        half = self.channels // 2
        pair = torch.arange(half // 2, dtype=torch.float32, device=angle.device)
        angle = angle[..., None] / self.temperature ** (4 * pair / self.channels)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(3)
