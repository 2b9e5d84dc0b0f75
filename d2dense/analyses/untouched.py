"""Ask a model for its losses without leaving a trace in it.

Losses need training mode, but the numbers should be those of the model as it is tested: no branch
or unit dropped, fixed statistics, the same random draws every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.modeling.backbone import Backbone
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from d2dense.layers import Residual

__all__ = ["set_loss_mode", "untouched"]

_QUIET = (_NormBase, _DropoutNd, nn.MultiheadAttention, Residual)
# Stochastic depth and dropout of other libraries, which share no base class.
_QUIET_NAMES = ("dropout", "droppath", "dropblock", "stochasticdepth")


def set_loss_mode(model: nn.Module) -> None:
    """Put a detector into the mode that returns losses, as repeatable as it gets.

    Everything is in training mode, except for whole Detectron2 ``Backbone`` modules, norms with
    running statistics, attention, dropout and stochastic depth. What calls
    ``torch.nn.functional.dropout`` outside of a backbone by itself is not recognised.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, (Backbone, *_QUIET)) or _is_quiet(type(module).__name__):
            module.eval()


def _is_quiet(class_name: str) -> bool:
    return any(name in class_name.lower() for name in _QUIET_NAMES)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within a ``with`` block parameters need no gradient; after it the model is as it was before:
    mode of each module, buffers, ``requires_grad`` and attributes that were set (such as the
    running ``loss_normalizer`` of Detectron2's RetinaNet). Lists and dicts that a module changes
    in place are not covered.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(b, b.clone()) for _, own in buffers for b in own.values() if b is not None]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        for module, before in buffers:
            module._buffers.clear()
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for parameter, before in needed:
            parameter.requires_grad_(before)
