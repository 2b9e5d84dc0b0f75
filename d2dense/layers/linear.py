"""Linear layers that need no pass over the result for their bias, residual or ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .deformable_sampling import is_recorded

__all__ = ["Linear"]

# None where PyTorch is built without oneDNN, as for some processors
_PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """``nn.Linear``, with the same parameters and results.

    On the CPU, where nothing is kept for a gradient, oneDNN does it all in one product of matrices;
    PyTorch's own way first copies the bias to every row.
    """

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Return ``(..., out_features)``; ``relu``: negative values become zero."""
        if self.is_fused(x):
            how = "relu" if relu else "none"
            rows = x.reshape(-1, x.shape[-1])
            y = _PRODUCT(rows, self.weight, self.bias, how, [], "")
            return y.view(*x.shape[:-1], y.shape[1])
        y = F.linear(x, self.weight, self.bias)
        return F.relu(y) if relu else y

    def is_fused(self, x: Tensor) -> bool:
        """Return whether oneDNN does it."""
        kept = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return (
            not kept
            and x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and _PRODUCT is not None
            and torch.backends.mkldnn.enabled
            and not is_recorded()
        )


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_, **__) -> int:
    return 2 * x[0] * weight[0] * weight[1]


if _PRODUCT is not None:
    register_flop_formula(_PRODUCT)(_flops)
