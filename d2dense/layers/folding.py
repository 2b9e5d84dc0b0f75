"""Layers that training keeps apart and inference needs only together."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

__all__ = ["can_fold", "fold_for_inference", "fold_frozen_norms"]

_METHOD = "fold_for_inference"


def can_fold(model: nn.Module) -> bool:
    """Whether :func:`fold_for_inference` would change ``model``."""
    return any(callable(getattr(module, _METHOD, None)) for module in model.modules())


def fold_for_inference(model: nn.Module) -> nn.Module:
    """Let every module with a method ``fold_for_inference`` do so, in place; return ``model``.

    The outputs in evaluation mode stay the same up to rounding; training is over.
    """
    for module in list(model.modules()):
        if callable(getattr(module, _METHOD, None)):
            module.fold_for_inference()
    return model


@torch.no_grad()
def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Let every convolution with a frozen batch norm do what both do, in place; return ``model``.

    The outputs stay the same up to rounding; what the model's tensors are called does not.
    """
    for conv in model.modules():
        norm = getattr(conv, "norm", None)
        if not isinstance(conv, Conv2d) or not isinstance(norm, FrozenBatchNorm2d):
            continue
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = 0.0 if conv.bias is None else conv.bias * scale
        bias = nn.Parameter(norm.bias + shift - norm.running_mean * scale)
        conv.weight *= scale[:, None, None, None]
        conv.bias = bias.requires_grad_(conv.weight.requires_grad)
        conv.norm = None
    return model
