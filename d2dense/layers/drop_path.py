"""The sum that ends a residual block: layer scale and stochastic depth in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Residual"]


class Residual(nn.Module):
    """Add a branch to its input, ``x + scale * branch``, both ``(N, C, H, W)``.

    Args:
        channels: C, for the layer scale.
        layer_scale: initial value of one learnt factor per channel; None for no factor.
        drop_path: probability with which training drops the branch of an image; what is kept is
            scaled up, so that the expected value stays.
    """

    def __init__(self, *, channels: int, layer_scale: float | None = None, drop_path: float = 0.0):
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}, expected 0 <= drop_path < 1")
        self.drop_path = float(drop_path)
        self.gamma = (
            None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))
        )

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the sum, ``(N, C, H, W)``."""
        gamma = self.gamma
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            scale = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)
            if gamma is not None:
                scale = scale * gamma.view(-1, 1, 1)
            return torch.addcmul(x, branch, scale)
        if gamma is not None:
            return torch.addcmul(x, branch, gamma.view(-1, 1, 1))
        return x + branch

    def extra_repr(self) -> str:
        scaled = "" if self.gamma is None else f"channels={len(self.gamma)}, "
        return f"{scaled}drop_path={self.drop_path:.4g}"
