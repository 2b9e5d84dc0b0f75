"""Hybrid matching (H-DETR, https://arxiv.org/abs/2207.13080, section 3): in training the decoder
has more queries, which are matched with several copies of each object.

Letters: C channels.
"""

from __future__ import annotations

from torch import nn

from .proposals import Proposals, TwoStageQueries
from .queries import Queries

__all__ = ["OneToManyQueries"]


class OneToManyQueries(nn.Module):
    """Queries of the proposals next in rank to those of the detector, with contents of their own.

    Neither of the two groups hears the other one. Inference has only the detector's.

    Args:
        num_queries: how many; T in the paper
        channels: C
        repeats: copies of each object to match; K in the paper
        weight: of their losses; lambda in the paper
    """

    query_rows = ("content.weight",)

    def __init__(
        self,
        *,
        num_queries: int = 1500,
        channels: int = 256,
        repeats: int = 6,
        weight: float = 1.0,
    ):
        super().__init__()
        self.repeats, self.weight = repeats, weight
        self.content = nn.Embedding(num_queries, channels)

    def forward(self, source: TwoStageQueries, proposals: Proposals) -> Queries:
        """Return them for the images of the proposals, which ``source`` has made."""
        return source.following(proposals, self.content.weight)
