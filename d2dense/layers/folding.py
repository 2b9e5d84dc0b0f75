"""Layers that training keeps apart and inference needs only together."""

from __future__ import annotations

from torch import nn

__all__ = ["can_fold", "fold_for_inference"]

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
