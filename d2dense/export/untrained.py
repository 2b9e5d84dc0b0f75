"""Untrained models whose outputs differ from place to place, as those of trained ones do.

With fresh weights a detector finds nothing, or everything with one score; a comparison of such
outputs says little.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapt

__all__ = ["spread_outputs"]

# Standard deviation of what a model's last layers give, by the ends of their names: logits, and
# deltas of boxes, which stay moderate; and of what attention of queries compares, for all of them
# would see the mean of the image.
_SPREADS = {
    re.compile(r"(cls_score|objectness_logits|classes(\.\d+)?|classifier|predictor|linear)$"): 2.0,
    re.compile(r"_(query|key)$"): 1.5,
    re.compile(r"(bbox_pred|anchor_deltas|boxes(\.\d+)?\.layers\.\d+)$"): 0.2,
}

# Probabilities near 1 are often equal, and equal scores have no order.
_MOST = 4.0
# Rows that differ by less, relative to all there is, would differ by rounding soon.
_LEAST = 3e-3


@torch.no_grad()
def spread_outputs(model: nn.Module, image: Tensor) -> nn.Module:
    """Scale the weights of the last layers, in place, so that their outputs for ``image`` have the
    spread of a trained model's; weights that are all zero become random ones.

    Args:
        model: in evaluation mode, of a kind that can be exported.
        image: ``(C, H, W)`` in [0, 255].

    Returns:
        ``model``.
    """
    handles = [
        layer.register_forward_hook(_Rescale(spread))
        for name, layer in model.named_modules()
        for pattern, spread in _SPREADS.items()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and pattern.search(name)
    ]
    try:
        adapt(model)(image)
    finally:
        for handle in handles:
            handle.remove()
    return model


class _Rescale:
    """A hook that acts while the model runs, so that later layers see what they will get: in the
    first call for maps, of which the finest come first; in the last one for rows, which are all
    alike before the first layer of a decoder.
    """

    def __init__(self, spread: float):
        self.spread = spread
        self.done = False

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
        if (self.done and output.dim() == 4) or not output.numel():
            return None
        self.done = True
        weight = layer.get_parameter("weight")
        if not weight.any():
            weight.normal_(std=0.01)
            output = layer.forward(*inputs)
        # the bias moves all places alike, channel by channel
        dim = 1 if output.dim() == 4 else -1
        channels = output.movedim(dim, 0).flatten(1)
        mean = channels.mean(1)
        found = channels - mean[:, None]
        if found.std() > _LEAST * channels.std():
            factor = min(self.spread / found.std(), _MOST / found.abs().max())
            weight.mul_(factor)
            if dim == -1 and layer.bias is not None:  # the mean stays, where rows are much alike
                layer.bias.add_((1 - factor) * (mean - layer.bias))
        return layer.forward(*inputs)
