"""Customised positive queries: what auxiliary heads have assigned, as queries of the decoder
(section 3.3, equation 4).

Letters: N images, C channels, A candidates, F feature rows, K heads, Q queries of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from d2dense.errors import UserError
from d2dense.modeling.detr import BoxEmbedding, Queries
from d2dense.modeling.detr.boxes import inverse_sigmoid

from .auxiliary import Candidates

__all__ = ["HEAD_EMBEDDINGS", "PositiveQueries", "Selected", "select"]

HEAD_EMBEDDINGS = ("channels", "scalar", "none")


class Selected(NamedTuple):
    """The candidates of a head that become queries: positives, then negatives, then filling.

    Boxes are cxcywh relative to the image, and may leave it.

    Attributes:
        boxes: ``(N, Q, 4)``.
        labels: ``(N, Q)``; the number of classes is background.
        targets: ``(N, Q, 4)``; any where not positive.
        positive: ``(N, Q)``.
        there: ``(N, Q)``, False for filling, whose boxes and features are zero.
        features: ``(N, Q, C)``.
        full: known on the host, whether all are there.
    """

    boxes: Tensor
    labels: Tensor
    targets: Tensor
    positive: Tensor
    there: Tensor
    features: Tensor
    full: bool


def select(
    candidates: Sequence[Candidates],
    sizes: Tensor,
    *,
    num_classes: int,
    least: int = 9,
    most: int = 300,
    random: bool = True,
    negatives: bool = True,
) -> list[Selected]:
    """Return as many candidates of each head, for all images, as the image with the most positives
    has; what is missing are negatives, and filling where there are not enough of them either. One
    wait for the device, for all heads together.

    Args:
        sizes: ``(N, 1, 4)``, width, height, width, height of the images in pixels
        num_classes: the label of the background
        least, most: bounds of the number
        random: which negatives, and which positives of too many; else the first ones
        negatives: otherwise all that is missing is filling
    """
    masks = []
    for each in candidates:
        positive = each.usable & (each.labels != num_classes)
        masks.append((positive, each.usable if negatives else positive))
    counts = [[mask.sum(dim=1).amax(), usable.sum(dim=1).amin()] for mask, usable in masks]
    counts = torch.stack([torch.stack(each) for each in counts]).tolist()
    return [
        _select(each, *mask, sizes, max(least, min(most, positives)), fewest, random)
        for each, mask, (positives, fewest) in zip(candidates, masks, counts)
    ]


def _select(
    candidates: Candidates,
    positive: Tensor,
    usable: Tensor,
    sizes: Tensor,
    count: int,
    fewest: int,
    random: bool,
) -> Selected:
    length = positive.shape[1]
    # positives before negatives before others, within each by chance or in order
    keys = positive.long() + usable.long()
    if random:
        keys = keys + torch.rand(keys.shape, device=keys.device)
    else:
        keys = keys * length - torch.arange(length, device=keys.device)
    index = keys.topk(min(count, length), dim=1).indices
    if count > length:
        index = nn.functional.pad(index, (0, count - length))
    filled = torch.arange(count, device=index.device) < length
    there = usable.gather(1, index) & filled
    chosen = positive.gather(1, index) & filled
    corners = index[..., None].expand(-1, -1, 4)
    boxes, targets = (
        box_convert(each.gather(1, corners) / sizes, "xyxy", "cxcywh")
        for each in (candidates.boxes, candidates.targets)
    )
    rows = index if candidates.rows is None else candidates.rows[index]
    rows = rows[..., None].expand(-1, -1, candidates.features.shape[2])
    return Selected(
        boxes=boxes * there[..., None],
        labels=candidates.labels.gather(1, index),
        targets=targets,
        positive=chosen,
        there=there,
        features=candidates.features.gather(1, rows) * there[..., None],
        full=fewest >= count,
    )


class PositiveQueries(nn.Module):
    """Makes queries of what was selected of each head.

    Args:
        heads: K
        channels: C
        positions: queries bring positions, as in Deformable DETR; otherwise the decoder makes them
            of the boxes, as in DINO
        features: contents also have the candidates' features
        head_embedding: added to the positions of each head: "channels", "scalar" (a number per
            head, as in the official code, where it is an accident), or "none"
        points: references are the centres of the boxes only
        least, most: of the queries of a head
        random, negatives: see :func:`select`
    """

    def __init__(
        self,
        *,
        heads: int,
        channels: int = 256,
        positions: bool = True,
        features: bool = True,
        head_embedding: str = "channels",
        points: bool = False,
        least: int = 9,
        most: int = 300,
        random: bool = True,
        negatives: bool = True,
    ):
        super().__init__()
        if head_embedding not in HEAD_EMBEDDINGS:
            raise UserError(
                f"head_embedding (MODEL.CODETR.QUERIES.HEAD_EMBEDDING) is {head_embedding!r}; "
                f"expected one of {', '.join(HEAD_EMBEDDINGS)}"
            )
        self.positions, self.points = positions, points
        self.limits = {"least": least, "most": most}
        self.random, self.negatives = random, negatives
        width = 2 * channels if positions else channels
        self.embeddings = nn.ModuleList(
            BoxEmbedding(channels=channels, out_channels=width) for _ in range(heads)
        )
        self.features = None
        if features:
            self.features = nn.ModuleList(
                nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
                for _ in range(heads)
            )
            for each in self.features:
                nn.init.xavier_uniform_(each[0].weight)
        self.head_embedding = None
        if positions and head_embedding != "none":
            shape = (heads, channels if head_embedding == "channels" else 1)
            self.head_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))

    def select(
        self, candidates: Sequence[Candidates], sizes: Tensor, *, num_classes: int
    ) -> list[Selected]:
        """Return what becomes queries of each head's candidates; arguments as in :func:`select`."""
        return select(
            candidates,
            sizes,
            num_classes=num_classes,
            random=self.random,
            negatives=self.negatives,
            **self.limits,
        )

    def forward(self, selected: Sequence[Selected]) -> list[Queries]:
        """Return the queries of each head."""
        return [self._queries(head, each) for head, each in enumerate(selected)]

    def _queries(self, head: int, selected: Selected) -> Queries:
        content = self.embeddings[head](inverse_sigmoid(selected.boxes).sigmoid())
        position = None
        if self.positions:
            position, content = content.chunk(2, dim=-1)
            if self.head_embedding is not None:
                position = position + self.head_embedding[head]
        if self.features is not None:
            content = content + self.features[head](selected.features)
        return Queries(
            content=content,
            position=position,
            references=selected.boxes[..., : 2 if self.points else 4],
            mask=None if selected.full else _deaf(selected.there),
        )


def _deaf(there: Tensor) -> Tensor:
    """Return ``(N, Q, Q)``, True where a query is filling, which only itself hears."""
    itself = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    return ~(there[:, None] | itself)
