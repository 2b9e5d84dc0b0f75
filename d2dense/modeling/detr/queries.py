"""Where the queries of the decoder come from.

Letters: N images, C channels, Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .memory import Memory

if TYPE_CHECKING:
    from .proposals import Proposals

__all__ = ["LearnedQueries", "Queries"]


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
