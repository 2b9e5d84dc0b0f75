"""The encoder of the first DETR: every position of one map attends to all.

Letters: N images, C channels, S positions, H and W size of the batch, Hl and Wl size of the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2dense.errors import UserError

from .feed_forward import FeedForward, perceptron, xavier_matrices
from .memory import Memory, padding_masks, valid_ratios
from .positions import SinePositions

__all__ = ["SingleScaleEncoder", "SingleScaleEncoderLayer"]


class SingleScaleEncoderLayer(nn.Module):
    """Attention between all positions and a perceptron, each added to its input and normalised
    after.

    Args:
        channels: C
        heads: of the attention
        feedforward: width inside the perceptron
        dropout: probability, of the attention's weights, after both parts and inside the perceptron
        activation: of the perceptron, "relu" or "prelu"
    """

    def __init__(
        self, *, channels: int, heads: int, feedforward: int, dropout: float, activation: str
    ):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FeedForward(
            channels=channels, hidden=feedforward, dropout=dropout, activation=activation
        )
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """Return the new tokens ``(N, S, C)``.

        Args:
            tokens, positions: ``(N, S, C)``; positions are added to queries and keys
            padding: ``(N, S)``, True where there is no image
        """
        place = tokens + positions
        read, _ = self.attention(place, place, tokens, key_padding_mask=padding, need_weights=False)
        tokens = self.norm1(tokens + self.dropout(read))
        return self.norm2(tokens + self.ffn(tokens))


class SingleScaleEncoder(nn.Module):
    """Layers over one map.

    Args:
        channels: C, of the map
        layers: how many layers
        heads: of the attention
        feedforward: width inside the perceptrons
        dropout: probability
        activation: of the perceptrons, "relu" or "prelu"
        temperature, offset: of the sine encoding of positions, see :class:`SinePositions`
        scale_positions: each layer multiplies the positions by two linear layers of its tokens, the
            same in all layers (DAB-DETR)
    """

    def __init__(
        self,
        *,
        channels: int = 256,
        layers: int = 6,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        temperature: float = 10000.0,
        offset: float = 0.0,
        scale_positions: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.positions = SinePositions(channels=channels, temperature=temperature, offset=offset)
        self.scale = perceptron(channels, channels, channels) if scale_positions else None
        self.layers = nn.ModuleList(
            SingleScaleEncoderLayer(
                channels=channels,
                heads=heads,
                feedforward=feedforward,
                dropout=dropout,
                activation=activation,
            )
            for _ in range(layers)
        )
        xavier_matrices(self)

    def forward(
        self, maps: Sequence[Tensor], image_sizes: Tensor, batch_size: tuple[int, int]
    ) -> Memory:
        """Return the encoded map with the encoding of its positions.

        Args:
            maps: one, ``(N, C, Hl, Wl)``
            image_sizes: ``(N, 2)``, height and width without padding
            batch_size: (H, W)
        """
        if len(maps) != 1 or maps[0].shape[1] != self.channels:
            found = ", ".join(str(each.shape[1]) for each in maps)
            raise UserError(
                f"the encoder takes one map of {self.channels} channels, found {len(maps)} with "
                f"{found}; change MODEL.DETR.IN_FEATURES, NECK or CHANNELS (yaml), in_features, "
                "neck or the encoder (lazy)"
            )
        shape = (maps[0].shape[2], maps[0].shape[3])
        (mask,) = padding_masks(image_sizes, batch_size, [shape])
        padding = mask.flatten(1)
        positions = self.positions(mask).flatten(2).transpose(1, 2)
        tokens = maps[0].flatten(2).transpose(1, 2)
        for layer in self.layers:
            scaled = positions if self.scale is None else positions * self.scale(tokens)
            tokens = layer(tokens, scaled, padding)
        return Memory(
            tokens=tokens,
            shapes=[shape],
            padding=padding,
            valid_ratios=torch.stack([valid_ratios(mask)], dim=1),
            positions=positions,
        )
