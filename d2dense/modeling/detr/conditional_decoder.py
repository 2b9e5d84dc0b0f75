"""The decoder of Conditional DETR and of DAB-DETR: queries look at a place, the memory's positions
are compared with it apart from contents.

Letters: N images, C channels, Q queries, S positions of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2dense.errors import UserError

from .boxes import BoxPositions
from .conditional_attention import ConditionalCrossAttention, ConditionalSelfAttention
from .feed_forward import FeedForward, perceptron, xavier_matrices
from .memory import Memory
from .positions import encode_coordinates
from .queries import Queries

__all__ = ["ConditionalDecoder", "ConditionalDecoderLayer"]

_SMALLEST_SIDE = 1e-3  # of the image; the ratio to narrower anchors would leave half precision


class ConditionalDecoderLayer(nn.Module):
    """Attention between queries, attention to the memory, and a perceptron, each added to its input
    and normalised after.

    Args:
        channels: C
        heads: of both attentions
        feedforward: width inside the perceptron
        dropout: probability, of the attentions' weights, after all parts and inside the perceptron
        activation: of the perceptron, "relu" or "prelu"
        first: see :class:`ConditionalCrossAttention`
    """

    def __init__(
        self,
        *,
        channels: int,
        heads: int,
        feedforward: int,
        dropout: float,
        activation: str,
        first: bool,
    ):
        super().__init__()
        attention: dict[str, Any] = {"channels": channels, "heads": heads, "dropout": dropout}
        self.self_attention = ConditionalSelfAttention(**attention)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attention = ConditionalCrossAttention(**attention, first=first)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FeedForward(
            channels=channels, hidden=feedforward, dropout=dropout, activation=activation
        )
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        spatial: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the new content ``(N, Q, C)``.

        Args:
            content, position: ``(N, Q, C)``
            spatial: ``(N, Q, C)``, where each query looks, as an encoded place
            mask: see :class:`Queries`
        """
        heard = self.self_attention(content, position, mask)
        content = self.norm1(content + self.dropout(heard))
        read = self.cross_attention(
            content, position, spatial, memory.tokens, memory.positions, memory.padding
        )
        content = self.norm2(content + self.dropout(read))
        return self.norm3(content + self.ffn(content))


class ConditionalDecoder(nn.Module):
    """Layers over the queries, which look at the centres of their references: at the sines of the
    centre times two linear layers of the content (in the first layer times 1).

    With ``anchors`` it is DAB-DETR's: references are boxes, the positions of the queries follow
    from them, each layer's boxes are the references of the next one, and the widths and heights
    change how far along each axis a query looks.

    Args:
        channels: C
        layers: how many layers
        heads: of the attentions
        feedforward: width inside the perceptrons
        dropout: probability
        activation: of the perceptrons, "relu" or "prelu"
        anchors: see above
        look_forward_twice: with ``anchors``, the loss of a layer also reaches the box head of the
            layer before; the layers themselves start from detached references in any case
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
        anchors: bool = False,
        look_forward_twice: bool = False,
    ):
        super().__init__()
        self.anchors = anchors
        self.look_forward_twice = look_forward_twice
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(
                channels=channels,
                heads=heads,
                feedforward=feedforward,
                dropout=dropout,
                activation=activation,
                first=layer == 0,
            )
            for layer in range(layers)
        )
        self.scale: Any = perceptron(channels, channels, channels) if layers > 1 else None
        self.norm = nn.LayerNorm(channels)  # of what the heads see, not of what the next layer does
        if anchors:
            self.positions = BoxPositions(channels=channels)
            self.side = perceptron(channels, channels, 2)
        xavier_matrices(self)

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        predict_boxes: Callable[[int, Tensor, Tensor], Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the normalised states ``(N, Q, C)`` after each layer, and the references
        ``(N, Q, 2 or 4)`` that it started from.

        Args:
            queries: with ``anchors``, positions that are there replace those of the boxes
            memory: with ``positions``
            predict_boxes: layer, its state without the last norm, references -> boxes cxcywh
        """
        self._check(queries, memory)
        content, references = queries.content, queries.references
        start = references
        states, starts = [], []
        for i, layer in enumerate(self.layers):
            spatial = encode_coordinates(
                references[..., :2].flip(-1), channels=content.shape[2] // 2
            )
            if i > 0:
                spatial = spatial * self.scale(content)
            if self.anchors:
                spatial = self._modulated(spatial, content, references)
            position = self.positions(references) if queries.position is None else queries.position
            content = layer(content, position, spatial, memory, queries.mask)
            states.append(self.norm(content))
            starts.append(start)
            if self.anchors and i + 1 < len(self.layers):
                boxes = predict_boxes(i, content, references)
                references = boxes.detach()
                start = boxes if self.look_forward_twice else references
        return states, starts

    def _check(self, queries: Queries, memory: Memory) -> None:
        if memory.positions is None:
            raise UserError(
                "a conditional decoder compares positions, which this encoder does not hand on; "
                "take SingleScaleEncoder"
            )
        expected, found = 4 if self.anchors else 2, queries.references.shape[2]
        if found != expected:
            raise UserError(
                f"queries have references of {found} numbers; a conditional decoder takes boxes "
                "with anchors, points without: match AnchorQueries or PointQueries, and points of "
                f"PositiveQueries, to anchors={self.anchors}"
            )

    def _modulated(self, spatial: Tensor, content: Tensor, boxes: Tensor) -> Tensor:
        """Return ``spatial`` with each axis times (side that the content asks for) / (side of the
        box): DAB-DETR, section 4.4.
        """
        asked = self.side(content).float().sigmoid()
        ratio = asked / boxes[..., 2:].float().clamp(min=_SMALLEST_SIDE)
        y, x = spatial.chunk(2, dim=-1)
        return torch.cat([y * ratio[..., 1:], x * ratio[..., :1]], dim=-1)
