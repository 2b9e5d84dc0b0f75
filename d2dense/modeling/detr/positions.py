"""Sine encoding of image positions and of coordinates.

Letters: N images, Hl and Wl size of a level, E channels per axis or coordinate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["SinePositions", "encode_coordinates"]


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
            axes.append(_waves(angle, self.channels // 2, self.temperature))
        return torch.cat(axes, dim=3).permute(0, 3, 1, 2)


def encode_coordinates(
    coordinates: Tensor, *, channels: int, temperature: float = 10000.0
) -> Tensor:
    """Return sines and cosines by turns, the coordinates one after the other, ``(..., K E)``,
    float32.

    Args:
        coordinates: ``(..., K)``, relative to the image: 1 is a whole turn
        channels: E, of each coordinate
        temperature: ratio of the longest to the shortest wave length
    """
    return _waves(coordinates.float() * (2 * math.pi), channels, temperature).flatten(-2)


def _waves(angle: Tensor, channels: int, temperature: float) -> Tensor:
    """Return ``(..., channels)`` from ``(...)``."""
    pair = torch.arange(channels // 2, dtype=torch.float32, device=angle.device)
    angle = angle[..., None] / temperature ** (2 * pair / channels)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
