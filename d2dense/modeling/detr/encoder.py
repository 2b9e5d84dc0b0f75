"""The deformable encoder: every position of every level attends to all levels.

Letters: N images, C channels, L levels, S positions of all levels together, H and W size of the
batch, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2dense.errors import UserError
from d2dense.layers import MultiScaleDeformableAttention

from .feed_forward import FeedForward
from .memory import Memory, centres, padding_masks, valid_ratios
from .positions import SinePositions

__all__ = ["DeformableEncoder", "DeformableEncoderLayer"]


class DeformableEncoderLayer(nn.Module):
    """Deformable attention and a perceptron, each added to its input and normalised after.

    Args:
        channels: C
        feedforward: width inside the perceptron
        dropout: probability, after both parts and inside the perceptron
        heads, levels, points: of the attention
    """

    def __init__(
        self,
        *,
        channels: int,
        feedforward: int,
        dropout: float,
        heads: int,
        levels: int,
        points: int,
    ):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(
            channels=channels, heads=heads, levels=levels, points=points
        )
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels=channels, hidden=feedforward, dropout=dropout)
        self.norm2 = nn.LayerNorm(channels)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        references: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """Return the new tokens ``(N, S, C)``.

        Args:
            tokens, positions: ``(N, S, C)``; positions are added to queries only
            references: ``(N, S, L, 2)``, see :func:`centres`
            shapes, padding: see :class:`Memory`
        """
        read = self.attention(tokens + positions, references, tokens, shapes, padding)
        tokens = self.norm1(self.dropout(read).add_(tokens))
        return self.norm2(self.ffn(tokens).add_(tokens))


class DeformableEncoder(nn.Module):
    """Layers over the maps of several levels.

    Args:
        channels: C, of all maps
        levels: L, how many maps there are
        layers: how many layers
        heads, points: of the attention
        feedforward: width inside the perceptrons
        dropout: probability
        temperature, offset: of the sine encoding of positions, see :class:`SinePositions`
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        levels: int = 4,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        feedforward: int = 1024,
        dropout: float = 0.1,
        temperature: float = 10000.0,
        offset: float = -0.5,
    ):
        super().__init__()
        self.positions = SinePositions(channels=channels, temperature=temperature, offset=offset)
        self.level_embedding = nn.Parameter(torch.empty(levels, channels).normal_())
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                channels=channels,
                feedforward=feedforward,
                dropout=dropout,
                heads=heads,
                levels=levels,
                points=points,
            )
            for _ in range(layers)
        )

    def forward(
        self, maps: Sequence[Tensor], image_sizes: Tensor, batch_size: tuple[int, int]
    ) -> Memory:
        """Return the encoded maps.

        Args:
            maps: ``(N, C, Hl, Wl)`` per level
            image_sizes: ``(N, 2)``, height and width without padding
            batch_size: (H, W)
        """
        levels, channels = self.level_embedding.shape
        if len(maps) != levels or any(each.shape[1] != channels for each in maps):
            found = ", ".join(str(each.shape[1]) for each in maps)
            raise UserError(
                f"the encoder takes {levels} maps of {channels} channels, found {len(maps)} with "
                f"{found}; change MODEL.DETR.IN_FEATURES, NECK, LEVELS or CHANNELS (yaml), "
                "in_features, neck or the encoder (lazy)"
            )
        shapes = [(each.shape[2], each.shape[3]) for each in maps]
        masks = padding_masks(image_sizes, batch_size, shapes)
        ratios = torch.stack([valid_ratios(mask) for mask in masks], dim=1)
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)
        positions = [self.positions(mask).flatten(2).transpose(1, 2) for mask in masks]
        positions = torch.cat(
            [each + embedding for each, embedding in zip(positions, self.level_embedding)], dim=1
        )
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        references = centres(shapes, ratios)
        for layer in self.layers:
            tokens = layer(tokens, positions, references, shapes, padding)
        return Memory(tokens=tokens, shapes=shapes, padding=padding, valid_ratios=ratios)
