"""The perceptrons of transformers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import Linear

__all__ = ["FeedForward", "perceptron", "xavier_matrices"]

_AT_ONCE = 2048  # rows whose hidden states are small enough to reuse the memory of those before
_ACTIVATIONS = {"relu": nn.ReLU, "prelu": nn.PReLU}


class FeedForward(nn.Module):
    """Linear, activation, linear on ``(..., C)``, with dropout after both.

    Args:
        channels: C
        hidden: width between the two
        dropout: probability
        activation: "relu" or "prelu"
    """

    def __init__(
        self, *, channels: int, hidden: int, dropout: float = 0.0, activation: str = "relu"
    ):
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UserError(f"activation {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
        self.linear1 = Linear(channels, hidden)
        self.activation = _ACTIVATIONS[activation]()
        self.linear2 = Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)
        xavier_matrices(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to the same shape."""
        if not self.linear1.is_fused(x):
            return self._whole(x)
        parts = x.flatten(0, -2).split(_AT_ONCE)
        return torch.cat([self._whole(each) for each in parts]).view(x.shape)

    def _whole(self, x: Tensor) -> Tensor:
        relu = isinstance(self.activation, nn.ReLU)
        hidden = self.linear1(x, relu=relu)
        if not relu:
            hidden = self.activation(hidden)
        return self.dropout(self.linear2(self.dropout(hidden)))


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers between these widths, with ReLU between them."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def xavier_matrices(module: nn.Module) -> None:
    """Draw every matrix of ``module`` anew, uniform after Glorot."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
