"""Attention that keeps what a query says and where it looks apart (Conditional DETR, section 3.2).

Letters: N images, C channels, Q queries, S positions of the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConditionalCrossAttention", "ConditionalSelfAttention"]


class _Attention(nn.Module):
    """What both have: projections of contents and of positions, and the attention itself."""

    def __init__(self, *, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout  # of the attention's weights
        self.content_query = nn.Linear(channels, channels)
        self.content_key = nn.Linear(channels, channels)
        self.position_key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        nn.init.zeros_(self.output.bias)

    def _split(self, *halves: Tensor) -> Tensor:
        """Return ``(N, heads, Q or S, width)``: in every head its part of each half, in a row."""
        parts = [half.unflatten(2, (self.heads, -1)) for half in halves]
        return torch.cat(parts, dim=3).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, there: Tensor | None) -> Tensor:
        read = F.scaled_dot_product_attention(
            query, key, value, there, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(read.transpose(1, 2).flatten(2))


class ConditionalSelfAttention(_Attention):
    """Between queries; contents and positions have projections of their own, which are added.

    Args:
        channels: C
        heads: of the attention
        dropout: probability, of the attention's weights
    """

    def __init__(self, *, channels: int, heads: int, dropout: float):
        super().__init__(channels=channels, heads=heads, dropout=dropout)
        self.position_query = nn.Linear(channels, channels)

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what each query heard, ``(N, Q, C)``.

        Args:
            content, position: ``(N, Q, C)``
            mask: see :class:`Queries`
        """
        query = self.content_query(content) + self.position_query(position)
        key = self.content_key(content) + self.position_key(position)
        if mask is not None:
            mask = ~mask if mask.ndim == 2 else ~mask[:, None]
        value = self.value(content)
        return self._attend(self._split(query), self._split(key), self._split(value), mask)


class ConditionalCrossAttention(_Attention):
    """From queries to the memory: in each head contents are compared with contents, and beside
    them, not mixed, the query's place with the places of the memory.

    Args:
        channels: C
        heads: of the attention
        dropout: probability, of the attention's weights
        first: of the first layer, where the contents of the queries say nothing yet: the projected
            positions are added to both sides' contents too
    """

    def __init__(self, *, channels: int, heads: int, dropout: float, first: bool = False):
        super().__init__(channels=channels, heads=heads, dropout=dropout)
        self.spatial_query = nn.Linear(channels, channels)
        self.position_query = nn.Linear(channels, channels) if first else None

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        spatial: Tensor,
        tokens: Tensor,
        positions: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """Return what each query read, ``(N, Q, C)``.

        Args:
            content, position: ``(N, Q, C)``; the position is used in the first layer only
            spatial: ``(N, Q, C)``, where the query looks, as an encoded place
            tokens, positions: ``(N, S, C)``, see :class:`Memory`
            padding: ``(N, S)``, True where there is no image
        """
        query, key = self.content_query(content), self.content_key(tokens)
        place = self.position_key(positions)
        if self.position_query is not None:
            query, key = query + self.position_query(position), key + place
        return self._attend(
            self._split(query, self.spatial_query(spatial)),
            self._split(key, place),
            self._split(self.value(tokens)),
            ~padding[:, None, None],
        )
