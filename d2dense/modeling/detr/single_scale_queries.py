"""Query sources of Conditional DETR and of DAB-DETR: the same queries for every image, whose
contents start from zero.

Letters: N images, C channels, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .feed_forward import perceptron, xavier_matrices
from .memory import Memory
from .queries import Queries

__all__ = ["AnchorQueries", "PointQueries"]


class PointQueries(nn.Module):
    """Learned positions; each one's reference point follows from it by two linear layers.

    Args:
        num_queries: Q
        channels: C
    """

    query_rows = ("embedding.weight",)

    def __init__(self, *, num_queries: int = 300, channels: int = 256):
        super().__init__()
        self.embedding = nn.Embedding(num_queries, channels)  # of positions
        self.reference_points = perceptron(channels, channels, 2)
        xavier_matrices(self.reference_points)

    def forward(self, memory: Memory) -> Queries:
        """Return them for each image of ``memory``, with points xy relative to the image."""
        rows = torch.arange(self.embedding.num_embeddings, device=memory.tokens.device)
        positions = self.embedding(rows)
        return _queries(memory, positions, self.reference_points(positions).float().sigmoid())


class AnchorQueries(nn.Module):
    """Learned boxes; the decoder makes positions of them.

    Args:
        num_queries: Q
        freeze_centres: the centres stay as they were drawn, all over the image
    """

    query_rows = ("centres", "sides")

    def __init__(self, *, num_queries: int = 300, freeze_centres: bool = True):
        super().__init__()
        centres = torch.logit(torch.empty(num_queries, 2).uniform_(), eps=1e-5)
        self.centres = nn.Parameter(centres, requires_grad=not freeze_centres)  # logits of xy
        self.sides = nn.Parameter(torch.empty(num_queries, 2).normal_())  # and of wh

    def forward(self, memory: Memory) -> Queries:
        """Return them for each image of ``memory``, with boxes cxcywh relative to the image."""
        boxes = torch.cat([self.centres, self.sides], dim=1).float().sigmoid()
        return _queries(memory, None, boxes)


def _queries(memory: Memory, position: Tensor | None, references: Tensor) -> Queries:
    n, _, channels = memory.tokens.shape
    content = memory.tokens.new_zeros(1, references.shape[0], channels)
    return Queries(
        content=content.expand(n, -1, -1),
        position=None if position is None else position.expand(n, -1, -1),
        references=references.expand(n, -1, -1),
    )
