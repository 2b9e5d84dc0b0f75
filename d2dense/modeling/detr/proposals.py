"""Two stages: the encoder's own predictions are where the decoder starts (Deformable DETR,
appendix A.4), with learned contents (DINO's mixed query selection).

Letters: N images, C channels, S positions of all levels together, Q queries, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.layers import Linear

from .boxes import BoxEmbedding
from .heads import BoxHead
from .memory import Memory
from .queries import Queries

__all__ = ["EncoderPredictions", "Proposals", "TwoStageQueries", "anchor_boxes"]


class Proposals(NamedTuple):
    """What the encoder predicts at its positions, and the best of them.

    Boxes are cxcywh relative to the image; nothing is detached.

    Attributes:
        features: ``(N, S, C)``.
        anchors: ``(N, S, 4)``, see :func:`anchor_boxes`.
        valid: ``(N, S)``, False where there is no image or the anchor is close to its border.
        logits: ``(N, S, K)``.
        scores: ``(N, S)``, logits by which the best are chosen.
        index: ``(N, Q)``, positions of the best ones, best first; S and more where there are fewer
            than Q positions.
        top_scores: ``(N, Q)``, their scores.
        boxes: ``(N, Q, 4)``, their boxes.
    """

    features: Tensor
    anchors: Tensor
    valid: Tensor
    logits: Tensor
    scores: Tensor
    index: Tensor
    top_scores: Tensor
    boxes: Tensor


class EncoderPredictions(NamedTuple):
    """What of the encoder's predictions has a loss.

    Attributes:
        logits: ``(N, T, K)``.
        boxes: ``(N, T, 4)``, cxcywh relative to the image.
        binary: all objects are of class 0.
    """

    logits: Tensor
    boxes: Tensor
    binary: bool


def anchor_boxes(memory: Memory) -> tuple[Tensor, Tensor]:
    """Return a box around the centre of each position, ``(N, S, 4)``, cxcywh relative to the image,
    0.05 wide and high in the first level and twice as large in each further one; and ``(N, S)``,
    whether there is an image and all four numbers are between 0.01 and 0.99.
    """
    levels, start = [], 0
    for level, (height, width) in enumerate(memory.shapes):
        there = ~memory.padding[:, start : start + height * width].unflatten(1, (height, width))
        start = start + height * width
        y = torch.arange(height, dtype=torch.float32, device=there.device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=there.device) + 0.5
        # exact counts: small images have anchors at the very limits of what is valid
        x = (x / there[:, 0, :].sum(dim=1, keepdim=True))[:, None, :].expand(-1, height, -1)
        y = (y / there[:, :, 0].sum(dim=1, keepdim=True))[:, :, None].expand(-1, -1, width)
        size = torch.full_like(x, 0.05 * 2**level)
        levels.append(torch.stack([x, y, size, size], dim=-1).flatten(1, 2))
    boxes = torch.cat(levels, dim=1)
    inside = ((boxes > 0.01) & (boxes < 0.99)).all(dim=-1)
    return boxes, inside & ~memory.padding


class TwoStageQueries(nn.Module):
    """The encoder's best predictions as references; the contents are learned per rank.

    Args:
        num_queries: Q; beyond the number of positions, queries get the box of positions that are
            not valid
        channels: C
        num_classes: K
        binary: class 0 stands for any object: it gives the score, and the loss is of all positions
            (Deformable DETR); otherwise the best class does, and only what is chosen has a loss
            (DINO)
        positions: the queries' positions are embedded proposals; otherwise the decoder makes them
        prior: initial score of every class
    """

    query_rows = ("content.weight",)

    def __init__(
        self,
        *,
        num_queries: int = 300,
        channels: int = 256,
        num_classes: int = 80,
        binary: bool = True,
        positions: bool = True,
        prior: float = 0.01,
    ):
        super().__init__()
        self.num_queries = num_queries
        self.binary = binary
        self.transform = Linear(channels, channels)
        nn.init.xavier_uniform_(self.transform.weight)
        self.norm = nn.LayerNorm(channels)
        self.classes = Linear(channels, num_classes)
        nn.init.constant_(self.classes.bias, math.log(prior / (1 - prior)))
        self.boxes = BoxHead(channels=channels)
        self.content = nn.Embedding(num_queries, channels)
        # of the embedding, the second half would be the contents, were they not learned
        self.positions = (
            BoxEmbedding(channels=channels, out_channels=2 * channels) if positions else None
        )

    def forward(self, memory: Memory) -> Queries:
        """Return the queries, and the proposals with them."""
        proposals = self.propose(memory)
        queries = self._queries(proposals.boxes.detach(), self.content.weight)
        return queries._replace(proposals=proposals)

    def following(self, proposals: Proposals, content: Tensor) -> Queries:
        """Return queries of the proposals next in rank to the chosen ones.

        Args:
            content: ``(T, C)``, of T queries by rank
        """
        count = proposals.scores.shape[1]
        fill = (0, self.num_queries + len(content))
        scores = F.pad(proposals.scores, fill, value=-torch.inf)
        left = scores.scatter(1, proposals.index, -torch.inf)
        top_scores, index = left.topk(len(content), dim=1)
        index = index.masked_fill(top_scores == -torch.inf, count)  # none is left
        chosen = (proposals.features, proposals.anchors, proposals.valid)
        boxes = self._predict_boxes(*(_rows(each, index) for each in chosen))
        return self._queries(boxes.detach(), content)

    def _queries(self, references: Tensor, content: Tensor) -> Queries:
        position = None
        if self.positions is not None:
            position = self.positions(references).chunk(2, dim=-1)[0]
        return Queries(content.expand(references.shape[0], -1, -1), position, references)

    def propose(self, memory: Memory) -> Proposals:
        """Return the encoder's predictions."""
        anchors, valid = anchor_boxes(memory)
        tokens = memory.tokens.masked_fill(~valid[..., None], 0.0)
        features = self.norm(self.transform(tokens))
        logits = self.classes(features)
        scores = (logits[..., 0] if self.binary else logits.amax(dim=-1)).float()
        # there are always enough to choose from
        enough = F.pad(scores, (0, self.num_queries), value=-torch.inf)
        top_scores, index = enough.topk(self.num_queries, dim=1)
        chosen = (_rows(each, index) for each in (features, anchors, valid))
        return Proposals(
            features=features,
            anchors=anchors,
            valid=valid,
            logits=logits,
            scores=scores,
            index=index,
            top_scores=top_scores,
            boxes=self._predict_boxes(*chosen),
        )

    def encoder_predictions(self, proposals: Proposals) -> EncoderPredictions:
        """Return what has a loss."""
        if self.binary:
            boxes = self._predict_boxes(proposals.features, proposals.anchors, proposals.valid)
            return EncoderPredictions(proposals.logits, boxes, True)
        return EncoderPredictions(_rows(proposals.logits, proposals.index), proposals.boxes, False)

    def _predict_boxes(self, features: Tensor, anchors: Tensor, valid: Tensor) -> Tensor:
        """Return boxes ``(N, T, 4)``; those that are not valid have 1 everywhere, as if their logit
        were infinite, and no gradient.
        """
        return torch.where(valid[..., None], self.boxes(features, anchors), 1.0)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``(N, Q, ...)`` of ``(N, S, ...)``, zero beyond the last one."""
    count = values.shape[1]
    rows = index.clamp(max=count - 1)
    beyond = index >= count
    if values.ndim == 3:
        rows, beyond = rows[..., None].expand(-1, -1, values.shape[2]), beyond[..., None]
    found = values.gather(1, rows)
    if found.dtype == torch.bool:  # which onnxruntime fills nowhere
        return found & ~beyond
    return found.masked_fill(beyond, 0)
