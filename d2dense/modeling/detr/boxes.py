"""Boxes as inputs of a network.

Letters: N images, C channels, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .feed_forward import perceptron, xavier_matrices
from .positions import encode_coordinates

__all__ = ["BoxEmbedding", "BoxPositions", "inverse_sigmoid"]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return what the sigmoid turns into ``x`` ``(...)``, of its shape, in float32; x and 1 - x
    count as ``eps`` at least, so that the ends, and boxes that leave the image, stay finite.
    """
    x = x.float().clamp(0.0, 1.0)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class BoxEmbedding(nn.Module):
    """A normalised linear map of the sine encoding of boxes (x, y, w, h).

    Args:
        channels: C; each coordinate has C / 2 sines and cosines
        out_channels: of the result
    """

    def __init__(self, *, channels: int, out_channels: int):
        super().__init__()
        self.channels = channels
        self.linear = nn.Linear(2 * channels, out_channels)
        self.norm = nn.LayerNorm(out_channels)
        xavier_matrices(self)

    def forward(self, boxes: Tensor) -> Tensor:
        """Return ``(N, Q, out_channels)``.

        Args:
            boxes: ``(N, Q, 4)``, cxcywh relative to the image
        """
        return self.norm(self.linear(encode_coordinates(boxes, channels=self.channels // 2)))


class BoxPositions(nn.Module):
    """A perceptron of the sine encoding of boxes (y, x, w, h): the positions of queries in DINO.

    Args:
        channels: C; each coordinate has C / 2 sines and cosines
    """

    def __init__(self, *, channels: int = 256):
        super().__init__()
        self.channels = channels
        self.layers = perceptron(2 * channels, channels, channels)
        xavier_matrices(self)

    def forward(self, boxes: Tensor) -> Tensor:
        """Return ``(N, Q, C)`` for cxcywh boxes ``(N, Q, 4)``."""
        x, y, w, h = boxes.unbind(dim=-1)
        ordered = torch.stack([y, x, w, h], dim=-1)
        return self.layers(encode_coordinates(ordered, channels=self.channels // 2))
