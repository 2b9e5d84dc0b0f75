"""The two-layer perceptron of convolutional and attention blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP2d"]


class MLP2d(nn.Module):
    """Linear, exact GELU, linear at every pixel of ``(N, C, H, W)``; images in ``channels_last``
    memory are not copied.

    Args:
        channels: C, of input and output.
        ratio: hidden width divided by C.
    """

    def __init__(self, channels: int, *, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        pixels = self.fc1(x.permute(0, 2, 3, 1))
        return self.fc2(F.gelu(pixels)).permute(0, 3, 1, 2)
