"""Multi-scale deformable attention (Deformable DETR, section 4.1).

Letters: N batch, S positions of all levels together, C channels, M heads, Q queries, L levels,
P points per level and head, Hl and Wl size of level l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2dense.errors import UserError

from .deformable_sampling import deformable_sampling
from .linear import Linear

__all__ = ["MultiScaleDeformableAttention"]


class MultiScaleDeformableAttention(nn.Module):
    """Every query reads a few learnt points around its reference on every level.

    Args:
        channels: C, of queries, values and result
        heads: M, a divisor of C
        levels: L
        points: P
    """

    def __init__(self, *, channels: int, heads: int = 8, levels: int = 4, points: int = 4):
        super().__init__()
        if channels % heads:
            raise UserError(
                f"deformable attention splits {channels} channels into {heads} heads; the number "
                "of channels must be a multiple of that of heads (MODEL.DETR.CHANNELS, HEADS)"
            )
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = Linear(channels, heads * levels * points * 2)
        self.attention_weights = Linear(channels, heads * levels * points)
        self.value_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start head m looks into direction m / M of a circle, its k-th point k pixels away
        (on a square), with equal weights.
        """
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * steps[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            bias = offsets.expand(-1, self.levels, -1, -1).reshape(-1)
            self.sampling_offsets.bias.copy_(bias)
        for zeros in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(zeros)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        references: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Return what each query reads, ``(N, Q, C)``.

        Args:
            query: ``(N, Q, C)``, with its position added
            references: ``(N, Q, L, 2)`` points xy, or ``(N, Q, L, 4)`` boxes cxcywh, relative to
                each level's size; offsets are in pixels of the level around points, in half a
                box's size divided by P around boxes
            value: ``(N, S, C)``, the levels one after the other, each row by row
            shapes: (Hl, Wl) per level
            padding: ``(N, S)``, True where there is no image; such positions read as zero
        """
        value = self.value_proj(value)
        if padding is not None:
            value.masked_fill_(padding[..., None], 0.0)
        value = value.unflatten(2, (self.heads, value.shape[2] // self.heads))
        weights = self.attention_weights(query)
        weights = weights.unflatten(2, (self.heads, self.levels * self.points))
        weights = weights.softmax(dim=-1, dtype=_at_least_float32(weights))
        weights = weights.unflatten(3, (self.levels, self.points))
        locations = self._locations(query, references, shapes)
        return self.output_proj(deformable_sampling(value, shapes, locations, weights))

    def _locations(
        self, query: Tensor, references: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return the points that the queries read, ``(N, Q, M, L, P, 2)``, relative to the level's
        size, in float32 at least.
        """
        offsets = self.sampling_offsets(query)
        offsets = offsets.to(_at_least_float32(offsets))
        # all of a head's levels, points and axes as one row: long rows are what is fast
        offsets = offsets.unflatten(2, (self.heads, self.levels * self.points * 2))
        xy, wh = self._rows(references[..., :2]), self._rows(references[..., 2:])
        if wh is not None:
            locations = torch.addcmul(xy, offsets, wh * (0.5 / self.points))
        else:
            sides = [side for height, width in shapes for side in (width, height)]
            sizes = torch.cat([offsets.new_full((1,), side) for side in sides])
            locations = torch.addcdiv(xy, offsets, self._rows(sizes.view(1, 1, -1, 2)))
        return locations.unflatten(3, (self.levels, self.points, 2))

    def _rows(self, pairs: Tensor) -> Tensor | None:
        """Return a pair per level, ``(N, Q, L, 2)``, as rows ``(N, Q, 1, L P 2)``; None of none."""
        if not pairs.shape[-1]:
            return None
        return pairs[:, :, None, :, None].expand(-1, -1, -1, -1, self.points, -1).flatten(3)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
