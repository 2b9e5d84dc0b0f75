"""Where the matched queries of a detection transformer look (the cross attention of the Co-DETR
paper's discriminability analysis).

Not stated in the paper and fixed here: of the queries that get an object after the last layer, the
attention weights of every layer are spread over the positions that they read, bilinearly as they
read them; sum over these queries, the heads and the points, mean over the layers.

What a query reads is linear in the projected values, so the weight that a position got is the
derivative of what was read with respect to the position's value. Taken that way it needs nothing
of how attention is computed and holds for sampled points as for dense attention.

Letters: N images, C channels, Q queries, S positions of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2dense.errors import UserError

from .discriminability import Levels, split_levels
from .matching import match, require_transformer

__all__ = ["attention_levels", "received_attention", "record_reading"]

# Names of the projections of values and of what is read.
_PROJECTIONS = (("value_proj", "output_proj"), ("value", "output"))


class _Reading:
    """What an attention module was given and read in its last call.

    Attributes:
        values: ``(N, S, C)``, projected, a leaf of the graph.
        read: ``(N, Q, C)``, before the last projection.
    """

    values: Tensor
    read: Tensor

    def __init__(self, attention: nn.Module):
        names = next((n for n in _PROJECTIONS if all(hasattr(attention, x) for x in n)), None)
        if names is None:
            raise UserError(
                f"the cross attention {type(attention).__name__} has no projections of values and "
                "of what is read; maps are for deformable and conditional attention"
            )
        self.heads: int = attention.heads
        value, output = (getattr(attention, name) for name in names)
        self.hooks = [
            value.register_forward_hook(self._keep_values),
            output.register_forward_pre_hook(self._keep_read),
        ]

    def _keep_values(self, module: nn.Module, given: tuple, values: Tensor) -> Tensor:
        self.values = values.detach().requires_grad_()
        return self.values.clone()  # attention may blank out padding in place

    def _keep_read(self, module: nn.Module, given: tuple[Tensor]) -> None:
        (self.read,) = given


@contextmanager
def record_reading(attentions: Sequence[nn.Module]) -> Iterator[list[_Reading]]:
    """Within a ``with`` block calls of these modules are recorded, with a graph from the values to
    what is read. Results are those of a pass that keeps a graph: some kernels of such passes round
    differently from those of inference.

    Raises:
        UserError: another kind of attention.
    """
    readings: list[_Reading] = []
    try:
        for attention in attentions:
            readings.append(_Reading(attention))
        with torch.enable_grad():
            yield readings
    finally:
        for hook in (hook for each in readings for hook in each.hooks):
            hook.remove()


def received_attention(reading: _Reading, queries: Tensor) -> Tensor:
    """Return the attention ``(N, S)`` that each position gets of some queries, summed over them and
    over the heads. It sums to queries times heads if nobody looks beyond the image.

    Args:
        queries: ``(Q,)``, True for those that count
    """
    (weights,) = torch.autograd.grad(
        reading.read[:, queries].sum(), reading.values, retain_graph=True
    )
    # all channels of a head have its weight
    return weights.sum(dim=-1) * (reading.heads / weights.shape[-1])


def attention_levels(model: nn.Module, sample: Mapping[str, Any]) -> Levels:
    """Return the attention that each position of each level gets, maps of one channel.

    Args:
        model: a detection transformer, in eval mode
        sample: ``image`` and ``instances``

    Raises:
        UserError: another model.
    """
    model = require_transformer(model)
    found = match(model, sample)
    with record_reading([layer.cross_attention for layer in model.decoder.layers]) as readings:
        model.predict(found.queries, found.memory)
    chosen = found.objects >= 0
    layers = [received_attention(each, chosen)[0] for each in readings]
    tokens = torch.stack(layers).mean(dim=0)[:, None]
    image = sample["image"]
    padded = tuple(model.preprocess([sample]).tensor.shape[2:])
    return Levels(split_levels(tokens, found.memory), padded, tuple(image.shape[1:]))
