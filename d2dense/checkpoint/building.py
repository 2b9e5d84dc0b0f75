"""Models of other code bases: ours, built around their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .conversion import convert

__all__ = ["build_with_weights"]


def build_with_weights(
    build: Callable[[], nn.Module], state_dict: Mapping[str, Tensor], source: str
) -> nn.Module:
    """Return a model in eval mode on the CPU with a copy of these weights; no time and memory go
    into initial ones.

    Args:
        build: makes the model
        state_dict: under the names of ``source``, see :func:`convert`

    Raises:
        UserError: weights that are missing, unused or of another shape.
    """
    with _NoMemory():
        model = build()
    own = model.state_dict()
    weights = convert(state_dict, source, model)
    for name in own.keys() - weights.keys():
        # what the model computes; or counts of batches, which nobody reads
        known = not own[name].is_meta
        weights[name] = own[name] if known else torch.zeros_like(own[name], device="cpu")
    weights = {name: value.to("cpu", own[name].dtype, copy=True) for name, value in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


class _NoMemory(TorchFunctionMode):
    """Weights are created without memory and initial values; tensors that are computed, such as
    anchors, exist.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
