"""The decoder of Mask2Former: queries attend where their own masks are.

Letters: N images, C channels, Q queries, K classes, D predictions (one before the first layer and
one after each), Hi and Wi size of level i, H and W size of the masks, S positions of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2dense.modeling.detr import SinePositions
from d2dense.modeling.detr.feed_forward import FeedForward

__all__ = ["MaskDecoder", "MaskDecoderLayer"]


class MaskDecoderLayer(nn.Module):
    """Masked attention to one level, attention between queries, and a perceptron, each added to its
    input and normalised after.

    Args:
        channels: C
        heads: of both attentions
        feedforward: width inside the perceptron
    """

    def __init__(self, *, channels: int, heads: int, feedforward: int):
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels=channels, hidden=feedforward)
        self.norm3 = nn.LayerNorm(channels)
        for attention in (self.cross_attention, self.self_attention):
            nn.init.xavier_uniform_(attention.out_proj.weight)

    def forward(
        self, content: Tensor, position: Tensor, tokens: Tensor, places: Tensor, ignored: Tensor
    ) -> Tensor:
        """Return the new content ``(N, Q, C)``.

        Args:
            content, position: of the queries, ``(N, Q, C)``
            tokens, places: of the level and their positions, ``(N, S, C)``
            ignored: ``(N heads, Q, S)``, True where a query does not look
        """
        read, _ = self.cross_attention(
            content + position, tokens + places, tokens, attn_mask=ignored, need_weights=False
        )
        content = self.norm1(content + read)
        query = content + position
        heard, _ = self.self_attention(query, query, content, need_weights=False)
        content = self.norm2(content + heard)
        return self.norm3(content + self.ffn(content))


class MaskDecoder(nn.Module):
    """Layers that look at the levels by turns, coarsest first.

    Args:
        channels: C
        num_classes: K
        num_queries: Q
        levels: how many there are
        layers: how many layers
        heads, feedforward: of the layers
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        num_classes: int = 80,
        num_queries: int = 100,
        levels: int = 3,
        layers: int = 9,
        heads: int = 8,
        feedforward: int = 2048,
    ):
        super().__init__()
        self.heads = heads
        self.positions = SinePositions(channels=channels)
        self.content = nn.Embedding(num_queries, channels)
        self.position = nn.Embedding(num_queries, channels)
        self.level = nn.Embedding(levels, channels)
        self.layers = nn.ModuleList(
            MaskDecoderLayer(channels=channels, heads=heads, feedforward=feedforward)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.classes = nn.Linear(channels, num_classes + 1)  # the last one is no object
        self.masks = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )

    def forward(self, maps: Sequence[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits ``(D, N, Q, K + 1)`` and mask logits ``(D, N, Q, H, W)``.

        Args:
            maps: ``(N, C, Hi, Wi)``, coarsest first
            features: ``(N, C, H, W)``, that masks are made of
        """
        n = features.shape[0]
        rows = torch.arange(len(self.level.weight), device=features.device)
        embeddings = self.level(rows)
        tokens = [
            each.flatten(2).transpose(1, 2) + embedding for each, embedding in zip(maps, embeddings)
        ]
        places = [
            self.positions(torch.zeros_like(each[:, 0], dtype=torch.bool))
            .flatten(2)
            .transpose(1, 2)
            for each in maps
        ]
        rows = torch.arange(len(self.content.weight), device=features.device)
        content = self.content(rows).expand(n, -1, -1)
        position = self.position(rows).expand(n, -1, -1)
        found = [self._predict(content, features)]
        for i, layer in enumerate(self.layers):
            level = i % len(maps)
            ignored = self._ignored(found[-1][1], (maps[level].shape[2], maps[level].shape[3]))
            content = layer(content, position, tokens[level], places[level], ignored)
            found.append(self._predict(content, features))
        logits, masks = zip(*found)
        return torch.stack(logits), torch.stack(masks)

    def _predict(self, content: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        content = self.norm(content)
        masks = torch.einsum("nqc,nchw->nqhw", self.masks(content), features)
        return self.classes(content), masks

    def _ignored(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Return where each query does not look, ``(N heads, Q, S)``: outside its mask, unless that
        would be everywhere.
        """
        masks = F.interpolate(masks.detach(), size=size, mode="bilinear", align_corners=False)
        outside = (masks.sigmoid() < 0.5).flatten(2)
        outside = outside & ~outside.all(dim=2, keepdim=True)
        return outside.repeat_interleave(self.heads, dim=0)
