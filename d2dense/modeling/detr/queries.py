"""Where the queries of the decoder come from.

Letters: N images, C channels, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .memory import Memory

if TYPE_CHECKING:
    from .proposals import Proposals

__all__ = ["LearnedQueries", "Queries", "join"]


class Queries(NamedTuple):
    """What the decoder starts from.

    Attributes:
        content: ``(N, Q, C)``.
        position: ``(N, Q, C)``, added to the content wherever it asks; None where the decoder makes
            it of the references.
        references: ``(N, Q, 2)`` points xy or ``(N, Q, 4)`` boxes cxcywh, relative to the image
            without padding.
        mask: ``(Q, Q)`` or ``(N, Q, Q)``, True where a query (row) does not hear another one; None:
            all hear all.
        proposals: what the encoder predicted, in two stages.
    """

    content: Tensor
    position: Tensor | None
    references: Tensor
    mask: Tensor | None = None
    proposals: Proposals | None = None


def join(groups: Sequence[Queries]) -> Queries:
    """Return the queries of all groups as one set, in which groups do not hear each other."""
    lengths = [each.content.shape[1] for each in groups]
    images, total = groups[0].content.shape[0], sum(lengths)
    mask = groups[0].content.new_ones(images, total, total, dtype=torch.bool)
    if all(each.mask is None for each in groups):
        mask = mask[0]
    first = 0
    for each, length in zip(groups, lengths):
        part = slice(first, first + length)
        mask[..., part, part] = False if each.mask is None else each.mask
        first += length
    position = None
    if groups[0].position is not None:
        position = torch.cat([each.position for each in groups], dim=1)
    return Queries(
        content=torch.cat([each.content for each in groups], dim=1),
        position=position,
        references=torch.cat([each.references for each in groups], dim=1),
        mask=mask,
    )


class LearnedQueries(nn.Module):
    """The same queries for every image; their points follow from their positions.

    Args:
        num_queries: Q
        channels: C
    """

    query_rows = ("embedding.weight",)

    def __init__(self, *, num_queries: int = 300, channels: int = 256):
        super().__init__()
        self.embedding = nn.Embedding(num_queries, 2 * channels)  # position, then content
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory) -> Queries:
        """Return them for each image of ``memory``."""
        n = memory.tokens.shape[0]
        rows = torch.arange(self.embedding.num_embeddings, device=memory.tokens.device)
        position, content = self.embedding(rows).chunk(2, dim=1)
        references = self.reference_points(position).float().sigmoid()
        return Queries(*(each.expand(n, -1, -1) for each in (content, position, references)))
